"""Fully sharded data parallel by hand: each process keeps 1 / world of the model.

    compute    block 0 | block 1 | block 2 | … | block 2 back | block 1 back | block 0 …
    network    gather 1| gather 2| …           | gather 1     | gather 0     | scatter 1
                                                              | scatter 2    |

Between steps a process holds its rows of each parameter, and the optimizer the state of
those rows. A unit (a block, the embedding, the head) is gathered before its forward
pass and freed after it, gathered again before its backward pass, and then its gradients
are averaged and scattered: each process gets those of its rows. That moves three times
the weights where plain data parallel moves two, beside the computation of a neighbour.

What looks like a trick: autograd keeps the full weights for the backward pass. They are
not thrown away, their storage is: it shrinks to 0 bytes, and later grows in place.

Papers: Rajbhandari et al. 2019, ZeRO, arXiv:1910.02054 · Zhao et al. 2023, PyTorch
FSDP, 2304.11277. Rows of each parameter instead of one flat one: as in `fully_shard`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from minllama.dist_run.data_parallel import (
    check_bare,
    group_of,
    in_backward,
    queue_callback,
)

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)  # since torch 2.13 they go by the first names


def own_rows(full: Tensor, rank: int, world: int) -> Tensor:
    """What process `rank` keeps: ceil(n / world) rows, the last ones fewer or none.

    Example:
        >>> [own_rows(torch.arange(5), rank, 4).tolist() for rank in range(4)]
        [[0, 1], [2, 3], [4], []]
    """
    rows = -(-full.size(0) // world)
    return full[rank * rows : (rank + 1) * rows]


def deal(full: Tensor, world: int) -> Tensor:
    """What each process keeps, as a row, padded with zeros. (n, …) -> (world, m)."""
    flat = full.reshape(full.size(0), -1)
    return F.pad(flat, (0, 0, 0, -full.size(0) % world)).reshape(world, -1)


def tensors_in(output) -> Iterator[Tensor]:
    """All tensors of what a module gives: a tensor, or a container of some."""
    if isinstance(output, Tensor):
        yield output
    elif is_dataclass(output):
        yield from tensors_in(vars(output))
    elif isinstance(output, tuple | list | dict):
        for part in output.values() if isinstance(output, dict) else output:
            yield from tensors_in(part)


class Slot:
    """One parameter: the rows that rest in the model, and the full one for a while."""

    def __init__(self, full: nn.Parameter, unit: "Unit") -> None:
        self.unit, self.shape = unit, full.shape
        self.places: list[tuple[nn.Module, str]] = []  # several if tied
        self.size = -(-len(full) // unit.engine.world) * full[0].numel()  # of each
        self.kind: tuple | None = None  # of `full`: dtype, device, whether it trains
        self.full: nn.Parameter | None = None
        self.buffer: Tensor | None = None  # the storage of `full`, padded

    @property
    def shard(self) -> nn.Parameter:
        """Asked of the model each time, since `to_empty` puts another one there."""
        module, name = self.places[0]
        return module._parameters[name]  # type: ignore[return-value]

    def put(self, parameter: nn.Parameter) -> None:
        for module, name in self.places:
            module._parameters[name] = parameter

    def fill(self, pieces: Tensor) -> None:
        """(world, size), what each process keeps -> the full parameter."""
        kind = (pieces.dtype, pieces.device, self.shard.requires_grad)
        if kind != self.kind:
            self.kind = kind
            with torch.inference_mode(False):  # it may generate before it trains
                padded = pieces.new_empty(pieces.numel()).view(-1, *self.shape[1:])
                self.full = nn.Parameter(padded[: self.shape[0]], kind[-1])
                self.buffer = padded.data  # writes to it do not count as changes
            if kind[-1]:
                self.full.register_post_accumulate_grad_hook(self.unit.arrived)
        assert self.buffer is not None
        self.buffer.untyped_storage().resize_(pieces.numel() * pieces.element_size())
        self.buffer.copy_(pieces.reshape(self.buffer.shape))

    def empty(self) -> None:
        assert self.buffer is not None
        self.buffer.untyped_storage().resize_(0)


@dataclass(eq=False)
class Unit:
    """Parameters that are gathered together, as modules and autograd come by."""

    engine: "Engine"
    slots: list[Slot] = field(default_factory=list)
    next: "Unit | None" = None  # in the forward pass
    previous: "Unit | None" = None  # next in the backward pass
    shards: list[nn.Parameter] = field(default_factory=list)  # while the full are there
    flying: tuple | None = None  # full parameters on their way
    in_backward: bool = False
    late: set[nn.Parameter] = field(default_factory=set)  # gradients still to come

    def prefetch(self) -> None:
        """Start to gather; what was started before the weights changed is stale."""
        version = [(id(slot.shard), slot.shard._version) for slot in self.slots]
        if self.flying is not None and self.flying[0] != version:
            self.drop()
        if self.shards or self.flying is not None:
            return
        mine = torch.cat([
            F.pad(flat := slot.shard.detach().flatten(), (0, slot.size - len(flat)))
            for slot in self.slots
        ])  # fmt: skip
        mine = mine.to(self.engine.param_dtype or mine.dtype)
        full = mine.new_empty(self.engine.world, len(mine))
        work = all_gather(full.flatten(), mine, group=self.engine.group, async_op=True)
        self.flying = version, full, mine, work

    def drop(self) -> None:
        if self.flying is not None:
            self.flying[-1].wait()
            self.flying = None

    def gather(self) -> None:
        """Put the full parameters into the model."""
        if self.shards:
            return
        self.prefetch()
        assert self.flying is not None
        _, full, _, work = self.flying
        work.wait()
        pieces = full.split([slot.size for slot in self.slots], dim=1)
        for slot, piece in zip(self.slots, pieces):
            slot.fill(piece)
        self.shards = [slot.shard for slot in self.slots]
        for slot in self.slots:
            slot.put(slot.full)  # type: ignore[arg-type]
        self.flying = None

    def free(self) -> None:
        """Put the shards back; the full parameters keep no storage."""
        for slot, shard in zip(self.slots, self.shards):
            slot.put(shard)
            slot.empty()
        self.shards = []

    def before_forward(self) -> None:
        self.engine.recover()
        self.gather()
        if self.next is not None and self.engine.ahead and not self.in_backward:
            self.next.prefetch()

    def after_forward(self, output) -> None:
        if not self.in_backward:  # where it is, a checkpoint computes it again
            self.free()
        for x in tensors_in(output):
            if x.requires_grad:
                x.register_hook(lambda _: self.before_backward())

    def before_backward(self) -> None:
        self.begin_backward()
        self.gather()
        if self.next is not None and not self.next.late:
            self.next.free()  # a frozen one, for which no gradient arrives
        if self.previous is not None and self.engine.ahead:
            self.previous.prefetch()

    def begin_backward(self) -> None:
        self.engine.begin_backward()
        if not self.in_backward:
            self.in_backward = True
            full = [slot.full for slot in self.slots if slot.full is not None]
            self.late = {parameter for parameter in full if parameter.requires_grad}

    def arrived(self, full: nn.Parameter) -> None:
        """Called by autograd as soon as a gradient is complete."""
        self.begin_backward()
        self.late.discard(full)
        if not self.late:
            self.end_backward()

    def end_backward(self) -> None:
        self.in_backward = False
        self.late.clear()
        self.free()
        if self.engine.now:
            self.engine.scatter(self)


@dataclass(eq=False)
class Engine:
    """What the units share: with whom they talk, and the gradients on their way."""

    group: dist.ProcessGroup
    world: int
    param_dtype: torch.dtype | None
    reduce_dtype: torch.dtype | None
    ahead: bool  # gather a unit while the one before it is computed
    now: bool = True  # False: gradients stay whole here, and add up
    units: list[Unit] = field(default_factory=list)
    in_backward: bool = False
    flying: tuple | None = None  # the gradients of one unit on their way

    def begin_backward(self) -> None:
        if not self.in_backward:
            self.in_backward = True
            queue_callback(self.end_backward)

    def end_backward(self) -> None:
        """Close what had unused parameters; afterwards all is as small as before."""
        for unit in reversed(self.units):
            unit.end_backward()
            unit.drop()
        self.land()
        self.in_backward = False

    def recover(self) -> None:
        """Forget a backward pass that failed on its way, and the gradients it left."""
        if not self.in_backward or in_backward():
            return
        if self.flying is not None:
            self.flying[-1].wait()
            self.flying = None
        for unit in self.units:
            unit.in_backward = False
            unit.free()
            unit.drop()
            for slot in unit.slots:
                if slot.full is not None:
                    slot.full.grad = None
        self.in_backward = False

    def scatter(self, unit: Unit) -> None:
        """Start to add up the gradients of a unit; each process gets those it keeps."""
        slots = [
            s for s in unit.slots if s.full is not None and s.full.grad is not None
        ]
        if not slots:
            return
        self.land()  # one unit at a time: full gradients are large
        whole = torch.cat([deal(s.full.grad, self.world) for s in slots], dim=1)  # type: ignore
        whole = whole.to(self.reduce_dtype or whole.dtype)  # (world, m)
        for slot in slots:
            slot.full.grad = None  # type: ignore[union-attr]
        mine = torch.empty_like(whole[0])
        work = reduce_scatter(mine, whole.flatten(), group=self.group, async_op=True)
        self.flying = slots, whole, mine, work

    def land(self) -> None:
        """Wait for the gradients on their way, and add them to the shards'."""
        if self.flying is None:
            return
        slots, _, mine, work = self.flying
        self.flying = None
        work.wait()
        mine /= self.world
        for slot, piece in zip(slots, mine.split([slot.size for slot in slots])):
            shard = slot.shard
            grad = piece[: shard.numel()].view_as(shard).to(shard.dtype)
            shard.grad = grad if shard.grad is None else shard.grad + grad


