"""What the processes of these tests run: a rung of the ladder, and the single process.

A rung is a dict: sizes of the mesh (replicate, shard, tensor) and what is done to the
model. `curve` trains it for some steps; `single` does so in one process.
"""

from functools import cache

import torch
from torch import nn

from minllama.architecture.data import Batch, PackedBatches
from minllama.architecture.hooks import Run
from minllama.architecture.optim import make_adamw
from minllama.architecture.train import train, warmup_cosine
from minllama.dist_run import (
    MeshTeam,
    checkpoint_activations,
    init_mesh,
    replicate,
    shard,
    shard_by_hand,
    tensor_parallel,
    tensor_parallel_loss,
)
from tests.conftest import make_model

STEPS = 20
ROWS, LENGTH = 8, 24
GATED = {"self_attn.gate_proj": "column"}  # what the subclass of the tests adds


def batches(rank: int = 0, world: int = 1, seed: int = 1) -> PackedBatches:
    """Documents of odd lengths: rows hold several, and some padding."""
    own = torch.Generator().manual_seed(7)
    lengths = torch.randint(3, 40, (60,), generator=own).tolist()
    documents = [torch.randint(0, 97, (n,), generator=own).numpy() for n in lengths]
    return PackedBatches(documents, ROWS, LENGTH, seed, rank, world)


def build(kind: str, dtype: str, frozen: bool = False) -> nn.Module:
    """The same weights in every process; `frozen` leaves some of each block alone."""
    torch.manual_seed(0)
    name, _, tied = kind.partition("-")
    model = make_model(name, tie_embeddings=bool(tied)).to(getattr(torch, dtype))
    if frozen:
        for name, weight in model.named_parameters():
            weight.requires_grad_("proj" in name or "post_attention" in name)
            if "k_proj" in name or "down_proj" in name:
                weight.requires_grad_(False)
    return model


def transform(model, mesh, rung: dict):
    """Apply what the rung names, in the documented order."""
    if rung.get("tensor", 1) > 1:
        plan = GATED if type(model).__name__ == "GatedLlama" else None
        tensor_parallel(
            model,
            mesh,
            sequence=rung.get("sequence", True),
            gather_logits=not rung.get("loss_parallel", False),
            plan=plan,
        )
    if "checkpointing" in rung:
        checkpoint_activations(model, rung["checkpointing"])
    if rung.get("by_hand"):
        shard_by_hand(model, mesh["shard"])
    elif rung.get("ddp"):
        replicate(model, mesh)
    elif rung.get("shard", 1) > 1 or rung.get("replicate", 1) > 1:
        shard(model, mesh, reshard=rung.get("reshard", True),
              prefetch=rung.get("prefetch", 1))  # fmt: skip
    return model


def curve(rung: dict, kind: str, dtype: str, steps: int = STEPS) -> list[float]:
    """The loss of each step, trained as the rung says."""
    axes = {axis: rung.get(axis, 1) for axis in ("replicate", "shard", "tensor")}
    mesh = init_mesh(**axes)
    team = MeshTeam(mesh)
    model = transform(build(kind, dtype, rung.get("frozen", False)), mesh, rung)
    data = batches(team.rank, team.parts)
    return _train(model, data, rung, steps, team)


def single(rung: dict, kind: str, dtype: str, steps: int = STEPS) -> list[float]:
    """The same steps in one process, nothing done to the model."""
    return _single(
        rung.get("accumulate", 1), rung.get("frozen", False), kind, dtype, steps
    )


@cache
def _single(accumulate: int, frozen: bool, kind: str, dtype: str, steps: int):
    rung = {"accumulate": accumulate}
    return _train(build(kind, dtype, frozen), batches(), rung, steps)


def _train(model, data, rung: dict, steps: int, team=None) -> list[float]:
    seen: list[float] = []

    def note(run: Run) -> None:
        seen.append(run.loss)

    how = {"loss": tensor_parallel_loss} if rung.get("loss_parallel") else {}
    train(
        model,
        make_adamw(model, 3e-3),
        data,
        steps,
        schedule=warmup_cosine(steps, 2),
        accumulate=rung.get("accumulate", 1),
        max_norm=0.5,
        hooks=(note,),
        team=team,
        **how,
    )
    return seen


def curves(jobs: list[tuple[dict, str, str]]) -> list[list[float]]:
    """Several rungs in one launch: starting processes costs more than training."""
    return [curve(*job) for job in jobs]


def one_batch() -> Batch:
    """The first batch, whole."""
    return next(batches())
