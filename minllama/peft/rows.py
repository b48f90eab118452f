"""Several adapters in one batch: each row takes its own.

    y[i] = W x[i] + B[n_i] A[n_i] x[i]      n_i: the adapter of row i

`mix_adapters` stacks the adapters of each layer; `set_rows` gathers the rows' A and B
into tensors whose addresses stay, so that a step, captured in a graph or not, costs two
small batched products a layer and never looks at an id. Layers that read the same input
(queries, keys and values; gate and up) share the first product, and where there are few
tokens, so that starting a kernel costs more than its work, the second, too.

Serving many adapters over one base: Punica, Chen et al. 2023, arXiv:2310.18547; S-LoRA,
Sheng et al. 2023, 2311.03285.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from minllama.peft.adapter import Adapter, Spec, adapters, specs
from minllama.peft.attach import wrap
from minllama.peft.base import float_weight, innermost
from minllama.peft.lora_layers import LoRALinear, has_hooks, is_bare
from minllama.peft.rows_kernel import FEW, rows_down, rows_up
from minllama.peft.targets import outer_modules

MIXED = "mixed"
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Siblings:
    """Layers that read one input: their A side by side, and what it makes of x."""

    def __init__(self) -> None:
        self.layers: list[RowLoRALinear] = []
        self.a: Tensor | None = None  # (B, R, in): the rows', R the sum of ranks
        self.x: Tensor | None = None  # what was read last,
        self.made: list[Tensor | None] = []  # and what each layer makes of it

    def gather(self, ids: Tensor | None) -> None:
        """Take the rows' A and B; into the same memory if the rows are as many."""
        self.x, self.made = None, []
        if ids is None:
            self.a = None
            return
        self.a = _into(self.a, torch.cat([one.a[ids] for one in self.layers], dim=1))
        for layer in self.layers:
            layer.row_b = _into(layer.row_b, layer.b[ids].transpose(1, 2).contiguous())

    def down(self, x: Tensor, layer: "RowLoRALinear") -> Tensor:
        """A x for one layer, (B, T, r): made once for all that ask with the same x."""

        def make(low: Tensor) -> list[Tensor]:
            return list(low.split([one.b.size(-1) for one in self.layers], dim=-1))

        return self._once(x, layer, make)

    def whole(self, x: Tensor, layer: "RowLoRALinear") -> Tensor:
        """Base and change of one layer, of few tokens: made for all of them at once."""

        def make(low: Tensor) -> list[Tensor]:
            ys = [one.answer(x) for one in self.layers]
            return rows_up(ys, low, [one.up(x) for one in self.layers])

        return self._once(x, layer, make)

    def _once(self, x: Tensor, layer: "RowLoRALinear", make: Callable) -> Tensor:
        assert self.a is not None
        at = self.layers.index(layer)
        if self.x is not x or self.made[at] is None:
            self.made = make(rows_down(x, self.a.to(x.dtype)))
            self.x = x
        mine, self.made[at] = self.made[at], None  # nobody gets it twice
        if layer is self.layers[-1]:  # the last to ask: nothing is kept alive
            self.x, self.made = None, []
        return cast(Tensor, mine)


class RowLoRALinear(Adapter):
    """`base(x)` plus, in each row, the path of that row's adapter. (B, T, in) only."""

    def __init__(self, base: nn.Module, spec: Spec, own: dict[str, LoRALinear]) -> None:
        super().__init__(base, spec)
        names: list[str] = spec.settings["names"]
        some = next(iter(own.values()))
        rank = max(one.rank for one in own.values())
        n = len(names)  # and one more, of zeros: a row without adapter
        weight = float_weight(base)  # its dtype, so that a step converts nothing
        dtype = some.a.dtype if weight is None else weight.dtype
        a = some.a.new_zeros(n + 1, rank, some.in_features, dtype=dtype)
        b = some.b.new_zeros(n + 1, some.out_features, rank, dtype=dtype)
        for name, one in own.items():
            at = names.index(name)
            a[at, : one.rank] = one.a.detach()
            b[at, :, : one.rank] = one.b.detach() * one.scale
        self.a = nn.Parameter(a, requires_grad=False)
        self.b = nn.Parameter(b, requires_grad=False)
        self.row_b: Tensor | None = None  # (B, r, out)
        self.siblings = Siblings()

    def trained(self) -> list[nn.Parameter]:
        return []

    def up(self, x: Tensor) -> Tensor:
        """The rows' B, (B, r, out), in the dtype of what they multiply."""
        assert self.row_b is not None
        return self.row_b.to(x.dtype)

    def answer(self, x: Tensor) -> Tensor:
        """What the base says, to be added to in place: a copy if it is watched."""
        y = self.base(x)
        return y.clone() if has_hooks(self.base) else y

    def forward(self, x: Tensor) -> Tensor:
        if self.row_b is None or self.strength == 0:
            return self.base(x)
        if x.dim() != 3 or x.size(0) != self.row_b.size(0):
            raise ValueError(
                f"x of shape {tuple(x.shape)} does not fit {self.row_b.size(0)} rows; "
                "set_rows with an adapter for each row of the batch."
            )
        if x.size(1) <= FEW and not torch.is_grad_enabled():
            return self.siblings.whole(x, self)
        low = self.siblings.down(x, self)
        if torch.is_grad_enabled():
            return torch.baddbmm(self.base(x), low, self.up(x))
        if not is_bare(self.base, x) or self.base.bias is not None:
            return self.answer(x).baddbmm_(low, self.up(x))
        y = torch.bmm(low, self.up(x))  # first: so it is written once, and the heavy
        y.flatten(0, 1).addmm_(x.flatten(0, 1), self.base.weight.t())  # product adds it
        return y


