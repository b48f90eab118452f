"""Training a part as it is: norms, biases, or whole modules beside an adapter.

A norm or a head is small or new enough to be trained in full. It is trained as a copy,
so that switching the adapter off still gives the model as it was. A bias is trained as
what is added to it: zero at birth, and a layer without a bias may learn one.

Papers: BitFit Ben Zaken et al. 2021, arXiv:2106.10199 · norm tuning Zhao et al. 2023,
2312.11420.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from minllama.peft.adapter import Adapter, Spec
from minllama.peft.attach import attach, wrap
from minllama.peft.base import innermost, model_dtype, place
from minllama.peft.targets import ALL_LINEAR, find_modules, find_targets, outer_modules


class TrainedCopy(Adapter):
    """A module's trained copy in its stead; the module itself when switched off.

    Args:
        base: the module.
        spec: of the adapter.
        beside: whether it is trained beside the layers that the method adapts.
    """

    def __init__(self, base: nn.Module, spec: Spec, beside: bool = False) -> None:
        if isinstance(base, Adapter):
            raise ValueError(
                f"{type(base).__name__} is an adapter already; a module is trained in "
                "full or adapted, not both."
            )
        super().__init__(base, spec)
        weights = list(base.parameters())
        if not weights or not all(w.is_floating_point() for w in weights):
            raise ValueError(
                f"{type(base).__name__} has no plain weights to train in full; adapt "
                "it instead."
            )
        self.beside = beside
        self.copy = copy.deepcopy(base)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Copy the module anew."""
        for mine, theirs in zip(self.copy.parameters(), self.base.parameters()):
            mine.copy_(theirs)

    def trained(self) -> list[nn.Parameter]:
        return list(self.copy.parameters())

    def forward(self, *args, **kwargs):
        return (self.copy if self.strength != 0 else self.base)(*args, **kwargs)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The copy's own."""
        return self.copy.get_parameter("weight"), getattr(self.copy, "bias", None)


class BiasLinear(Adapter):
    """`base(x)` plus a bias that starts at zero. (…, in) -> (…, out)."""

    adds = True

    def __init__(self, base: nn.Module, spec: Spec, place: dict) -> None:
        super().__init__(base, spec)
        self.bias = nn.Parameter(torch.zeros(self.out_features, **place))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.strength == 0:
            return y
        bias = self.bias if self.strength == 1 else self.bias * self.strength
        return y + bias.to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The two biases' sum."""
        more = self.strength * self.bias.to(weight.dtype)
        return weight, more if bias is None else bias + more


def save_modules(model: nn.Module, spec: Spec, names: Iterable[str]) -> None:
    """Train copies of whole modules, too; they are saved with the adapter.

    A copy holds its bias: one that the adapter trains there already is taken off.

    Raises:
        ValueError: no such module, or one that cannot be trained in full.
    """
    names = list(names)
    if names:
        found = find_modules(model, names)
        _take_off_biases(model, spec, found)
        wrap(model, found, lambda _, module: TrainedCopy(module, spec, beside=True))


def _take_off_biases(model: nn.Module, spec: Spec, names: list[str]) -> None:
    inside = tuple(f"{name}." for name in names)
    for at, module in outer_modules(model).items():
        if isinstance(module, BiasLinear) and module.spec is spec:
            if at in names or at.startswith(inside):
                model.set_submodule(at, module.base)


def layers_with_bias(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the named linear layers that have a bias."""
    modules = outer_modules(model)
    return [
        n for n in names if getattr(innermost(modules[n]), "bias", None) is not None
    ]


def add_biases(model: nn.Module, spec: Spec, which: str, targets: list[str]) -> None:
    """Train biases beside an adapter: "none", "all", or "lora_only" (of its targets).

    Raises:
        ValueError: another word, or none of these layers has a bias.
    """
    if which not in ("none", "all", "lora_only"):
        raise ValueError(f"bias={which!r} must be 'none', 'all' or 'lora_only'.")
    if which == "none":
        return
    every = [*find_targets(model, ALL_LINEAR)]
    found = layers_with_bias(model, every if which == "all" else targets)
    if not found:
        raise ValueError(
            f"bias={which!r}, but none of these layers has a bias, as in Llama; use "
            "'none', or add_bitfit with targets to give them one."
        )
    _add_bias(model, spec, found)


def _add_bias(model: nn.Module, spec: Spec, names: list[str]) -> None:
    dtype = model_dtype(model)
    wrap(model, names, lambda _, m: BiasLinear(m, spec, place(m, None, dtype)))


def add_bitfit(
    model: nn.Module,
    targets: str | Iterable[str] | None = None,
    name: str = "default",
) -> nn.Module:
    """Train biases and nothing else.

    Args:
        model: changed in place.
        targets: linear layers that shall have a trained bias, had they one or not.
            None: those that have one.
        name: of the adapter.

    Raises:
        ValueError: no layer has a bias and none was named, or a wrong name.
    """
    if targets is None:
        names = layers_with_bias(model, find_targets(model, ALL_LINEAR))
        if not names:
            raise ValueError(
                "targets=None, but no layer has a bias, as in Llama; name the layers "
                "that shall have one, e.g. targets='all-linear'."
            )
    else:
        names = find_targets(model, targets)
    spec, dtype = Spec(name, "bitfit"), model_dtype(model)
    return attach(
        model, spec, names, lambda _, m: BiasLinear(m, spec, place(m, None, dtype))
    )


def add_norm_tuning(
    model: nn.Module,
    targets: Iterable[str] | None = None,
    name: str = "default",
) -> nn.Module:
    """Train norms and nothing else.

    Args:
        model: changed in place.
        targets: names of norms; None: all.
        name: of the adapter.

    Raises:
        ValueError: a wrong name.
    """
    modules = outer_modules(model)
    if targets is None:
        names = [n for n in modules if n.split(".")[-1].endswith(("norm", "layernorm"))]
    else:
        names = find_modules(model, targets)
    spec = Spec(name, "norm_tuning")
    return attach(model, spec, names, lambda _, module: TrainedCopy(module, spec))
