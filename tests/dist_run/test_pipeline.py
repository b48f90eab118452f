"""Pipeline parallel: loss and gradients of one process, whatever the schedule."""

import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist

from minllama.architecture.data import PackedBatches
from minllama.architecture.optim import make_adamw
from minllama.architecture.train import next_token_loss
from minllama.dist_checkpoint import (
    allocate,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from minllama.dist_run.launch import launch
from minllama.dist_run.pipeline import HandOn, bubble, pipeline
from tests.conftest import make_model
from tests.dist_run.test_data_parallel import documents

CASES = {  # kind, schedule, layers
    "gpipe": ("llama", "gpipe", 5),
    "1f1b, tied": ("qwen3-tied", "1f1b", 4),
    "interleaved": ("gated", "interleaved", 9),
    "interleaved, tied": ("mistral-tied", "interleaved", 8),
}
ROWS = 8


def build(kind: str, layers: int, dtype: str = "float64", seed: int = 0):
    torch.manual_seed(seed)
    name, _, tied = kind.partition("-")
    model = make_model(name, vocab_size=61, n_layers=layers, tie_embeddings=bool(tied))
    return model.to(getattr(torch, dtype))


def batches():
    return PackedBatches(documents(), ROWS, 21, 1)


def fit(kind: str, schedule: str, layers: int, dtype: str, steps: int) -> dict:
    """Train over all processes: the losses, and what is held here."""
    piped = pipeline(build(kind, layers, dtype), None, schedule, microbatches=4)
    adamw = torch.optim.AdamW(piped.model.parameters(), lr=3e-3)
    data, losses = batches(), []
    gradients = 0.0
    reference = build(kind, layers, dtype)
    for step in range(steps):
        batch = next(data)
        losses.append(piped.step(batch).item())
        if step == 0:
            (next_token_loss(reference, batch) / batch.counted()).backward()
            gradients = largest(piped.model, reference)
        adamw.step()
        adamw.zero_grad()
    names = [name for name, _ in piped.model.named_parameters()]
    return {"losses": losses, "gradients": gradients, "names": names}


def largest(model, reference) -> float:
    """Largest relative difference of a gradient held here."""
    there = {n: p.grad for n, p in reference.named_parameters(remove_duplicate=False)}
    return max(
        float((p.grad - there[n]).abs().max() / there[n].abs().max())
        for n, p in model.named_parameters()
    )


def alone(kind: str, schedule: str, layers: int, dtype: str, steps: int) -> list[float]:
    model, data, losses = build(kind, layers, dtype), batches(), []
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = next(data)
        loss = next_token_loss(model, batch) / batch.counted()
        loss.backward()
        losses.append(loss.item())
        adamw.step()
        adamw.zero_grad()
    return losses


def refusals() -> list[str]:
    model = build("llama", 4)
    said = []
    for wrong in (
        lambda: pipeline(model, schedule="dual"),
        lambda: pipeline(model, stages=2),
        lambda: pipeline(build("llama", 2), schedule="interleaved"),
        lambda: pipeline(model, schedule="interleaved", microbatches=3),
        lambda: pipeline(model, microbatches=1),
        lambda: pipeline(model, microbatches=3).step(next(batches())),
        lambda: load_weights(pipeline(build("llama", 4)).model, "stories"),
    ):
        with pytest.raises(ValueError) as error:
            wrong()
        said.append(str(error.value))
    return said


def in_stages(kind: str, schedule: str, layers: int, meta: bool) -> tuple:
    """A model over all processes, its optimizer, and what runs a batch."""
    model = build(kind, layers)
    if meta:
        with torch.device("meta"):
            model = type(model)(model.config).double()
    piped = pipeline(model, None, schedule, microbatches=4)
    return allocate(piped.model), make_adamw(piped.model, 3e-3), piped.step


def in_one(kind: str, layers: int) -> tuple:
    """As `in_stages`, all of it here, with other weights."""
    model = build(kind, layers, seed=1)

    def step(batch):
        loss = next_token_loss(model, batch) / batch.counted()
        loss.backward()
        return loss

    return model, make_adamw(model, 3e-3), step


def go_on(optimizer, step, first: int, last: int) -> list[float]:
    losses = []
    for batch in itertools.islice(batches(), first, last):
        losses.append(step(batch).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def through_a_checkpoint(folder: str, kind: str, schedule: str, layers: int) -> dict:
    """Steps 2 and 3: gone on; and after loading what stages and one process saved."""
    makers = {
        "stages": partial(in_stages, kind, schedule, layers, meta=True),
        "one": partial(in_one, kind, layers),
    }
    model, adamw, step = in_stages(kind, schedule, layers, meta=False)
    go_on(adamw, step, 0, 2)
    save_checkpoint(folder, model, adamw, step=2)
    found = {"gone on": go_on(adamw, step, 2, 4)}
    for name, make in makers.items():
        model, adamw, step = make()
        load_checkpoint(folder, model, adamw)
        found[name] = go_on(adamw, step, 2, 3)
        save_checkpoint(f"{folder}/{name}", model, adamw, step=3)
    for name, other in (("stages", "one"), ("one", "stages")):
        model, adamw, step = makers[name]()
        load_checkpoint(f"{folder}/{other}", model, adamw)
        found[name] += go_on(adamw, step, 3, 4)
    return found


def work(names: list[str], steps: int, folder: str | None = None) -> dict:
    found = {name: fit(*CASES[name], "float64", steps) for name in names}
    if dist.get_world_size() == 2:
        found["float32"] = fit(*CASES["1f1b, tied"], "float32", steps)
        found["refused"] = refusals()
    if folder is not None:
        found["checkpoint"] = {
            name: through_a_checkpoint(f"{folder}/{name}", *CASES[name])
            for name in ("1f1b, tied", "interleaved")
        }
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[dict]:
    return launch(work, 2, list(CASES), 20, str(tmp_path_factory.mktemp("pair")))


def quartet() -> list[dict]:
    from tests.dist_run import test_context

    return [rank["pipeline"] for rank in test_context.quartet()]


def gap(there: list[float], here: list[float]) -> float:
    a, b = (torch.tensor(x, dtype=torch.float64) for x in (there, here))
    return float((a / b - 1).abs().max())


@pytest.mark.parametrize("name", [*CASES, "float32"])
def test_loss_and_gradients_are_those_of_one_process(pair, name):
    dtype, case = ("float32", "1f1b, tied") if name == "float32" else ("float64", name)
    here = alone(*CASES[case], dtype, 20)
    for rank in pair:
        assert len(rank[name]["losses"]) == 20
        assert gap(rank[name]["losses"], here) <= (
            1e-10 if dtype == "float64" else 1e-6
        )
        assert rank[name]["gradients"] <= (1e-11 if dtype == "float64" else 1e-4)


def test_four_processes_too():
    for rank in quartet():
        for name, found in rank.items():
            assert gap(found["losses"], alone(*CASES[name], "float64", 3)) <= 1e-10
            assert found["gradients"] <= 1e-11


def test_stages_save_for_one_process_and_load_from_it(pair):
    for rank in pair:
        for losses in rank["checkpoint"].values():
            assert gap(losses["gone on"], losses["stages"]) <= 1e-12
            assert gap(losses["gone on"], losses["one"]) <= 1e-10


def test_each_layer_lies_in_one_process_under_its_own_name(pair):
    for ranks in (pair, quartet()):
        kind, _, layers = CASES["interleaved"]
        names = [n for n, _ in build(kind, layers).named_parameters()]
        held = [n for rank in ranks for n in rank["interleaved"]["names"]]
        assert sorted(held) == sorted(names)
    first = {n.split(".")[1] for n in pair[0]["interleaved"]["names"] if "layers" in n}
    assert first == {"0", "1", "4", "5"}  # stages 0 and 2 of 4


def test_what_no_schedule_can_run_is_refused(pair):
    words = ["schedule='dual'", "stages=2", "2 layers do not fill 4 stages",
             "microbatches=3 are", "microbatches=1 are", "8 rows",
             "split('stories', out, world) once"]  # fmt: skip
    for said, word in zip(pair[0]["refused"], words, strict=True):
        assert word in said


def test_a_foreign_layer_hands_on():
    x = torch.randn(2, 3)
    assert HandOn()(x, None) is x and HandOn().new_cache(1, 2) is None
    assert bubble(1, 8) == 0.0 and bubble(4, 8, 2) < bubble(4, 8)