def shard_by_hand(
    model: nn.Module,
    mesh: DeviceMesh | dist.ProcessGroup | None = None,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    prefetch: bool = True,
) -> nn.Module:
    """Keep 1 / world of each parameter here, in place; names and classes stay.

    Promise: losses equal those of `fully_shard`, on two processes to the last bit.
    The weights must be the same in all processes, or come after: a model on the meta
    device may be sharded, `to_empty`, and filled with `own_rows` of each tensor. All
    processes must use the same parameters in a step.

    Args:
        model: each element of its lists of modules and each other child is a unit.
        mesh: whose processes take part; a mesh, a group, or None: all.
        param_dtype: of gathered weights, and so of the computation; None: their own.
        reduce_dtype: in which gradients are added up; None: as they are computed.
        prefetch: gather a unit while the one before it is computed.

    Raises:
        ValueError: nothing to train, already distributed, or a parameter of no rows.
    """
    names = {p: name for name, p in model.named_parameters()}
    check_bare(model, names)
    _check_parameters(names, param_dtype)
    group = group_of(mesh)
    engine = Engine(
        group, dist.get_world_size(group), param_dtype, reduce_dtype, prefetch
    )
    slots: dict[nn.Parameter, Slot] = {}
    for part, modules in parts_of(model):
        _watch(part, _units_of(modules, engine, slots))
    rank = dist.get_rank(engine.group)
    for full, slot in slots.items():
        mine = own_rows(full.detach(), rank, engine.world).clone()
        slot.put(nn.Parameter(mine, full.requires_grad))
    model.gradient_exchange = engine  # type: ignore[assignment]
    return model


