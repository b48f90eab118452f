"""Any number of processes, cut in any way, reads what any other wrote."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from minllama.architecture.optim import make_adamw, make_muon
from minllama.architecture.weights import save_pretrained
from minllama.dist_checkpoint import (
    allocate,
    async_save,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    split,
)
from minllama.dist_checkpoint.pieces import Piece, Tensors, intersect
from minllama.dist_run.launch import launch
from tests.conftest import make_model
from tests.dist_checkpoint.work import (
    cut,
    equal,
    make_rows,
    meta_model,
    optimizer_tensors,
    train_step,
    whole,
)


def fresh(kind: str, tied: bool):
    """A model without weights, cut; and its optimizer, after it got memory."""
    model = meta_model(tie_embeddings=tied)
    model = allocate(cut(model, kind) if kind else model)
    return model, make_adamw(model, 1e-2)


def save_and_resume(folder: str, tied: bool, kinds: list[str]) -> dict:
    """Train two steps, save, go on; then resume on the same mesh, and on others."""
    torch.manual_seed(0)
    rank = dist.get_rank()
    model = cut(make_model("llama", tie_embeddings=tied).train(), "fsdp")
    optimizer = make_adamw(model, 1e-2)
    for step in range(2):
        train_step(model, optimizer, make_rows(step))
    torch.manual_seed(100 + rank)
    save_checkpoint(folder, model, optimizer, step=2)
    draw = torch.rand(3)
    saved = whole(model.state_dict()), optimizer_tensors(model, optimizer)
    losses = [train_step(model, optimizer, make_rows(step)) for step in (2, 3)]
    ended = whole(model.state_dict())
    found = {}
    for kind in kinds:
        torch.manual_seed(7)
        model, optimizer = fresh(kind, tied)
        load_checkpoint(folder, model, optimizer)
        state = whole(model.state_dict()), optimizer_tensors(model, optimizer)
        found[kind] = {
            "state": equal(saved[0], state[0]) and equal(saved[1], state[1]),
            "rng": torch.equal(draw, torch.rand(3)),
            "tied": model.lm_head.weight is model.embed_tokens.weight,
        }
        if kind == "tp" and dist.get_world_size() > 2:
            continue  # more ranks than key heads: it holds the weights, and cannot run
        again = [train_step(model, optimizer, make_rows(step), kind) for step in (2, 3)]
        found[kind]["gap"] = max(abs(a - b) for a, b in zip(losses, again))
        found[kind]["end"] = equal(ended, whole(model.state_dict()))
    return found


@pytest.mark.parametrize("world, tied", [(2, True), (4, False)])
def test_resuming_on_the_same_mesh_is_bit_for_bit(tmp_path, world, tied):
    kinds = ["fsdp", "tp"] + (["2d", "hsdp"] if world == 4 else [])
    for found in launch(
        save_and_resume, world, str(tmp_path), tied, kinds, timeout=120
    ):
        for kind in kinds:
            assert found[kind]["state"] and found[kind]["rng"], kind
            assert found[kind]["tied"] == tied
            assert found[kind].get("gap", 0.0) < 1e-6
        assert found["fsdp"]["gap"] == 0.0 and found["fsdp"]["end"]


def one_leg(folder: str, kind: str, steps: list[int]) -> tuple:
    """Load the last checkpoint, train, save: losses, what was loaded and saved."""
    model, optimizer = fresh(kind, tied=False)
    model.train()
    assert load_checkpoint(folder, model, optimizer).step == steps[0]
    start = whole(model.state_dict()) | optimizer_tensors(model, optimizer)
    draw = float(torch.rand(1))
    losses = [train_step(model, optimizer, make_rows(step), kind) for step in steps]
    end = whole(model.state_dict()) | optimizer_tensors(model, optimizer)
    pending = async_save(folder, model, optimizer, step=steps[-1] + 1, keep=1)
    with torch.no_grad():
        for p in model.parameters():  # the save has its own copy
            p.zero_()
    assert pending.result().name == f"step-{steps[-1] + 1:08}"
    return losses, start, end, draw


def test_state_is_bit_equal_and_the_curve_goes_on_from_4_to_2_to_1_to_4(tmp_path):
    torch.manual_seed(0)
    model = make_model("llama").train()
    optimizer = make_adamw(model, 1e-2)
    save_checkpoint(tmp_path, model, optimizer, step=0)
    saved = whole(model.state_dict())
    curve = [train_step(model, optimizer, make_rows(step)) for step in range(8)]
    losses = []
    for leg, (world, kind) in enumerate([(4, "2d"), (2, "fsdp"), (1, ""), (4, "fsdp")]):
        steps = [2 * leg, 2 * leg + 1]
        if world == 1:
            results = [one_leg(str(tmp_path), "", steps)]
        else:
            results = launch(one_leg, world, str(tmp_path), kind, steps)
        for _, start, _, _ in results:
            assert equal(saved, start)
        losses, saved = losses + results[0][0], results[0][2]
        assert len({draw for *_, draw in results}) == world  # each has its own numbers
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"]
    assert max(abs(a - b) for a, b in zip(losses, curve)) <= 1e-6, (losses, curve)


def save_on_four(folder: str) -> dict:
    torch.manual_seed(0)
    model = cut(make_model("llama", tie_embeddings=True).train(), "2d")
    optimizer = make_adamw(model, 1e-2)
    train_step(model, optimizer, make_rows(0), "2d")
    save_checkpoint(folder, model, optimizer, step=1)
    return {**whole(model.state_dict()), **optimizer_tensors(model, optimizer)}


def load_on_eight(folder: str) -> dict:
    model, optimizer = fresh("fsdp", tied=True)
    load_checkpoint(folder, model, optimizer)
    return {**whole(model.state_dict()), **optimizer_tensors(model, optimizer)}


def test_what_four_processes_saved_eight_load_bit_for_bit(tmp_path):
    saved = launch(save_on_four, 4, str(tmp_path))[0]
    for loaded in launch(load_on_eight, 8, str(tmp_path)):
        assert equal(saved, loaded)


def files_read(folder: str) -> list[str]:
    """The files that this rank opens to fill its part of a model."""
    from minllama.dist_checkpoint import pieces

    files, plain = set(), pieces.safe_open

    def noting(file, kind):
        files.add(Path(file).name)
        return plain(file, kind)

    pieces.safe_open = noting
    load_weights(cut(meta_model("qwen3"), "fsdp"), folder)
    pieces.safe_open = plain
    return sorted(files)


def refusals(folder: str) -> list[str]:
    """What is said of a sum that was not added up, and of a state of unknown cut."""
    said = []
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    net = torch.nn.Linear(4, 4)
    net.weight = torch.nn.Parameter(
        distribute_tensor(net.weight.detach(), mesh, [Shard(0)])
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    optimizer.state[net.weight] = {"rows": torch.zeros(2)}
    sums = torch.nn.Module()
    sums.x = torch.nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))
    for model, its_optimizer in ((net, optimizer), (sums, None)):
        try:
            save_checkpoint(folder, model, its_optimizer, step=1)
        except ValueError as error:
            said.append(str(error))
    return said


def three_ranks(folder: str, parts: str) -> dict:
    """Uneven pieces, replicas, failures that one rank has and all must hear of."""
    rank, found = dist.get_rank(), {"files read": files_read(parts)}
    found["refused"] = refusals(f"{folder}/none")
    torch.manual_seed(0)
    model = cut(make_model("qwen3"), "ddp")
    with torch.no_grad():
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    optimizer = make_muon(model.module, 1e-2)
    optimizer.step()
    path = save_checkpoint(folder, model, optimizer, step=1, extra={"a": 1})
    size = sum(f.stat().st_size for f in path.glob("model-*"))
    found["bytes"] = size / sum(p.nbytes for p in model.parameters())
    found["files"] = len(list(path.glob("model-*")))
    saved = whole(model.module.state_dict())
    states = optimizer_tensors(model.module, optimizer)
    other = allocate(cut(meta_model("qwen3"), "fsdp"))
    other_optimizer = make_muon(other, 1e-2)
    load_checkpoint(folder, other, other_optimizer)
    found["ddp to fsdp"] = equal(saved, whole(other.state_dict())) and equal(
        states, optimizer_tensors(other, other_optimizer)
    )
    found["empty"] = other.layers[0].self_attn.q_norm.weight.to_local().numel()
    path = save_checkpoint(folder, other, other_optimizer, step=2)
    again = make_model("qwen3")
    load_checkpoint(folder, again, make_muon(again, 1e-2))
    found["fsdp to one"] = equal(saved, whole(again.state_dict()))
    if rank == 0:
        file = path / "model-00001-of-00003.safetensors"
        data = bytearray(file.read_bytes())
        manifest = json.loads((path / "manifest.json").read_text())
        pieces = manifest["tensors"]["model.norm.weight"]["pieces"]
        at = next(p["bytes"][0] for p in pieces if p["file"] == file.name)
        data[at + 5] ^= 1
        file.write_bytes(data)
    dist.barrier()
    try:
        load_checkpoint(path, other)
    except ValueError as error:
        found["damaged"] = str(error)
    if rank == 1:
        other.extra = torch.nn.Parameter(torch.zeros(3))
    try:
        load_checkpoint(path, other, verify=False)
    except ValueError as error:
        found["one misfits"] = str(error)
    bad = {"rank": rank} if rank != 2 else {"rank": {1, 2}}
    try:
        save_checkpoint(folder, again, step=3, extra=bad)
    except ValueError as error:
        found["bad extra"] = str(error)
    return found


def test_uneven_pieces_replicas_and_errors_of_one_rank_on_three(tmp_path):
    save_pretrained(make_model("qwen3"), tmp_path / "hf")
    parts = split(tmp_path / "hf", tmp_path / "parts", world=3)
    results = launch(three_ranks, 3, str(tmp_path), str(parts), timeout=120)
    for rank, found in enumerate(results):
        assert found["files read"] == [f"model-{rank:05}-of-00003.safetensors"]
        assert "weight: the optimizer's rows (2,) is no DTensor" in found["refused"][0]
        assert "x is (Partial(sum),), sums that were not" in found["refused"][1]
        assert found["ddp to fsdp"] and found["fsdp to one"]
        assert found["files"] == 3 and 1 < found["bytes"] < 1.2  # each tensor once
        assert "model-00001-of-00003" in found["damaged"]
        assert "SHA-256" in found["damaged"]
        assert "it concerns model.norm.weight. Go on from" in found["damaged"]
        assert (
            "rank 1" in found["one misfits"]
            and "extra is missing" in found["one misfits"]
        )
        assert "rank 2" in found["bad extra"] and "JSON" in found["bad extra"]
    assert [found["empty"] for found in results] == [4, 4, 4]
    assert latest_checkpoint(tmp_path).name == "step-00000002"


def test_a_box_takes_from_each_piece_what_they_share(tmp_path):
    whole_one = torch.arange(7 * 5).view(7, 5)
    pieces = [Piece(tmp_path, f"{r} {c}", (r, c), (min(3, 7 - r), min(2, 5 - c)))
              for r in (0, 3, 6) for c in (0, 2, 4)]  # fmt: skip
    read = []

    def read_piece(piece, box):
        (r, c), (h, w) = piece.offset, piece.shape
        read.append(box)
        return whole_one[r : r + h, c : c + w][box]

    tensors = Tensors(tmp_path, read_piece)
    tensors.add("x", (7, 5), torch.int64, pieces)
    for rows in (slice(0, 7), slice(2, 4), slice(6, 7), slice(3, 3)):
        for columns in (slice(0, 5), slice(1, 2), slice(4, 5)):
            read.clear()
            found = tensors.read("x", (rows, columns))
            assert torch.equal(found, whole_one[rows, columns])
            taken = sum((a.stop - a.start) * (b.stop - b.start) for a, b in read)
            assert taken == found.numel()  # not a number more
    assert intersect((slice(0, 3), slice(0, 2)), pieces[4]) is None
    with pytest.raises(ValueError, match=r"pieces of y \(7, 5\) hold 34 of its 35"):
        tensors.add(
            "y",
            (7, 5),
            torch.int64,
            pieces[:-1],
        )
