"""Dropout, for training only: a transformation that leaves no trace in a checkpoint.

What a block's two steps write into the residual stream, and the embedding, lose each
channel with probability p, and the rest is scaled up by 1 / (1 - p). The modules get a
hook, so names, weights and seams stay as they are.
Paper: Srivastava et al. 2014, JMLR 15; where it acts: Vaswani et al. 2017, 1706.03762.
"""

import torch.nn.functional as F
from torch import Tensor, nn

PLACES = ("embed_tokens", "self_attn", "mlp")


class DropOutput:
    """A forward hook: drop channels of what the module gives, in training mode."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, module: nn.Module, inputs, output: Tensor) -> Tensor:
        return F.dropout(output, self.p, training=module.training)


def add_dropout(model: nn.Module, p: float) -> nn.Module:
    """Drop with probability p after each of `PLACES`. In evaluation nothing changes.

    Raises:
        ValueError: p outside 0..1, dropout is there already, or no place matched.
    """
    if not 0 <= p < 1:
        raise ValueError(f"p={p} must be at least 0 and below 1.")
    found = [m for name, m in model.named_modules() if name.split(".")[-1] in PLACES]
    if not found:
        raise ValueError(f"the model has none of {', '.join(PLACES)} to drop after.")
    if any(_hooks(module) for module in found):
        raise ValueError("the model has dropout already; call remove_dropout first.")
    for module in found:
        module.register_forward_hook(DropOutput(p))
    return model


def remove_dropout(model: nn.Module) -> nn.Module:
    """Undo `add_dropout`."""
    for module in model.modules():
        for key in _hooks(module):
            del module._forward_hooks[key]
    return model


def _hooks(module: nn.Module) -> list[int]:
    hooks = module._forward_hooks
    return [key for key, hook in hooks.items() if isinstance(hook, DropOutput)]
