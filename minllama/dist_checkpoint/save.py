"""Saving: plan, stage, write, commit.

    plan     who writes which piece; what several ranks hold is written by one of them
    stage    (async_save only) copy those pieces to host memory; then training goes on
    write    each rank its own files, hashed on the way, on the disk when it is done
    commit   rank 0: the manifest of all files, then the rename (folders.py)

The plan is PyTorch's (torch.distributed.checkpoint), the files are not: its format has
an index that is a pickle, and nothing that tells a damaged file from a whole one.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from minllama.architecture.config import LlamaConfig
from minllama.architecture.train import Run
from minllama.dist_checkpoint.background import (
    PendingSave,
    settle_pending,
    stage,
    start,
)
from minllama.dist_checkpoint.contents import (
    check_json,
    model_tensors,
    rng_tensors,
    unwrap,
)
from minllama.dist_checkpoint.optimizer_state import (
    merge_contents,
    optimizer_contents,
)
from minllama.dist_checkpoint.pieces import local_box, local_tensor
from minllama.dist_checkpoint.ranks import Ranks
from minllama.dist_checkpoint.write import Job, write_and_commit


def save_checkpoint(
    folder: str | Path,
    model: nn.Module | Run,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int | None = None,
    batches=None,
    extra: dict | None = None,
    parts: str | Iterable[str] | None = None,
    rng: bool = True,
    keep: int | None = None,
) -> Path:
    """Save what a run needs to go on, as `folder/step-…`; call it in every process.

    Args:
        folder: of this run's checkpoints; is made.
        model: sharded or not, in any way; or a `Run`, which brings the rest.
        optimizer: its state is kept by the names of the parameters. None: the model
            alone.
        step: done so far; names the checkpoint.
        batches: anything with a `state_dict()` of JSON's types, alike in all ranks.
        extra: more to keep, of JSON's types: a scheduler's state, notes.
        parts: of the model. None: all. "trainable": what requires_grad (an adapter
            without its base). Else patterns of names, as `("layers.0.*", "norm.*")`.
        rng: keep every process's random numbers, to go on bit for bit.
        keep: remove all but so many of the newest, once this one is in force.

    Returns:
        The folder of this checkpoint.

    Raises:
        ValueError: an argument is wrong, or holds what cannot be kept.
        RuntimeError: the disk is full or fails. The checkpoints before are untouched.
            Also if the `async_save` before failed: that is told here.
    """
    settle_pending()
    job = prepare(folder, model, optimizer, step, batches, extra, parts, rng, keep)
    return write_and_commit(job)


def async_save(
    folder: str | Path,
    model: nn.Module | Run,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int | None = None,
    batches=None,
    extra: dict | None = None,
    parts: str | Iterable[str] | None = None,
    rng: bool = True,
    keep: int | None = None,
) -> PendingSave:
    """As `save_checkpoint`, but training goes on once all is copied to host memory.

    The weights may change as soon as this returns. One save at a time: a second waits
    for the first, and raises its error if it failed. Call `.result()` on the last one
    before the process ends. Host memory: this rank's share of the checkpoint.

    Returns:
        `.result()` waits and gives the folder, `.stall` is how long training waited.

    Raises:
        ValueError: as `save_checkpoint`.
        RuntimeError: as `save_checkpoint`.
    """
    begun = time.perf_counter()
    settle_pending()
    job = prepare(folder, model, optimizer, step, batches, extra, parts, rng, keep)
    job.ranks.together(lambda: stage(job))
    return start(job, time.perf_counter() - begun)


def prepare(
    folder, model, optimizer, step, batches, extra, parts, rng, keep
) -> Job:  # fmt: skip
    """Look at everything and refuse what cannot be saved, before a byte is written."""
    ranks = Ranks()

    def look() -> tuple[_State, dict[str, Tensor], dict]:
        state = _State.of(model, optimizer, step, batches)
        if state.step < 0 or (keep is not None and keep < 1):
            raise ValueError(f"step={state.step}, keep={keep}: at least 0, at least 1.")
        return state, *_contents(state, ranks, extra, parts, rng)

    state, tensors, numbers = ranks.together(look)
    optimizers = ranks.gather(lambda: numbers.get("optimizer"))
    if state.optimizer is not None:
        numbers["optimizer"] = merge_contents([part for part in optimizers if part])
    bare = unwrap(state.model)
    config = getattr(bare, "config", None)
    return Job(
        folder=Path(folder),
        ranks=ranks,
        pieces=_plan(tensors, ranks),
        numbers=numbers,
        config=config if isinstance(config, LlamaConfig) else None,
        model_type=getattr(bare, "model_type", None),
        dtype=next(iter(tensors.values())).dtype,
        keep=keep,
    )


def _contents(
    state: "_State", ranks: Ranks, extra: dict | None, parts, rng: bool
) -> tuple[dict[str, Tensor], dict]:
    """The tensors to save by name, and the numbers for the manifest."""
    chosen = model_tensors(state.model, parts)
    tensors = {f"model.{name}": tensor for name, tensor in chosen.items()}
    numbers: dict = {"step": state.step, "tokens": state.tokens, "world": ranks.world}
    numbers["extra"] = check_json("extra", extra or {})
    if state.batches is not None:
        numbers["batches"] = check_json("batches.state_dict()", state.batches)
    if state.optimizer is not None:
        states, numbers["optimizer"] = optimizer_contents(
            state.model, state.optimizer, chosen
        )
        tensors |= {f"optimizer.{name}": tensor for name, tensor in states.items()}
    if rng:
        device = next(iter(chosen.values())).device
        states = rng_tensors(ranks.rank, device)
        tensors |= {f"rng.{name}": tensor for name, tensor in states.items()}
    for name, tensor in tensors.items():
        local_box(name, tensor)  # refuses what is no box
    return tensors, numbers


@dataclass
class _State:
    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    step: int
    tokens: int
    batches: dict | None

    @classmethod
    def of(cls, model, optimizer, step, batches) -> "_State":
        """From the arguments, or from a `Run` that holds them."""
        tokens = 0
        if isinstance(model, Run):
            run = model
            model, optimizer, tokens = run.model, run.optimizer, run.tokens
            step = run.step if step is None else step
            batches = run.batches
        if step is None:
            raise ValueError(
                "step=None; say how many steps are done: it names the save."
            )
        place = None if batches is None else batches.state_dict()
        return cls(model, optimizer, step, tokens, place)


def _plan(tensors: dict[str, Tensor], ranks: Ranks) -> list:
    """(name, whole shape, offset, local tensor) of each piece that this rank writes."""
    planner = DefaultSavePlanner(
        flatten_state_dict=False, flatten_sharded_tensors=False
    )
    planner.set_up_planner(tensors, is_coordinator=ranks.rank == 0)
    plans = ranks.gather(planner.create_local_plan)
    shared, _ = planner.create_global_plan(plans)  # the same in every rank
    pieces = []
    for item in planner.finish_plan(shared[ranks.rank]).items:
        name = item.index.fqn
        tensor = tensors[name]
        local = local_tensor(tensor)
        if local.numel() or not tensor.numel():  # an empty piece is left out
            offset = [part.start for part in local_box(name, tensor)]
            pieces.append((name, tuple(tensor.shape), offset, local))
    return pieces