def _check_parameters(
    names: dict[nn.Parameter, str], param_dtype: torch.dtype | None
) -> None:
    first = next(iter(names))
    for p, name in names.items():
        if p.dim() == 0 or p.numel() == 0:
            raise ValueError(
                f"{name} of shape {tuple(p.shape)} has no rows to share out; give it "
                "the shape (1,)."
            )
        if p.dtype != first.dtype and param_dtype is None:
            raise ValueError(
                f"{name} is {p.dtype}, {names[first]} {first.dtype}, and they travel "
                "together; give param_dtype, or convert the model to one dtype."
            )


def parts_of(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """What is called as one, and the modules in it; the model itself comes last."""
    for child in model.children():
        for part in child if isinstance(child, nn.ModuleList) else [child]:
            yield part, list(part.modules())
    yield model, [model]


def _units_of(
    modules: list[nn.Module], engine: Engine, slots: dict[nn.Parameter, Slot]
) -> list[Unit]:
    """The units that these modules need: a new one, and those of tied parameters."""
    new = Unit(engine)
    needed: dict[Unit, None] = {}
    for module in modules:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in slots:
                slots[parameter] = Slot(parameter, new)
                new.slots.append(slots[parameter])
            slots[parameter].places.append((module, name))
            needed[slots[parameter].unit] = None
    if new.slots:
        if engine.units:
            engine.units[-1].next = new
            new.previous = engine.units[-1]
        engine.units.append(new)
    return list(needed)


def _watch(part: nn.Module, units: list[Unit]) -> None:
    for unit in units:
        part.register_forward_pre_hook(lambda *_, u=unit: u.before_forward())
        part.register_forward_hook(
            lambda _, __, output, u=unit: u.after_forward(output), always_call=True
        )


@contextmanager
def unsharded(model: nn.Module) -> Iterator[nn.Module]:
    """Within, the model holds its full weights, to be read: on all processes at once.

    Example: `with unsharded(model): state = copy.deepcopy(model.state_dict())`

    Raises:
        ValueError: the model was not sharded by hand.
    """
    engine = _engine_of(model)
    for unit in engine.units:
        unit.gather()
    try:
        yield model
    finally:
        for unit in engine.units:
            unit.free()


def clip_shards(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients down to `max_norm` over all processes; their norm, 0-d."""
    engine = _engine_of(model)
    trained = [p for p in model.parameters() if p.grad is not None]
    squares = [p.grad.square().sum() for p in trained]  # type: ignore[union-attr]
    total = torch.stack(squares).sum()
    dist.all_reduce(total, group=engine.group)
    nn.utils.clip_grads_with_norm_(trained, max_norm, norm := total.sqrt())
    return norm


def _engine_of(model: nn.Module) -> Engine:
    engine = getattr(model, "gradient_exchange", None)
    if not isinstance(engine, Engine):
        raise ValueError(
            f"{type(model).__name__} is not sharded by hand; call shard_by_hand(model)."
        )
    return engine
