"""Data parallel by hand: every process holds all, sees rows of its own, averages.

    backward   block 3 | block 2 | block 1 | block 0 |
    network              bucket 0  | bucket 1  | bucket 2 |

The gradient of the last block is there first, long before that of the embedding. So
gradients travel in flat buckets, in reverse order of the parameters, each as soon as
its last gradient is there; only the last bucket has no computation to hide behind. One
message for each parameter would pay the latency of the network hundreds of times, one
for all would hide nothing.

Paper: Li et al. 2020, "PyTorch Distributed", arXiv:2006.15704, section 3.2.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


class Bucket:
    """Parameters whose gradients travel together, and the message while it does."""

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self.missing: set[nn.Parameter] = set()  # no gradient yet in this backward
        self.flat: Tensor | None = None
        self.work: dist.Work | None = None

    def send(self, group: dist.ProcessGroup) -> None:
        """Start to add up the gradients, and who has one: its last numbers say that."""
        first = self.parameters[0]
        has = torch.tensor([float(p.grad is not None) for p in self.parameters])
        parts = [
            torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters
        ]
        parts.append(has.to(first.device, first.dtype, non_blocking=True))
        self.flat = torch.cat([part.flatten() for part in parts])
        self.flat /= dist.get_world_size(group)
        self.work = dist.all_reduce(self.flat, group=group, async_op=True)

    def receive(self) -> None:
        """Wait, and let each `grad` be its piece of the average, without a copy.

        A parameter that no process used keeps `grad=None`: an optimizer passes it by.
        """
        assert self.work is not None and self.flat is not None
        self.work.wait()
        sizes = [p.numel() for p in self.parameters]
        *pieces, has = self.flat.split([*sizes, len(sizes)])
        for i, (p, piece) in enumerate(zip(self.parameters, pieces)):
            if p.grad is not None or has[i] > 0:  # a GPU is only asked if None
                p.grad = piece.view_as(p)
        self.work = self.flat = None


class Exchange:
    """Averages gradients at the end of a backward pass, mostly before its end."""

    def __init__(
        self, buckets: list[Bucket], group: dist.ProcessGroup, names: dict
    ) -> None:
        self.buckets, self.group, self.names = buckets, group, names
        self.now = True  # False: this backward pass only adds to the gradients
        self.sent: int | None = None  # buckets under way; None: no backward runs
        self.bucket_of = {p: bucket for bucket in buckets for p in bucket.parameters}
        for parameter in self.bucket_of:
            parameter.register_post_accumulate_grad_hook(self.arrived)

    def arrived(self, parameter: nn.Parameter) -> None:
        """Called by autograd as soon as a gradient is complete."""
        if not self.now:
            return
        if self.sent is None:
            self.sent = 0
            for bucket in self.buckets:
                bucket.missing = set(bucket.parameters)
            queue_callback(self.finish)
        bucket = self.bucket_of[parameter]
        if bucket.work is not None:
            raise RuntimeError(
                f"{self.names[parameter]} got a second gradient in one backward pass, "
                "after the first had left; checkpoint with use_reentrant=False."
            )
        bucket.missing.discard(parameter)
        while self.sent < len(self.buckets) and not self.buckets[self.sent].missing:
            self.send_next()  # never out of order: all processes send the same

    def send_next(self) -> None:
        assert self.sent is not None
        self.buckets[self.sent].send(self.group)
        self.sent += 1

    def reset(self) -> None:
        """Before a forward pass: forget a backward pass that failed on its way."""
        if self.sent is None or in_backward():
            return
        for bucket in self.buckets:
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = bucket.flat = None
        self.sent = None

    def finish(self) -> None:
        """At the end of backward: send what has unused parameters, wait for all."""
        assert self.sent is not None
        while self.sent < len(self.buckets):
            self.send_next()
        for bucket in self.buckets:
            bucket.receive()
        self.sent = None


def replicate(
    model: nn.Module,
    mesh: DeviceMesh | dist.ProcessGroup | None = None,
    bucket_mib: float = 25.0,
) -> nn.Module:
    """Data parallel, in place: the weights of rank 0, gradients averaged over all.

    Promise: with equal rows on each process, the gradients are those of one process
    that sees all rows. Every process must run the same number of backward passes.
    Freeze parameters before: those without `requires_grad` do not travel.

    Args:
        model: keeps its names, its class and its parameters.
        mesh: whose processes take part; a mesh, a group, or None: all.
        bucket_mib: MiB of gradients that travel together; 25 as in PyTorch.

    Raises:
        ValueError: nothing to train, sharded parameters, a second call, or no bucket.
    """
    if bucket_mib <= 0:
        raise ValueError(f"bucket_mib={bucket_mib} must be greater than 0.")
    names = {p: name for name, p in model.named_parameters()}
    check_bare(model, names)
    group = group_of(mesh)
    first = dist.get_global_rank(group, 0)
    with torch.no_grad():
        for tensor in [*names, *model.buffers()]:
            dist.broadcast(tensor, first, group)
    buckets = fill_buckets([p for p in names if p.requires_grad], bucket_mib * 2**20)
    exchange = Exchange(buckets, group, names)
    model.register_forward_pre_hook(lambda *_: exchange.reset())
    model.gradient_exchange = exchange  # type: ignore[assignment]
    return model


def fill_buckets(parameters: list[nn.Parameter], limit: float) -> list[Bucket]:
    """Last parameter first; at most `limit` bytes of one dtype, or one parameter."""
    buckets: list[Bucket] = []
    free = 0.0
    for p in reversed(parameters):
        alike = buckets and p.dtype == buckets[-1].parameters[0].dtype
        if not alike or p.nbytes > free:
            buckets.append(Bucket())
            free = limit
        buckets[-1].parameters.append(p)
        free -= p.nbytes
    return buckets


def set_exchange(model: nn.Module, now: bool) -> None:
    """Say whether the next backward passes exchange gradients, or only add them up.

    Raises:
        ValueError: the model is not distributed by hand.
    """
    exchange = getattr(model, "gradient_exchange", None)
    if exchange is None:
        raise ValueError(
            f"{type(model).__name__} exchanges no gradients; call replicate(model) or "
            "shard_by_hand(model) first."
        )
    exchange.now = now


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Backward passes within add to the gradients of this process alone.

    Example: three micro-batches that communicate once.

        with no_sync(model):
            loss(model, first).backward()
            loss(model, second).backward()
        loss(model, third).backward()
    """
    set_exchange(model, False)
    try:
        yield
    finally:
        set_exchange(model, True)


