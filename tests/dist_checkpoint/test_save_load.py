"""Save and load within one process: what is kept, what is refused."""

import json
import math
import random
import subprocess
import sys
import warnings

import pytest
import torch

from minllama.architecture.data import PackedBatches
from minllama.architecture.optim import make_adamw, make_muon
from minllama.architecture.train import Run, train, warmup_cosine
from minllama.dist_checkpoint import (
    allocate,
    async_save,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from minllama.dist_checkpoint import folders as folders_file
from tests.conftest import make_model, tiny_config
from tests.dist_checkpoint.work import (
    equal,
    make_rows,
    meta_model,
    optimizer_tensors,
    train_step,
    whole,
)


def documents():
    draw = random.Random(0)
    return [torch.tensor([draw.randrange(97) for _ in range(n)]).numpy()
            for n in (9, 5, 12, 7, 30, 8, 11, 6) * 3]  # fmt: skip


def new_run(seed=0, muon=False, **changes) -> Run:
    torch.manual_seed(seed)
    model = make_model("llama", **changes)
    optimizer = (make_muon if muon else make_adamw)(model, 1e-2)
    return Run(model, optimizer, PackedBatches(documents(), 2, 16), steps=12)


def test_a_loaded_model_is_the_saved_one(any_model, tmp_path):
    optimizer = make_adamw(any_model, 1e-2)
    train_step(any_model, optimizer, make_rows(0))
    path = save_checkpoint(tmp_path, any_model, optimizer, step=7)
    with torch.device("meta"):
        other = type(any_model)(any_model.config)
    assert load_checkpoint(tmp_path, other).step == 7
    assert equal(whole(any_model.state_dict()), whole(other.state_dict()))
    assert (other.lm_head.weight is other.embed_tokens.weight) == (
        any_model.config.tie_embeddings
    )
    manifest = json.loads((path / "manifest.json").read_text())
    assert ("model.lm_head.weight" in manifest["tensors"]) != (
        any_model.config.tie_embeddings
    )
    new = make_adamw(other, 1e-2)
    load_checkpoint(path, other, new)
    saved = optimizer_tensors(any_model, optimizer)
    assert equal(saved, optimizer_tensors(other, new)) and len(saved) > 30
    rows = make_rows(1)
    assert train_step(any_model, optimizer, rows) == train_step(other, new, rows)
    assert equal(whole(any_model.state_dict()), whole(other.state_dict()))


@pytest.mark.parametrize("muon", [False, True])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, muon):
    schedule, losses = warmup_cosine(12, 3), []
    run = new_run(muon=muon)
    note = lambda run: losses.append((run.step, run.loss, run.lr, run.tokens))
    at_5 = lambda run: run.step == 5 and save_checkpoint(tmp_path, run, keep=2)
    train(
        run.model, run.optimizer, run.batches, 12, schedule, hooks=(note, at_5), run=run
    )
    expected, losses = losses[5:], []
    end = torch.rand(3)
    again = new_run(seed=1, muon=muon)
    loaded = load_checkpoint(tmp_path, again)
    assert (again.step, loaded.step, again.tokens) == (5, 5, loaded.tokens)
    note = lambda run: losses.append((run.step, run.loss, run.lr, run.tokens))
    train(again.model, again.optimizer, again.batches, 12, schedule, hooks=(note,),
          run=again)  # fmt: skip
    assert losses == expected
    assert equal(run.model.state_dict(), again.model.state_dict())
    assert torch.equal(end, torch.rand(3))


def test_the_optimizer_is_known_by_names_not_by_order(tmp_path):
    model = make_model("llama")
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    rest = [p for n, p in model.named_parameters() if "norm" not in n]
    first = [{"params": norms, "lr": 0.1, "betas": (0.8, 0.9)}, {"params": rest}]
    optimizer = torch.optim.AdamW(first, lr=0.3)
    train_step(model, optimizer, make_rows(0))
    saved = optimizer_tensors(model, optimizer)
    save_checkpoint(tmp_path, model, optimizer, step=1)
    turned = [{"params": rest[::-1]}, {"params": norms[::-1]}]
    other = torch.optim.AdamW(turned, lr=7.0)
    load_checkpoint(tmp_path, model, other)
    assert [g["lr"] for g in other.param_groups] == [0.3, 0.1]
    assert other.param_groups[1]["betas"] == (0.8, 0.9)
    assert equal(saved, optimizer_tensors(model, other))


