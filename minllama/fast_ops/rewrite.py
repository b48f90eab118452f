"""`use_fast_ops(model)`: the same model, its operators fused.

    RMSNorm         rms_norm
    Block           x + attention(…) and the norm after it in one: add_rms_norm
    FeedForward     swiglu between its linear layers
    Rope            a Rotation that turns q and k at once
    AttentionCore   flash_attention

A module is rewritten where it still runs the hub's own `forward`, be it of a subclass:
what a subclass overrode, LoRA wrapped or quantization replaced stays as it is. The
module itself stays, too, with its names, parameters and hooks; only its class becomes
one of both, as FSDP2 does it.

The second addition of a block, after the feed-forward, is left alone. To fuse it with
the next block's norm, blocks would have to hand on two tensors, which every hook,
pipeline cut and activation checkpoint between them would have to carry; the addition
is 0.3 % of a training step (1B, H200, counted in bytes).
"""

import logging
from collections import Counter
from functools import cache
from typing import Literal

from torch import Tensor, nn

from minllama.architecture.model import AttentionCore, Block, FeedForward, RMSNorm
from minllama.architecture.rope import Rope, Rotation
from minllama.fast_ops.flash_core import FlashCore
from minllama.fast_ops.rms_norm import add_rms_norm, rms_norm
from minllama.fast_ops.rope import FastRotation
from minllama.fast_ops.swiglu import swiglu

logger = logging.getLogger(__name__)


class FastRMSNorm(RMSNorm):
    """The hub's norm by one kernel, with an addition before it if `residual` is given.

    (..., D) -> (..., D), or twice (..., D) -> the sum and its norm.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None):
        if residual is None:
            return rms_norm(x, self.weight, self.eps)
        return add_rms_norm(x, residual, self.weight, self.eps)


class FastFeedForward(FeedForward):
    """The hub's feed-forward with its gate by one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def _is_watched(module: nn.Module) -> bool:
    """Whether hooks, or a forward of its own, expect one tensor in and one out."""
    hooks = (
        module._forward_hooks, module._forward_pre_hooks,
        module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    return any(hooks) or "forward" in vars(module)


class FastBlock(Block):
    """The hub's block with its first addition done by the norm that follows.

    A norm of another kind, or one that somebody watches, is called as the hub does.
    """

    def forward(self, x: Tensor, layout, cache=None) -> Tensor:
        norm = self.post_attention_layernorm
        if not isinstance(norm, FastRMSNorm) or _is_watched(norm):
            return super().forward(x, layout, cache)
        mixed = self.self_attn(self.input_layernorm(x), layout, cache)
        x, normed = norm(x, residual=mixed)
        return x + self.mlp(normed)


class FastRope(Rope):
    """The rope it was, whose rotation is one kernel."""

    def forward(self, positions: Tensor) -> Rotation:
        rotation = super().forward(positions)
        return FastRotation(*rotation) if type(rotation) is Rotation else rotation


FAST: dict[type[nn.Module], type[nn.Module]] = {
    RMSNorm: FastRMSNorm,
    FeedForward: FastFeedForward,
    Block: FastBlock,
    Rope: FastRope,
    AttentionCore: FlashCore,
}


def use_fast_ops(
    model: nn.Module, prefer: Literal["fastest", "triton"] = "fastest"
) -> nn.Module:
    """Fuse what can be fused: same outputs, same names, fewer trips to memory.

    Changes `model` in place and returns it, as `model.to` does; once more changes
    nothing but `prefer`. What was rewritten is logged, and `fast_ops_report` says it
    any time.

    Args:
        model: before it is sharded or compiled, after quantization and adapters (these
            may also come later: names and linear layers stay).
        prefer: which attention, see `FlashCore`.

    Raises:
        ValueError: nothing in the model runs the hub's own forward, or an unknown
            `prefer`.
    """
    settings = vars(FlashCore(prefer))
    for module in model.modules():
        base = _base(module)
        if base is not None and _is_plain(module, base):
            module.__class__ = _fast_class(type(module), base)
        if isinstance(module, FlashCore):
            vars(module)["prefer"] = settings["prefer"]
    report = fast_ops_report(model)
    if not report["fast"]:
        leaves = {name.split(".")[-1] for name, _ in model.named_modules() if name}
        raise ValueError(
            f"none of {', '.join(base.__name__ for base in FAST)} runs its own forward "
            f"here. Names in this model: {', '.join(sorted(leaves))}."
        )
    for word, names in report.items():
        kinds = Counter(type(model.get_submodule(name)).__name__ for name in names)
        counts = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
        logger.info("use_fast_ops: %s: %s", word, counts or "none")
    return model


def fast_ops_report(model: nn.Module) -> dict[str, list[str]]:
    """Names of modules that run fused operators ("fast"), and of those "left" as is.

    Left is what computes the same kind of thing in a way of its own: a subclass that
    overrides `forward`, a module whose `forward` was replaced.
    """
    report: dict[str, list[str]] = {"fast": [], "left": []}
    for name, module in model.named_modules():
        base = _base(module)
        if base is not None:
            fast = isinstance(module, FAST[base])
            report["fast" if fast else "left"].append(name)
    return report


def _base(module: nn.Module) -> type[nn.Module] | None:
    """The hub's class that this module is one of, if it has a fast form."""
    return next((base for base in FAST if isinstance(module, base)), None)


def _is_plain(module: nn.Module, base: type[nn.Module]) -> bool:
    return type(module).forward is base.forward and "forward" not in vars(module)


@cache
def _fast_class(kind: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """`FAST[base]`, or for a subclass of base a class that is both."""
    fast = FAST[base]
    if kind is base:
        return fast

    def reduce(module: nn.Module, protocol):  # no file has this class: it is made again
        return _new_module, (kind, base), module.__getstate__()

    body = {"__reduce_ex__": reduce}
    return type(f"Fast{kind.__name__}", (fast, kind), body)


def _new_module(kind: type[nn.Module], base: type[nn.Module]) -> nn.Module:
    """One without contents, for whoever copies or unpickles."""
    fast = _fast_class(kind, base)
    return fast.__new__(fast)
