"""A model is a tree of modules; a chapter is a rewrite of that tree."""

from collections.abc import Callable

from torch import nn


def replace_modules(
    model: nn.Module,
    match: Callable[[str, nn.Module], bool],
    make: Callable[[nn.Module], nn.Module],
) -> nn.Module:
    """Swap each submodule for which `match(name, module)` holds with `make(module)`.

    Changes `model` in place and returns it, as `model.to` does. Names are those before
    the first swap, so a wrapper put around a match is not matched again.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> is_relu = lambda name, module: isinstance(module, nn.ReLU)
        >>> replace_modules(model, is_relu, lambda module: nn.SiLU())[1]
        SiLU()

    Raises:
        ValueError: nothing matched, which is nearly always a misspelled name.
    """
    names = [
        name for name, module in model.named_modules() if name and match(name, module)
    ]
    if not names:
        leaves = {name.split(".")[-1] for name, _ in model.named_modules() if name}
        raise ValueError(
            f"no module matched. Names in this model: {', '.join(sorted(leaves))}."
        )
    for name in names:
        model.set_submodule(name, make(model.get_submodule(name)))
    return model