def test_groups_that_were_not_saved_are_refused(tmp_path):
    model = make_model("llama")
    path = save_checkpoint(tmp_path, model, make_adamw(model, 1e-2), step=1)
    before = whole(model.state_dict())
    torch.nn.init.zeros_(model.norm.weight)
    one = torch.optim.AdamW(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="others were in two"):
        load_checkpoint(path, model, one)
    stranger = torch.optim.AdamW(make_model("llama").parameters(), lr=1.0)
    with pytest.raises(ValueError, match="none of the model's"):
        load_checkpoint(path, model, stranger)
    assert not model.norm.weight.any()  # nothing was changed
    load_checkpoint(path, model)
    assert equal(before, model.state_dict())
    save_checkpoint(tmp_path, model, step=2)
    with pytest.raises(ValueError, match="holds no optimizer"):
        load_checkpoint(tmp_path, model, make_adamw(model, 1e-2))
    with pytest.raises(ValueError, match="no place in the batches"):
        load_checkpoint(tmp_path, model, batches=PackedBatches(documents(), 2, 16))


@pytest.mark.parametrize("make", [make_adamw, make_muon, lambda m, lr:
                                  torch.optim.Adafactor(m.parameters(), lr)],
                         ids=["adamw", "muon", "adafactor"])  # fmt: skip
@pytest.mark.parametrize("saved, wanted", [("float32", "bfloat16"),
                         ("bfloat16", "float32"), ("float32", "float64")])  # fmt: skip
def test_a_model_of_another_dtype_goes_on_with_states_of_its_own(
    tmp_path, make, saved, wanted
):
    model = make_model("llama").to(getattr(torch, saved))
    optimizer = make(model, 1e-2)
    train_step(model, optimizer, make_rows(0))
    save_checkpoint(tmp_path, model, optimizer, step=1)
    other = make_model("llama").to(getattr(torch, wanted))
    first = make(other, 1e-2)
    train_step(other, first, make_rows(0))
    loaded = make(other, 1e-2)
    load_checkpoint(tmp_path, other, loaded)
    born = {n: t.dtype for n, t in optimizer_tensors(other, first).items()}
    states = optimizer_tensors(other, loaded)
    assert {n: t.dtype for n, t in states.items()} == born
    for name, state in optimizer_tensors(model, optimizer).items():
        assert torch.equal(states[name], state.to(born[name]))
    assert math.isfinite(train_step(other, loaded, make_rows(1)))


def test_states_of_a_dtype_of_their_own_keep_it(tmp_path):
    model = make_model("llama")
    optimizer = torch.optim.SGD([model.norm.weight], lr=1e-2)
    mean = torch.randn(32, dtype=torch.float64)
    optimizer.state[model.norm.weight] = {"mean": mean}
    save_checkpoint(tmp_path, model, optimizer, step=1)
    other = make_model("llama").bfloat16()
    loaded = torch.optim.SGD([other.norm.weight], lr=1e-2)
    load_checkpoint(tmp_path, other, loaded)
    assert equal({"mean": mean}, loaded.state[other.norm.weight])


def test_frozen_parameters_have_no_state_and_need_none(tmp_path):
    model = make_model("llama")
    model.embed_tokens.weight.requires_grad_(False)
    optimizer = make_adamw(model, 1e-2)
    train_step(model, optimizer, make_rows(0))
    save_checkpoint(tmp_path, model, optimizer, step=1)
    other = make_adamw(model, 1.0)
    load_checkpoint(tmp_path, model, other)
    assert equal(optimizer_tensors(model, optimizer), optimizer_tensors(model, other))


def test_a_part_is_saved_and_the_rest_left_alone(tmp_path):
    model = make_model("llama").requires_grad_(False)
    model.norm.requires_grad_(True)
    model.layers[1].mlp.requires_grad_(True)
    optimizer = make_adamw(model, 1e-2)
    train_step(model, optimizer, make_rows(0))
    path = save_checkpoint(tmp_path, model, optimizer, step=1, parts="trainable")
    assert (
        sum(f.stat().st_size for f in path.glob("model-*")) < 20_000 < 97 * 32 * 4 * 2
    )
    other = make_model("llama")
    kept = other.embed_tokens.weight.clone()
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is missing"):
        load_checkpoint(tmp_path, other)
    loaded = load_checkpoint(tmp_path, other, strict=False)
    assert "embed_tokens.weight" in loaded.left_alone and len(loaded.left_alone) == 17
    assert torch.equal(other.norm.weight, model.norm.weight)
    assert torch.equal(other.embed_tokens.weight, kept)
    save_checkpoint(tmp_path, model, step=2, parts=("layers.0.*", "norm.*"))
    loaded = load_checkpoint(tmp_path, other, strict=False)
    assert not any(name.startswith("layers.0") for name in loaded.left_alone)
    with pytest.raises(ValueError, match="parts='layers.9"):
        save_checkpoint(tmp_path, model, step=3, parts="layers.9.*")


