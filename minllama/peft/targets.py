r"""Which layers are adapted, said the way people say it.

    ("q_proj", "mlp.up_proj")   names, or ends of names
    "all-linear"                every linear layer but the head
    r"layers\.[01]\..*_proj"    a regular expression for the whole name

A name that fits nothing is an error that lists the names there are: a typo that adapts
nothing would train nothing, and say nothing.
"""

import re
from collections.abc import Collection, Iterable

from torch import nn

from minllama.peft.adapter import Adapter

ALL_LINEAR = "all-linear"


def is_linear(module: nn.Module) -> bool:
    """Whether it has `in_features` and `out_features`, however it stores its weight."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def is_embedding(module: nn.Module) -> bool:
    """Whether it has `num_embeddings` and `embedding_dim`."""
    return hasattr(module, "num_embeddings") and hasattr(module, "embedding_dim")


def outer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by name but those inside an adapter: an adapted layer counts once.

    A layer that was sharded, checkpointed or compiled keeps its name here.
    """
    found, inside = {}, ()
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or (inside and name.startswith(inside)):
            continue
        found[name] = module
        if isinstance(module, Adapter):
            inside = (*inside, f"{name}.")
    return found


def find_targets(
    model: nn.Module,
    targets: str | Iterable[str],
    layers: Collection[int] | None = None,
    embeddings: bool = False,
) -> list[str]:
    """Names of the layers that `targets` says.

    Args:
        model: any tree of modules.
        targets: names or ends of names; "all-linear"; or a regular expression, which
            must fit the whole name.
        layers: only in these blocks, counted from 0; None: everywhere.
        embeddings: whether embeddings may be adapted, too.

    Raises:
        ValueError: a target, or a block, that is not there; the names that are follow.
    """
    modules = outer_modules(model)
    fit = [n for n, m in modules.items()
           if is_linear(m) or (embeddings and is_embedding(m))]  # fmt: skip
    if isinstance(targets, str):
        found = [name for name in fit if _says(targets, name)]
        if not found:
            raise ValueError(f"targets={targets!r} fits none of {_leaves(fit)}.")
    else:
        found = _by_name(list(targets), fit)
    if layers is not None:
        blocks = {number for name in found if (number := _block(name)) is not None}
        missing = set(layers) - blocks
        if missing or not blocks:
            raise ValueError(
                f"layers={sorted(layers)}: targets are in blocks {sorted(blocks)} only."
            )
        found = [name for name in found if _block(name) in set(layers)]
    return found


def find_modules(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Full names of modules of any kind, by name or end of name.

    Raises:
        ValueError: a name that is not there.
    """
    return _by_name(list(names), list(outer_modules(model)))


def pattern_value(patterns: dict | None, name: str, default):
    r"""The value of the first pattern that fits the end of `name`, else `default`.

    Example:
        >>> pattern_value({"q_proj": 4, r"layers\.0\..*": 2}, "layers.1.q_proj", 8)
        4
    """
    for pattern, value in (patterns or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", full) for full in _both(name)):
            return value
    return default


def check_patterns(patterns: dict | None, names: list[str], what: str) -> None:
    """Refuse a pattern that fits no adapted layer, or says no size.

    Raises:
        ValueError: such a pattern, or a value that is not above 0.
    """
    for pattern, value in (patterns or {}).items():
        if not value > 0:
            raise ValueError(
                f"{what} gives {pattern!r} {value}, which must be above 0; leave a "
                "layer that shall have no adapter out of targets."
            )
        if not any(pattern_value({pattern: True}, name, False) for name in names):
            raise ValueError(
                f"{what} has {pattern!r}, which fits no adapted layer; they are "
                f"{_leaves(names)}."
            )


def _says(targets: str, name: str) -> bool:
    if targets == ALL_LINEAR:
        return name.split(".")[-1] not in ("lm_head", "embed_tokens")
    if re.fullmatch(r"[\w.]+", targets) and name.split(".")[-1] == targets:
        return True  # one name, without brackets around it
    return any(re.fullmatch(targets, full) for full in _both(name))


def _by_name(targets: list[str], names: list[str]) -> list[str]:
    found: dict[str, None] = {}
    for target in targets:
        target = target.removeprefix("model.")
        hits = [n for n in names if n == target or n.endswith(f".{target}")]
        if not hits:
            raise ValueError(f"target {target!r} is none of {_leaves(names)}.")
        found |= dict.fromkeys(hits)
    if not found:
        raise ValueError(f"targets=() adapts nothing; choose of {_leaves(names)}.")
    return [name for name in names if name in found]


def _both(name: str) -> tuple[str, str]:
    return name, f"model.{name}"  # Hugging Face's names have a word in front


def _block(name: str) -> int | None:
    number = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return None if number is None else int(number.group(1))


def _leaves(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.split(".")[-1] for name in names}))
