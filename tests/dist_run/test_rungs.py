"""The promise of chapter 3: the sharded loss is the loss of a single process."""

import pytest
import torch

from minllama.dist_run import launch
from tests.dist_run import rungs

TWO = {
    "data parallel": {"replicate": 2, "ddp": True},
    "data parallel, accumulated": {"replicate": 2, "ddp": True, "accumulate": 2},
    "fsdp": {"shard": 2},
    "fsdp by hand": {"shard": 2, "by_hand": True},
    "fsdp, kept": {"shard": 2, "reshard": False, "prefetch": 2},
    "fsdp, accumulated": {"shard": 2, "accumulate": 2},
    "fsdp, checkpointed": {"shard": 2, "checkpointing": "full"},
    "fsdp, selective": {"shard": 2, "checkpointing": "selective"},
    "fsdp, frozen parts": {"shard": 2, "frozen": True},
    "tensor": {"tensor": 2, "sequence": False},
    "tensor, sequence": {"tensor": 2},
    "tensor, sequence, loss": {"tensor": 2, "loss_parallel": True},
    "tensor, frozen parts": {"tensor": 2, "frozen": True},
}
FOUR = {
    "data parallel": {"replicate": 4, "ddp": True},
    "fsdp": {"shard": 4},
    "hsdp": {"replicate": 2, "shard": 2},
    "fsdp, tensor": {"shard": 2, "tensor": 2},
    "all": {
        "shard": 2,
        "tensor": 2,
        "loss_parallel": True,
        "checkpointing": "full",
        "accumulate": 2,
        "frozen": True,
    },
}


def gaps(world: int, ladder: dict, kinds: list[str], dtype: str) -> dict:
    """Largest relative difference of a loss, by rung and model."""
    jobs = [(rung, kind, dtype) for kind in kinds for rung in ladder.values()]
    names = [f"{kind}: {name}" for kind in kinds for name in ladder]
    there = launch(rungs.curves, world, jobs)
    found = {}
    for index, (name, job) in enumerate(zip(names, jobs)):
        here = torch.tensor(rungs.single(*job), dtype=torch.float64)
        for ranks in there:
            other = torch.tensor(ranks[index], dtype=torch.float64)
            found[name] = float((other / here - 1).abs().max())
    return found


@pytest.mark.parametrize("world, ladder", [(2, TWO), (4, FOUR)], ids=["2", "4"])
def test_the_sharded_loss_is_the_loss_of_a_single_process(world, ladder):
    found = gaps(world, ladder, ["llama-tied"], "float64")
    assert max(found.values()) <= 1e-10, found


def test_every_model_and_a_subclass_in_float32():
    some = {name: TWO[name] for name in ("fsdp", "tensor, sequence, loss")}
    kinds = ["llama31", "mistral", "qwen2-tied", "qwen3", "gated"]
    found = gaps(2, some, kinds, "float32")
    print(found)
    assert max(found.values()) <= 1e-6, found


def test_a_planted_mistake_shows():
    """Half the rows seen twice: what a wrong rank would do."""
    right = torch.tensor(rungs.single({}, "llama", "float64", 3))
    data = rungs.batches(rank=0, world=2)
    wrong = torch.tensor(rungs._train(rungs.build("llama", "float64"), data, {}, 3))
    assert (wrong / right - 1).abs().max() > 1e-4
