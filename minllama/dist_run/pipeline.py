"""Pipeline parallel: layers over processes, and small batches that follow each other.

    process 0   F0 F1 F2 F3 .  .  .  B0 .  B1 …      F, B: forward, backward
    process 1      F0 F1 F2 .  B0 F3 B1 …            0 1 2 3: microbatches

Only activations travel, from one process to the next; that is little, so stages may sit
on different hosts. The price is the bubble: at the begin and the end processes wait.
With W processes and M microbatches they do so for (W - 1) / (M + W - 1) of a step, and
if each holds v thinner stages in turn (interleaved), for (W - 1) / (v M + W - 1).
GPipe runs all forward passes first and keeps M activations; 1F1B keeps at most W.

PyTorch's schedules run it. What is ours is the cut: a stage is the model itself, with
modules that hand on what they get in place of foreign layers. So names stay, and
subclasses too.

Papers: Huang et al. 2018, GPipe, arXiv:1811.06965 · Narayanan et al. 2021, 2104.04473,
section 2.2.
"""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from minllama.architecture.data import IGNORE, Batch
from minllama.architecture.layout import packed
from minllama.dist_run.data_parallel import group_of

SCHEDULES = {  # our word -> the class of torch.distributed.pipelining
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
}

ENDS = ("embed_tokens", "lm_head")  # share a weight if tied


class HandOn(nn.Module):
    """A layer of another stage: gives what it gets."""

    def forward(self, x: Tensor, layout=None, cache=None) -> Tensor:
        return x

    def new_cache(self, batch_size: int, max_seq_len: int) -> None:
        return None


class Stage(nn.Module):
    """Some layers of a model. Tokens (B, T) or (B, T, D) -> (B, T, D) or logits."""

    def __init__(self, model: nn.Module, index: int, of: int) -> None:
        super().__init__()
        self.model, self.is_first = (
            keep_layers(copy.copy(model), {index}, of),
            index == 0,
        )

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        layout = packed(positions)
        if self.is_first:
            return self.model(x, layout=layout)
        return self.model(None, layout=layout, embeds=x)