def group_of(mesh: DeviceMesh | dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The processes of a mesh with one axis that is longer than 1, of a group, or all.

    Raises:
        ValueError: no process group runs, or two axes of the mesh are longer than 1.
    """
    if not dist.is_initialized():
        raise ValueError("no process group runs; call init_mesh() first.")
    if mesh is None:
        return dist.group.WORLD  # type: ignore[return-value]
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    long = [axis for axis in range(mesh.ndim) if mesh.size(axis) > 1]
    if len(long) > 1:
        raise ValueError(
            f"mesh of shape {tuple(mesh.shape)} divides the work in {len(long)} ways; "
            'give one of its axes, mesh["shard"].'
        )
    return mesh.get_group(long[0] if long else 0)


def check_bare(model: nn.Module, names: dict[nn.Parameter, str]) -> None:
    """Refuse a model that is already distributed, or that has nothing to train.

    Raises:
        ValueError: see above.
    """
    if getattr(model, "gradient_exchange", None) is not None:
        raise ValueError(
            f"{type(model).__name__} is already distributed by hand; do it once."
        )
    for parameter, name in names.items():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"{name} is a DTensor, {tuple(parameter.placements)}; what fully_shard "
                "or tensor_parallel divided is not divided by hand again."
            )
    if not any(parameter.requires_grad for parameter in names):
        raise ValueError(
            f"no parameter of {type(model).__name__} has requires_grad=True; there are "
            "no gradients to exchange."
        )


def in_backward() -> bool:
    """Whether this is called by autograd, from within a backward pass."""
    return torch._C._current_graph_task_id() != -1


def queue_callback(function) -> None:
    """Have `function` called at the end of the backward pass that runs now."""
    torch.autograd.Variable._execution_engine.queue_callback(function)  # type: ignore[attr-defined]
