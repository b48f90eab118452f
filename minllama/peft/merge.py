"""Fold what was learned into the weights: the same outputs, at no extra cost.

    LoRA   W + s B A        DoRA   m V / |V|        IA3   l W        …

A weight in bfloat16 takes the change to its own rounding, so subtracting it again would
not give the old weight. `keep=True` keeps the old one on the CPU instead, and `unmerge`
is then bit for bit. A head that shares the embedding's weight is parted from it, unless
both come out alike.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from minllama.peft.adapter import Adapter, specs
from minllama.peft.base import float_weight, innermost, is_tied
from minllama.peft.rows import check_not_mixed
from minllama.peft.saved import TrainedCopy
from minllama.peft.targets import outer_modules

KEPT = "merged_from"  # a plain attribute of the model: what unmerge needs


@dataclass
class Kept:
    """A model as it was before a merge."""

    tied: bool
    adapters: dict[str, Adapter] = field(default_factory=dict)  # outermost, by place
    weights: list[tuple[nn.Module, str, Tensor | None]] = field(default_factory=list)


def merge(
    model: nn.Module, names: str | Collection[str] | None = None, keep: bool = False
) -> nn.Module:
    """Fold all adapters into plain weights, in place.

    Args:
        model: with adapters.
        names: of all its adapters; only needed where there are several, to say that
            all of them together are meant.
        keep: the old weights, on the CPU, for `unmerge`.

    Raises:
        ValueError: nothing to merge, several adapters and no names, one that is off, or
            one that no plain weight can hold, as a mix. Nothing was changed then.
    """
    if getattr(model, KEPT, None) is not None:
        raise ValueError("an earlier merge is still kept; unmerge it first.")
    _check_names(model, names)
    tops = {at: m for at, m in outer_modules(model).items() if isinstance(m, Adapter)}
    for at, top in tops.items():
        _check_merges(at, top)
    kept = Kept(is_tied(model), tops)
    tables: dict[str, Tensor] = {}  # of embedding and head that share a weight
    with torch.no_grad():
        for at, top in tops.items():
            layer = innermost(top)
            for name, value in _folded(top).items():
                if kept.tied and at in ("embed_tokens", "lm_head"):
                    tables[at] = value
                else:
                    old = _put(layer, name, value)
                    old = old.cpu() if keep and old is not None else None
                    kept.weights.append((layer, name, old))
            model.set_submodule(at, layer)
        if tables:
            table = model.embed_tokens
            if keep:
                old = table.weight.detach().to("cpu", copy=True)  # type: ignore[union-attr,operator]
                kept.weights.append((table, "weight", old))  # type: ignore[arg-type]
            _put_tables(model, tables)
    if keep:
        setattr(model, KEPT, kept)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Take back `merge(model, keep=True)`, bit for bit.

    Raises:
        ValueError: the old weights were not kept.
    """
    kept: Kept | None = getattr(model, KEPT, None)
    if kept is None:
        raise ValueError(
            "the weights before a merge were not kept, and what was rounded cannot be "
            "subtracted; use merge(model, keep=True)."
        )
    with torch.no_grad():
        for layer, name, old in kept.weights:
            _put(layer, name, old)
    if kept.tied:
        model.lm_head.weight = model.embed_tokens.weight  # type: ignore[union-attr]
        model.config = replace(model.config, tie_embeddings=True)  # type: ignore[arg-type]
    for at, top in kept.adapters.items():
        _follow(top)
        model.set_submodule(at, top)
    delattr(model, KEPT)
    return model


def _check_names(model: nn.Module, names: str | Collection[str] | None) -> None:
    there = specs(model)
    if not there:
        raise ValueError("the model has no adapter to merge.")
    check_not_mixed(there.values())
    given = {names} if isinstance(names, str) else set(names or there)
    if unknown := given - set(there):
        raise ValueError(f"adapter {min(unknown)!r} is none of {', '.join(there)}.")
    if names is None and len(there) > 1:
        raise ValueError(
            f"the model has several adapters: {', '.join(there)}; merge with "
            "names=(…) to fold all of them, or remove_adapter those you do not want."
        )
    if rest := [name for name in there if name not in given]:
        raise ValueError(
            f"adapter {rest[0]!r} would be left on a changed weight; name it, too, or "
            "remove_adapter it first."
        )


def _check_merges(at: str, top: Adapter) -> None:
    layer: nn.Module = top
    while isinstance(layer, Adapter):
        if type(layer).fold is Adapter.fold:
            layer.fold(torch.empty(0), None)  # says why not
        if layer.strength == 0:
            raise ValueError(
                f"adapter {layer.spec.name!r} is off; set_adapter to switch it on, or "
                "remove_adapter it first."
            )
        layer = layer.base
    if not isinstance(top, TrainedCopy) and float_weight(layer) is None:
        raise ValueError(
            f"{at} is {type(layer).__name__}, which holds no plain weight, so nothing "
            "can be folded into it; merge into the model before it is quantized, or "
            "keep the adapter beside it."
        )


def _folded(top: Adapter) -> dict[str, Tensor]:
    """The new weights of the innermost layer, by name, in float32 or wider."""
    if isinstance(top, TrainedCopy):
        return dict(top.copy.named_parameters())
    chain: list[Adapter] = []
    layer: nn.Module = top
    while isinstance(layer, Adapter):
        chain.append(layer)
        layer = layer.base
    weight, bias = float_weight(layer), getattr(layer, "bias", None)
    assert weight is not None
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    for adapter in reversed(chain):  # the inner ones first
        weight, bias = adapter.fold(weight, bias)
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def _put(layer: nn.Module, name: str, value: Tensor | None) -> Tensor | None:
    """Write a weight in place, or make or remove a bias. Gives a copy of the old."""
    owner, _, leaf = name.rpartition(".")
    layer = layer.get_submodule(owner)
    there = getattr(layer, leaf)
    if there is None or value is None:
        weight = layer.weight
        new = None if value is None else nn.Parameter(value.to(weight), False)  # type: ignore[call-overload]
        setattr(layer, leaf, new)
        return there
    old = there.detach().clone()
    there.copy_(value)
    return old


def _put_tables(model: nn.Module, tables: dict[str, Tensor]) -> None:
    """Give embedding and head, that shared a weight, what each has become."""
    table: nn.Parameter = model.embed_tokens.weight  # type: ignore[union-attr,assignment]
    old = table.detach().clone()
    rows, head = (
        tables.get(at, old).to(table.dtype) for at in ("embed_tokens", "lm_head")
    )
    table.copy_(rows)
    if torch.equal(rows, head):  # still one
        model.lm_head.weight = table  # type: ignore[union-attr]
        return
    model.lm_head.weight = nn.Parameter(head.clone(), requires_grad=False)  # type: ignore[union-attr]
    model.config = replace(model.config, tie_embeddings=False)  # type: ignore[arg-type]


def _follow(top: Adapter) -> None:
    """Move kept adapters to where the model went meanwhile."""
    device = next(innermost(top).parameters()).device
    layer: nn.Module = top
    while isinstance(layer, Adapter):
        for tensor in [*layer.parameters(), *layer.buffers()]:
            tensor.data = tensor.data.to(device)
        layer = layer.base