def test_a_part_fills_a_meta_model_whose_rest_is_drawn(tmp_path):
    model = make_model("llama")
    save_checkpoint(tmp_path, model, step=1, parts=("layers.0.*",))
    other = meta_model()
    load_checkpoint(tmp_path, other, strict=False)
    assert torch.equal(
        other.layers[0].mlp.up_proj.weight, model.layers[0].mlp.up_proj.weight
    )
    assert 0.015 < float(other.embed_tokens.weight.detach().std()) < 0.025
    mixed = meta_model()
    mixed.norm.weight = torch.nn.Parameter(torch.ones(32))
    with pytest.raises(ValueError, match="nothing fills them"):
        load_checkpoint(tmp_path, mixed, strict=False)


def test_what_is_there_already_survives_materialize():
    model = meta_model()
    model.norm.weight = torch.nn.Parameter(torch.full((32,), 5.0))
    assert allocate(model) is model
    assert (model.norm.weight == 5).all()
    assert not any(p.is_meta for p in model.parameters())


def test_an_optimizer_over_a_meta_model_is_refused(tmp_path):
    model = make_model("llama")
    save_checkpoint(tmp_path, model, make_adamw(model, 1.0), step=1)
    other = meta_model()
    with pytest.raises(ValueError, match="allocate"):
        load_checkpoint(tmp_path, other, make_adamw(other, 1.0))


def test_a_model_of_another_shape_is_refused_with_file_and_key(tmp_path):
    save_checkpoint(tmp_path, make_model("llama"), step=1)
    for changes, message in (
        (
            {"ffn_dim": 64},
            r"layers\.0\.mlp\.down_proj\.weight \(32, 48\) in model-00000",
        ),
        ({"n_layers": 3}, r"layers\.2\.\S+ is missing"),
        ({"n_layers": 1}, r"layers\.1\.\S+ in model-00000\S* is not the model's"),
        ({"n_heads": 2, "n_kv_heads": 1, "head_dim": 16}, "n_heads=2 where the files"),
        ({"rope_theta": 7.0}, r"rope_theta=7\.0 where the files say 10000\.0"),
        ({"norm_eps": 0.5}, r"norm_eps=0\.5"),
    ):
        model = make_model("llama", **changes)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path, model)
    small = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no name in common"):
        load_checkpoint(tmp_path, small, strict=False)


def test_any_module_is_kept_and_a_compiled_one_has_its_plain_names(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    net(torch.randn(4, 3))
    with warnings.catch_warnings():  # of PyTorch about itself, where it compiles
        warnings.simplefilter("ignore")
        compiled = torch.compile(net)
    save_checkpoint(tmp_path, compiled, step=0, extra={"note": [1, "x"]})
    other = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    assert load_checkpoint(tmp_path, other).extra == {"note": [1, "x"]}
    assert equal(net.state_dict(), other.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float8_e4m3fn,
                                   torch.int8, torch.bool])  # fmt: skip
def test_every_dtype_comes_back(tmp_path, dtype):
    net = torch.nn.Module()
    for name, shape in (("a", (5, 3)), ("b", ()), ("c", (0, 3))):
        net.register_buffer(name, torch.randn(shape).mul(3).to(dtype))
    save_checkpoint(tmp_path, net, step=0, rng=False)
    other = torch.nn.Module()
    for name, buffer in net.state_dict().items():
        other.register_buffer(name, torch.zeros_like(buffer))
    load_checkpoint(tmp_path, other)
    for name in "abc":
        mine, its = getattr(net, name), getattr(other, name)
        assert torch.equal(mine.reshape(-1).view(torch.uint8),
                           its.reshape(-1).view(torch.uint8))  # fmt: skip


def test_keep_removes_older_ones_and_leftovers_go(tmp_path):
    net = torch.nn.Linear(2, 2)
    (tmp_path / ".saving-step-00000009").mkdir()
    (tmp_path / ".removing-step-00000008").mkdir()
    (tmp_path / "curve.csv").write_text("kept")
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, net, step=step, keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["curve.csv", "step-00000003", "step-00000004"]
    with pytest.raises(ValueError, match="keep=0"):
        save_checkpoint(tmp_path, net, step=5, keep=0)
    with pytest.raises(ValueError, match="step=None"):
        save_checkpoint(tmp_path, net)


