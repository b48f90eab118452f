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
        ValueError: nothing matched, which is nearly always a misspelled name; or a
            module and another inside it.
    """
    found = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and match(name, module)
    }
    if not found:
        leaves = {name.split(".")[-1] for name, _ in model.named_modules() if name}
        raise ValueError(
            f"no module matched. Names in this model: {', '.join(sorted(leaves))}."
        )
    for name in found:
        inside = next((other for other in found if other.startswith(f"{name}.")), None)
        if inside is not None:
            raise ValueError(
                f"{name} matches, and so does {inside} inside it; match one of the two."
            )
    made: dict[nn.Module, nn.Module] = {}  # a module of two names stays one module
    for name, module in found.items():
        if module not in made:
            made[module] = make(module)
        model.set_submodule(name, made[module])
    return model
