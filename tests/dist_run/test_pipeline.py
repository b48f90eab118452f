"""Pipeline parallel: loss and gradients of one process, whatever the schedule."""

import pytest
import torch
import torch.distributed as dist

from minllama.architecture.data import PackedBatches
from minllama.architecture.train import next_token_loss
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


def build(kind: str, layers: int, dtype: str = "float64"):
    torch.manual_seed(0)
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
    ):
        with pytest.raises(ValueError) as error:
            wrong()
        said.append(str(error.value))
    return said


def work(names: list[str], steps: int) -> dict:
    found = {name: fit(*CASES[name], "float64", steps) for name in names}
    if dist.get_world_size() == 2:
        found["float32"] = fit(*CASES["1f1b, tied"], "float32", steps)
        found["refused"] = refusals()
    return found


@pytest.fixture(scope="module")
def pair() -> list[dict]:
    return launch(work, 2, list(CASES), 20)


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
             "microbatches=3 are", "microbatches=1 are", "8 rows"]  # fmt: skip
    for said, word in zip(pair[0]["refused"], words, strict=True):
        assert word in said


def test_a_foreign_layer_hands_on():
    x = torch.randn(2, 3)
    assert HandOn()(x, None) is x and HandOn().new_cache(1, 2) is None
    assert bubble(1, 8) == 0.0 and bubble(4, 8, 2) < bubble(4, 8)
