"""What all adapters are: a layer around a layer, with a name and a strength.

An adapter holds the layer it adapts as `base` and stands in its place, so adapters
stack, several may sit on one base, and whatever calls the layer sees a layer. It needs
no weight of `base`, only a call: that may be stored in eight bits or four.

    strength 1   on                     strength 0   off: base alone, bit for bit
    strength w   w times its change     (adapters that add to the output)
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass
class Spec:
    """What one call of add_… asked for; all its adapters share it."""

    name: str  # by which it is switched
    method: str  # "lora", "dora", "ia3", …
    settings: dict = field(default_factory=dict)  # what a file must say of it


class Adapter(nn.Module):
    """`base`, and a change that is learned. Stands where `base` stood.

    A subclass adds parameters, `reset_parameters`, and `forward`.
    """

    adds = False  # to the output of base: may be weighted, mixed, summed
    sizes = ("in_features", "out_features", "num_embeddings", "embedding_dim")
    in_features: int  # those of these four that `base` has
    out_features: int
    num_embeddings: int
    embedding_dim: int
    base: nn.Module

    def __init__(self, base: nn.Module, spec: Spec) -> None:
        super().__init__()
        self.base, self.spec, self.strength = base, spec, 1.0
        for size in self.sizes:
            if hasattr(base, size):
                setattr(self, size, getattr(base, size))

    @property
    def weight(self) -> Tensor:
        """Of an adapted embedding: the base's, for its device and its dtype.

        A linear layer has none: whoever multiplies by it would miss the adapter.
        """
        if not hasattr(self, "num_embeddings"):
            raise AttributeError(f"{type(self).__name__} has no weight of its own.")
        return self.base.weight  # type: ignore[return-value]

    def reset_parameters(self) -> None:
        """Start anew: after this the adapter changes no output, unless it says so.

        Raises:
            ValueError: it has no beginning of its own, as a mix of trained adapters.
        """
        raise ValueError(
            f"adapter {self.spec.name!r} ({self.spec.method}) has no beginning to go "
            "back to; remove_adapter, and add a new one."
        )

    def restore_base(self) -> None:
        """Undo what was done to `base` itself, before the adapter is taken off."""

    def trained(self) -> list[nn.Parameter]:
        """The parameters that learn."""
        return list(self.parameters(recurse=False))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a plain layer that computes what adapter and base do.

        Raises:
            ValueError: there is none.
        """
        raise ValueError(
            f"adapter {self.spec.name!r} ({self.spec.method}) is no change of a "
            "weight, so it cannot be merged; keep it beside the model "
            "(save_adapter)."
        )


def adapters(model: nn.Module, name: str | None = None) -> dict[str, Adapter]:
    """Adapters by module name, of one adapter name or of all."""
    return {
        at: module
        for at, module in model.named_modules()
        if isinstance(module, Adapter) and name in (None, module.spec.name)
    }


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters on a model, in the order in which they came."""
    return list(specs(model))


def specs(model: nn.Module) -> dict[str, Spec]:
    """What was asked for, by adapter name; inner adapters came first."""
    found: dict[str, Spec] = {}
    for adapter in reversed(list(adapters(model).values())):
        found.setdefault(adapter.spec.name, adapter.spec)
    return found


def set_adapter(
    model: nn.Module, names: str | Collection[str] | Mapping[str, float]
) -> nn.Module:
    """Switch these adapters on, and all others off. The ones that are on may learn.

    Args:
        model: with adapters.
        names: a name; several, whose changes add up; or name -> weight.

    Raises:
        ValueError: no such adapter, or a weight for a kind that cannot have one.
    """
    weights = _weights(names)
    there = specs(model)
    unknown = [name for name in weights if name not in there]
    if unknown:
        raise ValueError(
            f"adapter {unknown[0]!r} is none of {', '.join(there) or 'none at all'}."
        )
    for adapter in adapters(model).values():
        strength = weights.get(adapter.spec.name, 0.0)
        if strength not in (0.0, 1.0) and not adapter.adds:
            raise ValueError(
                f"weight {strength} of {adapter.spec.name!r}: {adapter.spec.method} "
                "adds nothing that could be weighted; use 1.0 or 0.0."
            )
    for adapter in adapters(model).values():
        adapter.strength = weights.get(adapter.spec.name, 0.0)
        for parameter in adapter.trained():
            parameter.requires_grad_(adapter.strength != 0)
    return model


def _weights(names: str | Collection[str] | Mapping[str, float]) -> dict[str, float]:
    if isinstance(names, str):
        return {names: 1.0}
    if isinstance(names, Mapping):
        return {name: float(weight) for name, weight in names.items()}
    return dict.fromkeys(names, 1.0)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within it the model computes what it did without any adapter.

    Example:
        with disabled(model):
            reference = model(tokens)
    """
    before = [(adapter, adapter.strength) for adapter in adapters(model).values()]
    for adapter, _ in before:
        adapter.strength = 0.0
    try:
        yield model
    finally:
        for adapter, strength in before:
            adapter.strength = strength


def remove_adapter(model: nn.Module, name: str) -> nn.Module:
    """Take an adapter off, as if it had never been there.

    Raises:
        ValueError: no such adapter.
    """
    if name not in specs(model):
        raise ValueError(
            f"adapter {name!r} is none of {', '.join(specs(model)) or 'none at all'}."
        )
    while found := adapters(model, name):
        at, adapter = next(iter(found.items()))
        adapter.restore_base()
        model.set_submodule(at, adapter.base)
    return model


def reset_adapters(model: nn.Module) -> nn.Module:
    """Draw all adapters anew: for a model made on the meta device, once it has weights.

    Inner adapters first, since an outer one may measure what it stands around.
    """
    for adapter in reversed(list(adapters(model).values())):
        adapter.reset_parameters()
    return model


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers learn; a shared parameter counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
