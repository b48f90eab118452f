"""The training loop: a model, an optimizer, batches, and hooks.

    loss -> gradients -> clip -> step -> schedule, and then whoever wants to look

It knows nothing of devices, adapters, precision of storage or processes: what is
trained is what has `requires_grad`, where it runs is where its parameters are, what
other processes add is asked of a `Team`, and the rest (printing, curves, checkpoints)
are hooks, called with the `Run` after each step.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minllama.architecture.data import IGNORE, Batch


class Batches(Protocol):
    """Where batches come from, and can come from again: see `data.PackedBatches`."""

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


class Team:
    """What the loop asks of the processes that share a step. Here there is one.

    Gradients of a shared step arrive averaged over `parts`, as every data-parallel
    engine leaves them. The chapter dist_run answers for many processes.
    """

    parts = 1  # processes that see rows of their own

    def sum(self, x: Tensor) -> Tensor:
        """A number added up over the parts."""
        return x

    def exchange(self, model: nn.Module, now: bool) -> None:
        """Say whether the next backward pass is the last of its step."""

    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        """Scale all gradients down to `max_norm`; return their norm before, 0-d."""
        return nn.utils.clip_grad_norm_(parameters, max_norm)


@dataclass
class Run:
    """A training run: its parts, and what the last step was."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Batches
    steps: int  # of the whole run
    step: int = 0  # done so far
    loss: float = math.nan  # mean over the targets of the last step, nats
    grad_norm: float = math.nan  # before clipping
    lr: float = 0.0
    tokens: int = 0  # targets learned from so far, by all processes
    seconds: float = 0.0  # of the last step
    skipped: int = 0  # steps in a row that were not finite


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Summed cross-entropy of a packed batch in nats, 0-d, in float32 or wider."""
    logits = model(batch.tokens, layout=batch.layout)  # (B, T, V)
    return F.cross_entropy(
        logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
        batch.targets.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
    )


def warmup_cosine(
    steps: int, warmup: int, floor: float = 0.1
) -> Callable[[int], float]:
    """Step -> share of the peak rate: a line up, then half a cosine down to `floor`.

    Example:
        >>> rate = warmup_cosine(steps=100, warmup=10, floor=0.0)
        >>> [round(rate(step), 2) for step in (0, 9, 55, 100)]
        [0.1, 1.0, 0.5, 0.0]

    Raises:
        ValueError: the warm-up is longer than the run.
    """
    if not 0 <= warmup <= steps:
        raise ValueError(f"warmup={warmup} must lie within the run of steps={steps}.")

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2

    return share


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    steps: int,
    schedule: Callable[[int], float] | None = None,
    loss: Callable[[nn.Module, Batch], Tensor] = next_token_loss,
    accumulate: int = 1,
    max_norm: float | None = 1.0,
    autocast: torch.dtype | None = None,
    hooks: tuple[Callable[[Run], None], ...] = (),
    run: Run | None = None,
    team: Team | None = None,
    max_skipped: int = 0,
) -> Run:
    """Train in place until `steps` optimizer steps are done.

    Args:
        model: trained where it stands; put in training mode, left in evaluation mode.
        optimizer: over the parameters that train; its present rates are the peak.
        batches: an iterator; `accumulate` of them make a step.
        steps: of the whole run, those of a resumed part included.
        schedule: step (from 0) -> share of the peak rate. None: constant.
        loss: (model, batch) -> summed loss over the batch's targets, in nats. The
            gradient is of the mean over all targets of a step, so that accumulating
            two batches of unequal padding equals one batch of both.
        accumulate: batches per step.
        max_norm: gradients are scaled down to this norm; None: never.
        autocast: dtype of matrix products (torch.bfloat16), or None.
        hooks: called with the `Run` after every step.
        run: a run to go on with, its state loaded; None: a new one.
        team: the processes that share each step; None: this one alone.
        max_skipped: steps in a row that may be passed over because their loss or
            gradient is not finite: they count, and change nothing.

    Raises:
        ValueError: numbers that make no step.
        RuntimeError: the loss or the gradient is not finite, more than `max_skipped`
            times in a row; nothing was updated.
    """
    if steps < 1 or accumulate < 1:
        raise ValueError(
            f"steps={steps} and accumulate={accumulate} must be at least 1."
        )
    run = run or Run(model, optimizer, batches, steps)
    team = team or Team()
    run.steps = steps
    for group in optimizer.param_groups:
        group.setdefault("peak_lr", group["lr"])
    device = next(model.parameters()).device
    optimizer.zero_grad(set_to_none=True)  # of whatever ran before
    model.train()
    while run.step < steps:
        start = time.perf_counter()
        _set_rate(run, schedule)
        micro = [next(batches).to(device) for _ in range(accumulate)]
        count = team.sum(torch.stack([batch.counted() for batch in micro]).sum())
        losses = []
        for index, batch in enumerate(micro, start=1):
            team.exchange(model, now=index == len(micro))
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                part = loss(model, batch) / count  # of the mean over all parts' targets
            (part * team.parts).backward()
            losses.append(part.detach())
        total = team.sum(torch.stack(losses).sum())
        _step(run, total, max_norm, team, max_skipped)
        run.tokens += int(count)
        run.seconds = time.perf_counter() - start
        for hook in hooks:
            hook(run)
    model.eval()
    return run


def _set_rate(run: Run, schedule: Callable[[int], float] | None) -> None:
    share = 1.0 if schedule is None else schedule(run.step)
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share
    run.lr = run.optimizer.param_groups[0]["lr"]


def _step(
    run: Run, total: Tensor, max_norm: float | None, team: Team, max_skipped: int
) -> None:
    """Clip and update; a step that is not finite does no harm, and may stop the run."""
    trained = [p for p in run.model.parameters() if p.grad is not None]
    limit = math.inf if max_norm is None else max_norm
    norm = team.clip(trained, limit)
    run.loss, run.grad_norm = torch.stack([total, norm.to(total)]).tolist()  # one wait
    if math.isfinite(run.loss) and math.isfinite(run.grad_norm):
        run.optimizer.step()
        run.skipped = 0
    else:
        run.skipped += 1
        if run.skipped > max_skipped:
            raise RuntimeError(
                f"step {run.step + 1}: loss={run.loss}, gradient norm={run.grad_norm}, "
                f"{run.skipped} in a row; nothing was updated. Lower the rate, or go "
                "on from the last checkpoint."
            )
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