def keep_layers(model: nn.Module, stages: set[int], of: int) -> nn.Module:
    """Keep what some of the stages need; names stay, other layers hand on."""
    n = len(model.layers)  # type: ignore[arg-type]
    kept = {i for s in stages for i in range(n * s // of, n * (s + 1) // of)}
    model._modules = dict(model._modules)  # a copy shares its modules, not their list
    layers = (layer if i in kept else HandOn() for i, layer in enumerate(model.layers))  # type: ignore[arg-type]
    model.layers = nn.ModuleList(layers)
    if 0 not in stages:
        model.embed_tokens = nn.Identity()
    if of - 1 not in stages:
        model.norm, model.lm_head = nn.Identity(), nn.Identity()
    return model


def bubble(processes: int, microbatches: int, stages: int = 1) -> float:
    """Share of a step in which a process waits, if all layers take equally long.

    Example:
        >>> round(bubble(4, 4), 2), round(bubble(4, 16), 2), round(bubble(4, 16, 2), 2)
        (0.43, 0.16, 0.09)
    """
    return (processes - 1) / (stages * microbatches + processes - 1)


class Pipeline:
    """A model whose layers lie over processes; made by `pipeline`.

    `model` holds what this process keeps: give its parameters to an optimizer, and it
    to `save_checkpoint` and `load_checkpoint`; on the meta device, `allocate` it first.
    """

    def __init__(
        self,
        model: nn.Module,
        group: dist.ProcessGroup,
        schedule: str,
        microbatches: int,
        stages: int,
    ) -> None:
        from torch.distributed import pipelining  # a second that others need not wait

        self.group, self.microbatches, self.count = group, microbatches, 1
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        of = world * stages
        mine = [rank + world * turn for turn in range(stages)]
        self.is_first, self.is_last = rank == 0, rank == world - 1
        self.last = dist.get_global_rank(group, world - 1)
        ends = [dist.get_global_rank(group, 0), self.last]
        weights = [getattr(model.get_submodule(n), "weight", None) for n in ENDS]
        tied = world > 1 and weights[0] is not None and weights[0] is weights[1]
        self.ends = dist.new_group(ends) if tied else None
        device = next(model.parameters()).device
        if device.type == "meta":  # the stages run where the weights will be
            over_nccl = dist.get_backend(group) == "nccl"
            here = torch.cuda.current_device() if over_nccl else None
            device = torch.device("cpu" if here is None else f"cuda:{here}")
        self.stages = [
            pipelining.PipelineStage(
                Stage(model, index, of), index, of, device, group=group
            )
            for index in mine
        ]
        self.model = keep_layers(model, set(mine), of)
        one = self.stages[0] if schedule != "interleaved" else self.stages
        self.schedule = getattr(pipelining, SCHEDULES[schedule])(
            one,  # type: ignore[arg-type]
            microbatches,
            loss_fn=self._loss,
            scale_grads=False,
        )

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        logits, targets = logits.flatten(0, 1).to(wide), targets.flatten()
        nats = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        return nats / self.count

    def step(self, batch: Batch, count: int | None = None) -> Tensor:
        """Forward and backward pass of a batch; its loss in all processes, 0-d.

        Gradients are added to the parameters' `grad`.

        Args:
            batch: the same in all processes; packed documents are fine.
            count: targets that the loss is the mean of; None: those of the batch.

        Raises:
            ValueError: rows that do not make `microbatches` equal parts.
        """
        rows = batch.tokens.size(0)
        if rows % self.microbatches:
            raise ValueError(
                f"{rows} rows do not make microbatches={self.microbatches} equal parts;"
                " choose a batch size that is a multiple."
            )
        self.count = int(batch.counted()) if count is None else count
        inputs = (batch.tokens,) if self.is_first else ()
        losses: list[Tensor] = []
        ending = {"target": batch.targets, "losses": losses} if self.is_last else {}
        self.schedule.step(*inputs, positions=batch.positions, **ending)
        self._add_tied()
        device = batch.tokens.device
        total = (
            torch.stack(losses).sum()
            if self.is_last
            else torch.zeros((), device=device)
        )
        total = total.detach().double()
        dist.broadcast(total, self.last, self.group)
        return total

    def _add_tied(self) -> None:
        """A tied weight lies at both ends, and has the gradient of both."""
        if self.ends is None or not (self.is_first or self.is_last):
            return
        end = self.model.embed_tokens if self.is_first else self.model.lm_head
        grad = end.weight.grad  # type: ignore[union-attr]
        if grad is not None:
            dist.all_reduce(grad, group=self.ends)


def pipeline(
    model: nn.Module,
    mesh: DeviceMesh | dist.ProcessGroup | None = None,
    schedule: str = "1f1b",
    microbatches: int = 4,
    stages: int | None = None,
) -> Pipeline:
    """Lay the layers of a model over processes; `step(batch)` runs and learns.

    Promise: loss and gradients are those of one process. `model` keeps, in place, only
    the layers of this process; names stay.

    Args:
        model: the same in all processes, or on the meta device.
        mesh: whose processes take part; a mesh, a group, or None: all.
        schedule: gpipe, 1f1b or interleaved.
        microbatches: parts of a batch that follow each other.
        stages: of each process; None: 2 if interleaved, else 1.

    Raises:
        ValueError: an unknown schedule, or numbers that it cannot run.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is none of {', '.join(SCHEDULES)}.")
    group = group_of(mesh)
    world = dist.get_world_size(group)
    stages = stages or (2 if schedule == "interleaved" else 1)
    if stages > 1 and schedule != "interleaved":
        raise ValueError(
            f"stages={stages} of each process need schedule='interleaved', not "
            f"{schedule!r}."
        )
    n = len(getattr(model, "layers", []))
    if n < world * stages:
        raise ValueError(
            f"{n} layers do not fill {world * stages} stages; use fewer processes."
        )
    least = 1 if schedule == "gpipe" else world
    if microbatches < least or (schedule == "interleaved" and microbatches % world):
        raise ValueError(
            f"microbatches={microbatches} are not enough: {schedule} on {world} "
            f"processes wants {least} or more, interleaved a multiple."
        )
    return Pipeline(model, group, schedule, microbatches, stages)