def test_older_ones_stay_until_the_new_one_is_in_force(tmp_path, monkeypatch):
    net, seen = torch.nn.Linear(2, 2), []
    look = lambda point: seen.append((point, len(folders_file.step_folders(tmp_path))))
    save_checkpoint(tmp_path, net, step=1, keep=1)
    monkeypatch.setattr(folders_file, "reached", look)
    save_checkpoint(tmp_path, net, step=2, keep=1)
    assert seen[-2:] == [("before the rename", 1), ("after the rename", 2)]
    assert len(folders_file.step_folders(tmp_path)) == 1


def test_the_same_step_saved_again_takes_the_place_of_the_first(tmp_path):
    net = torch.nn.Linear(2, 2)
    first = save_checkpoint(tmp_path, net, step=1)
    torch.nn.init.ones_(net.weight)
    second = save_checkpoint(tmp_path, net, step=1)
    assert not first.exists() and latest_checkpoint(tmp_path) == second
    other = torch.nn.Linear(2, 2)
    load_checkpoint(tmp_path, other)
    assert (other.weight == 1).all()
    assert save_checkpoint(tmp_path, net, step=2) == latest_checkpoint(tmp_path)


def test_nothing_to_load_is_said(tmp_path):
    net = torch.nn.Linear(2, 2)
    assert latest_checkpoint(tmp_path / "none") is None
    (tmp_path / "step-00000001").mkdir()
    with pytest.raises(
        ValueError, match=r"no complete checkpoint \(it has step-00000001"
    ):
        load_checkpoint(tmp_path, net)


def test_what_json_cannot_hold_is_refused(tmp_path):
    net = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="extra cannot be kept as JSON"):
        save_checkpoint(tmp_path, net, step=1, extra={"x": torch.ones(1)})
    assert not list(tmp_path.iterdir())


def test_states_that_are_no_tensor_or_no_known_dtype_are_refused(tmp_path):
    class Odd(torch.nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(ValueError, match="_extra_state is a dict"):
        save_checkpoint(tmp_path, Odd(2, 2), step=1)
    net = torch.nn.Linear(2, 2)
    net.register_buffer("z", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"z has dtype=torch\.complex64"):
        save_checkpoint(tmp_path, net, step=1)
    assert latest_checkpoint(tmp_path) is None


def test_training_may_go_on_while_a_save_is_written(tmp_path, monkeypatch):
    import threading

    model = make_model("llama")
    before, held = whole(model.state_dict()), threading.Event()
    wait = lambda point: point == "before writing" and held.wait(20)
    monkeypatch.setattr(folders_file, "reached", wait)
    pending = async_save(tmp_path, model, step=1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert not pending.done() and latest_checkpoint(tmp_path) is None
    held.set()
    assert pending.result() == latest_checkpoint(tmp_path) and pending.done()
    assert 0 < pending.stall < 20
    load_checkpoint(tmp_path, model)
    assert equal(before, model.state_dict())


def test_a_failed_background_save_is_told_at_the_result_or_the_next_save(
    tmp_path, monkeypatch
):
    net = torch.nn.Linear(2, 2)
    good = save_checkpoint(tmp_path, net, step=1)

    def fail(point):
        if point == "within a file":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders_file, "reached", fail)
    pending = async_save(tmp_path, net, step=2)
    with pytest.raises(RuntimeError, match=r"weight could not be written \(No space"):
        pending.result()
    async_save(tmp_path, net, step=3)
    with pytest.raises(RuntimeError, match="No space"):
        save_checkpoint(tmp_path, net, step=4)
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) == good
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
    save_checkpoint(tmp_path, net, step=5)
    assert len(list(tmp_path.iterdir())) == 2


def test_config_json_is_that_of_the_hub(tmp_path):
    from minllama.architecture.weights_config import read_config

    path = save_checkpoint(tmp_path, make_model("qwen3"), step=1)
    config = read_config(path)
    assert config == tiny_config(head_dim=12, model_type="qwen3")


def test_a_save_in_the_background_outlives_the_program(tmp_path):
    """Nobody asked for its result: it is in force all the same."""
    script = (
        "import sys\nfrom minllama import MinimalLlama\n"
        "from minllama.dist_checkpoint import async_save\n"
        "model = MinimalLlama.from_pretrained('stories')\n"
        "async_save(sys.argv[1], model, step=3)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr
    assert latest_checkpoint(tmp_path).name == "step-00000003"
