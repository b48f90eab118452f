"""Putting adapters on: all of them or none, under a name that is free."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from torch import nn

from minllama.architecture.surgery import replace_modules
from minllama.peft.adapter import Adapter, Spec, remove_adapter, specs


@contextmanager
def all_or_nothing(model: nn.Module, name: str) -> Iterator[None]:
    """Take an adapter off again if it could not be put on whole."""
    learned = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except Exception:
        if name in specs(model):
            remove_adapter(model, name)
        for parameter, before in learned:
            parameter.requires_grad_(before)
        raise


def attach(
    model: nn.Module,
    spec: Spec,
    names: Collection[str],
    make: Callable[[str, nn.Module], Adapter],
) -> nn.Module:
    """Freeze the model and put `make(name, module)` where each named module is.

    Raises:
        ValueError: the adapter's name is taken.
    """
    check_free(model, spec.name)
    with all_or_nothing(model, spec.name):
        model.requires_grad_(False)
        return wrap(model, names, make)


def check_free(model: nn.Module, name: str) -> None:
    """Refuse a second adapter of one name.

    Raises:
        ValueError: `name` is taken, or is no name.
    """
    if not name or "." in name:
        raise ValueError(f"name={name!r} must be a word without dots.")
    taken = specs(model)
    if name in taken:
        raise ValueError(
            f"adapter name={name!r} is taken ({taken[name].method}); give the new one "
            "another name=, or remove_adapter first."
        )


def wrap(
    model: nn.Module,
    names: Collection[str],
    make: Callable[[str, nn.Module], Adapter],
) -> nn.Module:
    """Put an adapter around each named module; what it trains has requires_grad."""
    chosen = set(names)
    modules = dict(model.named_modules(remove_duplicate=False))
    name_of = {modules[name]: name for name in chosen}
    made: list[Adapter] = []

    def make_one(module: nn.Module) -> Adapter:
        adapter = make(name_of[module], module)
        adapter.train(module.training)
        made.append(adapter)
        return adapter

    replace_modules(model, lambda name, _: name in chosen, make_one)
    for adapter in made:
        for parameter in adapter.trained():
            parameter.requires_grad_(True)
    return model
