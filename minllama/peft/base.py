"""The layer below all adapters: is it plain, has it a weight, where does it live."""

import torch
from torch import Tensor, nn

from minllama.peft.adapter import Adapter


def innermost(layer: nn.Module) -> nn.Module:
    """The layer below all adapters."""
    while isinstance(layer, Adapter):
        layer = layer.base
    return layer


def is_plain(layer: nn.Module) -> bool:
    """Whether no adapter on the way down to the innermost layer is on."""
    while isinstance(layer, Adapter):
        if layer.strength != 0:
            return False
        layer = layer.base
    return True


def float_weight(layer: nn.Module) -> Tensor | None:
    """The weight of a plain layer, of 16 bits or more; None if it is stored else."""
    weight = getattr(innermost(layer), "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight if weight.element_size() > 1 else None
    return None


def is_tied(model: nn.Module) -> bool:
    """Whether head and embedding share their weight, below their adapters."""
    table, head = (
        float_weight(getattr(model, name, nn.Module()))
        for name in ("embed_tokens", "lm_head")
    )
    return table is not None and table is head


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the activations: that of the first plain weight."""
    for weight in model.parameters():
        if weight.is_floating_point() and weight.element_size() > 1:
            return weight.dtype
    return torch.get_default_dtype()


def place(base: nn.Module, dtype: torch.dtype | None, fallback: torch.dtype) -> dict:
    """Device and dtype of new parameters: the base's, if it has a plain weight.

    Args:
        base: the layer to adapt.
        dtype: asked for by the caller; None: the base's.
        fallback: where the base has no plain weight: that of the activations.
    """
    weight = float_weight(base)
    inner = innermost(base)
    tensors = [*inner.parameters(), *inner.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    return {
        "device": device if weight is None else weight.device,
        "dtype": dtype or (fallback if weight is None else weight.dtype),
    }