def mix_adapters(model: nn.Module, names: Sequence[str] | None = None) -> nn.Module:
    """Stack LoRA adapters of a model, so that each row of a batch may take its own.

    For serving: what is stacked is frozen and can neither be saved nor merged, and the
    adapters themselves are gone from the model. Save them before. Each counts in full,
    whatever `set_adapter` said.

    Args:
        model: with LoRA adapters, changed in place and returned.
        names: in the order of their numbers; None: all, in the order they came.

    Raises:
        ValueError: no adapter, an unknown name, or one that is no plain LoRA of linear
            layers.
    """
    there = specs(model)
    names = list(there) if names is None else list(names)
    unknown = [name for name in names if name not in there]
    if unknown or not names:
        raise ValueError(
            f"names={names} must be some of {', '.join(there) or 'none at all'}."
        )
    for at, one in adapters(model).items():
        if type(one) is not LoRALinear:
            raise ValueError(
                f"{at} of adapter {one.spec.name!r} is a {type(one).__name__}; rows "
                "mix plain LoRA of linear layers only; give it a batch of its own."
            )
    tops = {at: m for at, m in outer_modules(model).items() if isinstance(m, Adapter)}
    spec = Spec(MIXED, MIXED, {"names": names})
    chains = {at: _chain(top, names) for at, top in tops.items()}
    for at, top in tops.items():
        model.set_submodule(at, innermost(top))
    own = {at: chain for at, chain in chains.items() if chain}
    wrap(model, list(own), lambda at, base: RowLoRALinear(base, spec, own[at]))
    _share(model, list(own))
    return model


def check_not_mixed(there: Iterable[Spec]) -> None:
    """Refuse what a mix cannot do: its adapters are stacked, frozen, and one.

    Raises:
        ValueError: one of them is a mix.
    """
    for spec in there:
        if spec.method == MIXED:
            raise ValueError(
                f"adapters {', '.join(spec.settings['names'])} are mixed, that is, "
                "stacked for serving; save or merge them before mix_adapters."
            )


def _chain(top: nn.Module, names: list[str]) -> dict[str, LoRALinear]:
    found = {}
    while isinstance(top, LoRALinear):
        if top.spec.name in names:
            found[top.spec.name] = top
        top = top.base
    return found


def _share(model: nn.Module, places: list[str]) -> None:
    """Let layers of one parent that read the same input know of each other."""
    groups: dict[tuple, Siblings] = {}
    for at in places:
        parent, _, leaf = at.rpartition(".")
        kin = next((kin for kin in SIBLINGS if leaf in kin), (leaf,))
        group = groups.setdefault((parent, kin), Siblings())
        layer = model.get_submodule(at)
        assert isinstance(layer, RowLoRALinear)
        layer.siblings = group
        group.layers.append(layer)


def set_rows(
    model: nn.Module, rows: Sequence[str | int | None] | Tensor | None
) -> nn.Module:
    """Say which adapter each row of the next batches takes, until it is said again.

    A captured graph goes on to be valid if the number of rows stays.

    Args:
        model: of `mix_adapters`.
        rows: a name or number a row, None or -1 for the base alone; or a tensor (B,) of
            numbers. None: no adapter in any batch.

    Raises:
        ValueError: no such adapter, or the model is not mixed.
    """
    layers = [m for m in model.modules() if isinstance(m, RowLoRALinear)]
    if not layers:
        raise ValueError("the model mixes no adapters; call mix_adapters first.")
    ids = None
    if rows is not None:
        names: list[str] = layers[0].spec.settings["names"]
        ids = _numbers(rows, names).to(layers[0].a.device)
        ids = torch.where(ids < 0, len(names), ids)
    with torch.inference_mode(False), torch.no_grad():
        for group in {id(m.siblings): m.siblings for m in layers}.values():
            group.gather(ids)
            if ids is None:
                for layer in group.layers:
                    layer.row_b = None
    return model


def _numbers(rows: Sequence[str | int | None] | Tensor, names: list[str]) -> Tensor:
    if isinstance(rows, Tensor):
        return rows.long()
    numbers = []
    for row in rows:
        number = -1 if row is None else names.index(row) if row in names else row
        if not isinstance(number, int) or not -1 <= number < len(names):
            raise ValueError(
                f"row {row!r} is no adapter; they are {', '.join(names)}, by name or "
                f"by number 0 to {len(names) - 1}, and None for the base alone."
            )
        numbers.append(number)
    return torch.tensor(numbers)


@contextmanager
def adapter_rows(
    model: nn.Module, rows: Sequence[str | int | None] | Tensor
) -> Iterator[nn.Module]:
    """`set_rows` for a while.

    Example:
        with adapter_rows(model, ["anna", None, "bob"]):
            logits = model(tokens)  # (3, T, V)
    """
    set_rows(model, rows)
    try:
        yield model
    finally:
        set_rows(model, None)


def _into(old: Tensor | None, new: Tensor) -> Tensor:
    """`new`, in the memory of `old` if that fits."""
    if old is None or old.shape != new.shape or old.dtype != new.dtype:
        return new
    return old.copy_(new)
