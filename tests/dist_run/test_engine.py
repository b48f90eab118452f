"""Mesh, launch, shards, cuts and checkpointed activations, one by one."""

import copy
import tempfile
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from minllama.architecture.accounting_training import TrainingStep
from minllama.architecture.config import LlamaConfig
from minllama.architecture.data import IGNORE
from minllama.architecture.generate import generate
from minllama.architecture.model import MinimalLlama
from minllama.architecture.optim import make_muon
from minllama.architecture.train import next_token_loss
from minllama.architecture.weights import save_pretrained
from minllama.dist_checkpoint import save_checkpoint
from minllama.dist_run import (
    checkpoint_activations,
    data_ranks,
    init_mesh,
    keep_activations,
    largest_unit,
    launch,
    materialize,
    shard,
    shard_by_hand,
    tensor_parallel,
    vocabulary_cross_entropy,
)
from minllama.dist_run.accounting import Sharding, sharded_moments, sharded_peak
from minllama.recipes.generate import generate_text
from tests.conftest import make_model, random_tokens, tiny_config
from tests.dist_run import rungs


def refused(action, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as error:
        action(*args, **kwargs)
    return str(error.value)


# ---- launch and mesh


def add_up(scale):
    x = torch.ones(2) * dist.get_rank() * scale
    dist.all_reduce(x)
    return {"sum": x, "rank": dist.get_rank(), "words": ["a", 1, None]}


def fail_on_one():
    if dist.get_rank() == 1:
        raise KeyError("planted")
    dist.barrier()


def hang_on_one():
    time.sleep(60 * dist.get_rank())


def test_launch_returns_what_each_rank_returned():
    results = launch(add_up, 3, 2.0)
    assert [r["rank"] for r in results] == [0, 1, 2]
    assert all(r["sum"].tolist() == [6.0, 6.0] for r in results)
    assert results[0]["words"] == ["a", 1, None]


def test_launch_names_the_rank_that_failed_or_hangs():
    with pytest.raises(RuntimeError, match="rank 1 failed(.|\n)*planted"):
        launch(fail_on_one, 2)
    with pytest.raises(RuntimeError, match="1 of 2 did not finish within"):
        launch(hang_on_one, 2, timeout=6)
    assert "world=0" in refused(launch, add_up, 0)


# ---- what two processes say


def two() -> dict:
    """All that needs two processes and no training."""
    mesh = init_mesh(tensor=2)
    said = {"refused": [], "ranks": list(data_ranks(mesh))}
    say = said["refused"].append
    say(refused(init_mesh, shard=3))
    say(refused(init_mesh, tensor=3))
    say(refused(init_mesh, replicate=0))
    say(refused(init_mesh, shard=-2))
    say(refused(init_mesh, replicate=-1))
    say(refused(init_mesh, timeout=0))
    say(refused(tensor_parallel, make_model("gated"), mesh))
    say(refused(tensor_parallel, make_model("llama", n_kv_heads=1), mesh))
    bad = {"mlp.up_proj": "diagonal"}
    say(refused(tensor_parallel, make_model("llama"), mesh, plan=bad))
    cut = tensor_parallel(make_model("llama"), mesh)
    say(refused(cut, random_tokens(1, 7)))
    say(refused(cut, random_tokens(1, 8), at=-1))
    more = make_model("llama")
    more.value_head = torch.nn.Linear(32, 1)
    say(refused(tensor_parallel, more, mesh))
    say(refused(data_ranks, init_device_mesh("cpu", (2,))))
    by_hand = shard_by_hand(make_model("llama"))
    say(refused(save_checkpoint, "nowhere", by_hand, step=1))
    whole = init_mesh()
    once = shard(make_model("llama"), whole)
    say(refused(shard, once, whole))
    say(refused(tensor_parallel, once, mesh))
    say(refused(tensor_parallel, cut, mesh))
    say(refused(tensor_parallel, by_hand, mesh))
    unnamed = init_device_mesh("cpu", (1, 2))
    say(refused(tensor_parallel, make_model("llama"), unnamed))
    say(refused(make_muon, by_hand, 1e-2))
    say(_heads_refused())
    say(refused(shard, make_model("llama"), whole, prefetch=-1))
    said["generated"] = _generates(mesh)
    said["drawn"] = [_drawn(tied, axes) for tied in (False, True) for axes in (1, 2)]
    said["loss"] = _parallel_loss()
    said["bytes"] = _bytes(whole)
    return said


def _heads_refused() -> str:
    """What `minllama generate` says where torchrun started too many processes."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(make_model("llama", n_kv_heads=1), folder)
        return refused(generate_text, "Once", folder, device="cpu")


def _generates(mesh) -> list[bool]:
    """Tensor parallel and sharded, greedy and drawn: the tokens of one process."""
    found = []
    for kind in ("llama-tied", "qwen3", "mistral"):
        name, _, tied = kind.partition("-")
        for how in ({}, {"temperature": 1.0, "seed": 3}):
            for cut in ("tensor", "shard"):
                torch.manual_seed(1)
                model = make_model(name, tie_embeddings=bool(tied))
                tokens = random_tokens(2, 5)
                expected = generate(model, tokens, 12, **how)
                if cut == "tensor":
                    tensor_parallel(model, mesh, sequence=False)
                else:
                    shard(model, init_mesh())
                found.append(torch.equal(generate(model, tokens, 12, **how), expected))
    return found


def _drawn(tied: bool, axis: int) -> float:
    """Largest difference between slices drawn on meta and one process's weights."""
    config = tiny_config(tie_embeddings=tied)
    expected = MinimalLlama(config)
    torch.manual_seed(3)
    expected.init_weights()
    with torch.device("meta"):
        model = MinimalLlama(config)
    mesh = init_mesh(tensor=axis)
    if axis > 1:
        tensor_parallel(model, mesh)
    shard(model, mesh)
    torch.manual_seed(3)
    materialize(model)
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    whole = {n: p.full_tensor() for n, p in model.named_parameters()}
    return max(
        float((whole[n] - p).detach().abs().max())
        for n, p in expected.named_parameters()
    )


def _parallel_loss() -> list[float]:
    """Ours against PyTorch's loss_parallel, and against the plain loss."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_mesh(shard=1, tensor=2)["tensor"]
    torch.manual_seed(0)
    logits = torch.randn(9, 97, dtype=torch.float64) * 5
    targets = torch.randint(0, 97, (9,))
    targets[3] = IGNORE
    losses, grads = [], []
    for how in ("plain", "ours", "theirs"):
        z = logits.clone()
        z = z if how == "plain" else distribute_tensor(z, mesh, [Shard(1)])
        z.requires_grad_()
        if how == "theirs":
            with loss_parallel():
                y = torch.nn.functional.cross_entropy(z, targets, reduction="sum")
                (2 * y).backward()
        else:
            y = vocabulary_cross_entropy(z, targets)
            (2 * y).backward()
        losses.append(y.full_tensor() if isinstance(y, DTensor) else y)
        grad = z.grad
        grads.append(grad.full_tensor() if isinstance(grad, DTensor) else grad)
    return [
        float((pair[0] - other).detach().abs().max())
        for pair in (losses, grads)
        for other in pair[1:]
    ]


def _bytes(mesh) -> tuple[int, int, int]:
    """Bytes of parameters on this rank, in the model, and of the largest unit."""
    model = make_model("llama")
    whole = sum(p.nbytes for p in model.parameters())
    largest = 4 * largest_unit(model)
    shard(model, mesh)
    return sum(p.to_local().nbytes for p in model.parameters()), whole, largest


@pytest.fixture(scope="module")
def pair():
    return launch(two, 2)


def test_what_does_not_fit_is_refused_by_name(pair):
    words = [
        "replicate=1, shard=3, tensor=1 do not multiply to the 2 processes",
        "replicate=1, shard=-1, tensor=3 do not multiply to the 2 processes",
        "replicate=0 must be at least 1",
        "shard=-2 must be at least 1, or -1",
        "replicate=-1, shard=-1",
        "timeout=0",
        "self_attn.gate_proj.weight",
        "n_kv_heads=1 does not divide by the 2 ranks",
        "plan={'mlp.up_proj': 'diagonal'}",
        "T=7 tokens do not divide",
        "at=-1 picks tokens",
        "value_head.weight, value_head.bias would see only some tokens",
        "the mesh has the axes None",
        "cut by shard_by_hand",
        "sharded already",
        "embed_tokens.weight is a DTensor, (Shard(dim=0),), by shard",
        "embed_tokens.weight is a DTensor, (Shard(dim=0),), by tensor_parallel",
        "exchanges gradients by hand",
        "mesh of shape (1, 2) with the axes None, and none is called tensor",
        "the model was cut by shard_by_hand",
        "n_kv_heads=1 does not divide by the 2 processes that torchrun started; take "
        "--nproc-per-node 1, or --sharded",
        "prefetch=-1",
    ]
    for said, word in zip(pair[0]["refused"], words, strict=True):
        assert word in said


def test_generation_over_two_processes_gives_the_tokens_of_one(pair):
    assert all(all(rank["generated"]) for rank in pair)


def test_weights_drawn_in_slices_are_those_of_one_process(pair):
    assert [rank["drawn"] for rank in pair] == [[0.0] * 4] * 2


def test_parallel_cross_entropy_equals_the_plain_one_and_torchs(pair):
    assert max(pair[0]["loss"]) < 1e-13


def test_each_rank_holds_its_share(pair):
    for rank in pair:
        held, whole, largest = rank["bytes"]
        assert abs(held - whole / 2) < largest / 10  # 97 words do not halve
    assert sum(rank["bytes"][0] for rank in pair) == whole
    assert pair[0]["ranks"] == [0, 1]  # both see the same rows


def four() -> list[bool]:
    mesh = init_mesh(shard=1, tensor=4)
    torch.manual_seed(1)
    model = make_model("llama", n_heads=8, n_kv_heads=4)
    tokens = random_tokens(2, 5)
    expected = generate(model, tokens, 20)
    tensor_parallel(model, mesh, sequence=False)
    return [torch.equal(generate(model, tokens, 20), expected)]


def test_generation_over_four_processes_gives_the_tokens_of_one():
    assert all(rank == [True] for rank in launch(four, 4))


# ---- activations, in one process


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_checkpointing_changes_neither_loss_nor_gradients(any_model, policy):
    batch = rungs.one_batch()
    expected = next_token_loss(any_model, batch)
    expected.backward()
    grads = {n: p.grad.clone() for n, p in any_model.named_parameters()}
    any_model.zero_grad()
    names = list(any_model.state_dict())
    checkpoint_activations(any_model, policy)
    assert list(any_model.state_dict()) == names
    loss = next_token_loss(any_model, batch)
    loss.backward()
    assert torch.equal(loss, expected)
    for name, p in any_model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-5, atol=1e-6)


def saved_bytes(model, batch) -> int:
    seen = {}

    def pack(tensor):
        seen[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        next_token_loss(model, batch)
    return sum(seen.values())


def test_full_checkpointing_keeps_less_and_can_be_undone():
    model, batch = make_model("llama", n_layers=6), rungs.one_batch()
    before = saved_bytes(model, batch)
    half = saved_bytes(checkpoint_activations(model, every=2), batch)
    keep_activations(model)
    full = saved_bytes(checkpoint_activations(model), batch)
    assert full < half < before
    assert saved_bytes(keep_activations(model), batch) == before


@pytest.mark.filterwarnings("ignore")  # of PyTorch about itself, where it traces
@pytest.mark.parametrize("policy", ["full", "selective"])
def test_compiled_blocks_may_be_checkpointed(policy):
    """Also where a graph ends inside of a block: it must not find itself there."""
    model, batch = make_model("llama"), rungs.one_batch()

    def gradients():
        model.zero_grad()
        next_token_loss(model, batch).backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    checkpoint_activations(model, policy)
    for block in model.layers:
        block.forward = torch.compile(block.forward, backend="aot_eager")
    torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-5)


def test_a_copy_of_a_checkpointed_model_runs_its_own_blocks():
    model = checkpoint_activations(make_model("llama"))
    copied = copy.deepcopy(model)
    torch.nn.init.zeros_(copied.layers[0].mlp.down_proj.weight)
    batch = rungs.one_batch()
    assert next_token_loss(copied, batch) != next_token_loss(model, batch)


def test_what_init_weights_forgets_is_refused_and_other_draws_are_whole():
    class Forgetful(MinimalLlama):
        def __init__(self, config):
            super().__init__(config)
            self.scale = torch.nn.Parameter(torch.ones(3))

    class Kaiming(MinimalLlama):
        def init_weights(self):
            super().init_weights()
            torch.nn.init.kaiming_uniform_(self.lm_head.weight)
            torch.nn.init.orthogonal_(self.layers[0].mlp.up_proj.weight)

    with torch.device("meta"):
        forgetful, kaiming = Forgetful(tiny_config()), Kaiming(tiny_config())
    assert "does not set scale" in refused(materialize, forgetful)
    expected = Kaiming(tiny_config())
    torch.manual_seed(3)
    expected.init_weights()
    torch.manual_seed(3)
    for a, b in zip(expected.parameters(), materialize(kaiming).parameters()):
        assert torch.equal(a, b)


def test_checkpointing_stays_out_of_generation_and_refuses_nonsense():
    model = checkpoint_activations(make_model("llama"))
    assert generate(model, random_tokens(1, 4), 3).shape == (1, 7)
    assert "sharded" in refused(checkpoint_activations, make_model("llama"), "sharded")
    assert "every=0" in refused(checkpoint_activations, make_model("llama"), every=0)
    assert "called once" in refused(checkpoint_activations, model)


# ---- accounting


def test_slices_and_states_are_sixteen_bytes_a_weight_over_the_ranks():
    config = LlamaConfig.from_name("llama-3.1-8b")
    step = TrainingStep(batch_size=2, seq_len=4096, checkpointing=True, packed=False)
    for ranks in (1, 4, 64):
        parts = sharded_moments(config, step, Sharding(ranks=ranks))
        last = parts["step of the optimizer"]
        sliced = last["slices"] + last["optimizer"] + last["gradients of slices"]
        assert round(sliced * ranks / 16) == 8_030_261_248
    name, few = sharded_peak(config, step, Sharding(ranks=64))
    assert name == "backward of cross-entropy"  # what a rank holds of its own remains
    assert "ranks=0" in refused(Sharding, ranks=0)
    assert "int8" in refused(Sharding, ranks=1, dtype="int8")
