"""LoRA's layers: around a linear layer, and around an embedding.

    y = base(x) + s B A x        s = alpha / r, or alpha / sqrt(r)

The scale is folded into the small product: neither pass touches a tensor of the
output's width once more than the sum needs.
Paper: Hu et al. 2021, arXiv:2106.09685, section 4.1.
"""

import math
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from minllama.peft.adapter import Adapter, Spec


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """y + scale B A x. (…, out), (…, in), (r, in), (out, r) -> (…, out).

    A and B may be wider types than x (float32 beside bfloat16): products are in x's.
    """
    low = F.linear(x, a.to(x.dtype))  # (…, r)
    if type(y) is Tensor and y.dim() > 1:  # one product that also adds
        rows = low.flatten(0, -2)
        up = b.to(low.dtype).t()
        return torch.addmm(y.flatten(0, -2), rows, up, alpha=scale).view(y.shape)
    return y + F.linear(low * scale, b.to(low.dtype))  # sharded: each step propagates


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
         "_backward_pre_hooks", "forward")  # fmt: skip


def has_hooks(layer: nn.Module) -> bool:
    """Whether somebody may keep what the layer returns, or replaced its forward."""
    return any(layer.__dict__.get(name) for name in HOOKS)


def is_bare(layer: nn.Module, x: Tensor) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer of (n, in) whose output nobody else looks at."""
    watched = any(vars(layer).get(name) for name in HOOKS)
    return (
        type(layer) is nn.Linear and not watched and type(x) is Tensor and x.dim() > 1
    )


def is_watched(x: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether nothing may be written in place: someone keeps what operators return
    (selective activation checkpointing) or transforms them (torch.func).
    """
    if torch.compiler.is_compiling():  # which makes it a sum again, if need be
        return False
    mapped = torch._C._functorch.is_functorch_wrapped_tensor  # type: ignore[attr-defined]
    return is_in_torch_dispatch_mode() or mapped(x) or mapped(a) or mapped(b)


def linear_with_low_rank(
    layer: nn.Module, x: Tensor, dropped: Tensor, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """layer(x) + scale B A dropped. (…, in) twice, (r, in), (out, r) -> (…, out).

    The change is added into the layer's output where that is safe: no copy of it. On
    rows (n, in), since autograd would copy gradients of a view that is written to.
    """
    if not is_bare(layer, x) or is_watched(x, a, b):
        return add_low_rank(layer(x), dropped, a, b, scale)
    rows = x.flatten(0, -2)
    frozen = not any(p.requires_grad for p in layer.parameters())
    autocast = torch.is_autocast_enabled(x.device.type)
    if dropped is x and a.requires_grad and frozen and not autocast:
        ab = a.to(x.dtype), b.to(x.dtype)
        y = _LinearWithLowRank.apply(rows, layer.weight, layer.bias, *ab, scale)
    else:
        y = layer(rows)
        low = F.linear(dropped.flatten(0, -2), a.to(x.dtype))
        y.addmm_(low, b.to(low.dtype).t(), alpha=scale)
    return y.view(*x.shape[:-1], y.size(-1))


class _LinearWithLowRank(torch.autograd.Function):
    """x W^T + bias + s x A^T B^T of (n, in), where W and bias are frozen.

    Left to autograd, the two paths give a gradient of x each, and a third pass adds
    them: 5 trips of an (n, in) tensor to memory where these two products make 3. That
    is 2 % of a training step of 8B.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):
        y = F.linear(x, weight, bias)
        low = x @ a.t()  # (n, r)
        y.addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, a, b, low = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be derived again: low must know of x and A
            low = x @ a.t()
        need_x, _, _, need_a, need_b = ctx.needs_input_grad[:5]
        dx = da = db = None
        if need_b:
            db = ctx.scale * (dy.t() @ low)
        if need_x or need_a:
            d_low = ctx.scale * (dy @ b)
        if need_a:
            da = d_low.t() @ x
        if need_x:
            dx = (dy @ weight).addmm_(d_low, a)
        return dx, None, None, da, db, None


class LowRank(Adapter):
    """What both share: A (r, in), B (out, r), and their scale."""

    adds = True

    def __init__(self, base: nn.Module, spec: Spec, rank: int, alpha: float) -> None:
        super().__init__(base, spec)
        self.rank, self.alpha = rank, alpha
        rslora = spec.settings.get("rslora", False)
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)

    def make(self, d_out: int, d_in: int, place: dict) -> None:
        """A and B, without numbers yet."""
        self.a = nn.Parameter(torch.empty(self.rank, d_in, **place))
        self.b = nn.Parameter(torch.empty(d_out, self.rank, **place))

    def trained(self) -> list[nn.Parameter]:
        return [self.b] if self.spec.settings.get("freeze_a") else [self.a, self.b]

    def change(self) -> Tensor:
        """What is added to the weight: s B A, (out, in), in float32 or wider."""
        wide = torch.promote_types(self.a.dtype, torch.float32)
        return self.strength * self.scale * (self.b.to(wide) @ self.a.to(wide))


class LoRALinear(LowRank):
    """`base(x)` plus a trainable low-rank path. (…, in) -> (…, out)."""

    def __init__(
        self, base: nn.Module, spec: Spec, rank: int, alpha: float, place: dict
    ) -> None:
        super().__init__(base, spec, rank, alpha)
        self.make(self.out_features, self.in_features, place)
        self.dropout = nn.Dropout(spec.settings.get("dropout", 0.0))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A uniform within 1 / sqrt(in), as a new linear layer's weight; B zero."""
        if self.spec.settings.get("init") == "gaussian":
            nn.init.normal_(self.a, std=1 / self.rank)
        else:
            nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        nn.init.zeros_(self.b)

    def forward(self, x: Tensor) -> Tensor:
        if self.strength == 0:
            return self.base(x)
        scale = self.scale * self.strength
        return linear_with_low_rank(
            self.base, x, self.dropout(x), self.a, self.b, scale
        )

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s B A."""
        return weight + self.change(), bias


class LoRAEmbedding(LowRank):
    """An embedding whose rows change together: E + s (B A)^T. (B, T) -> (B, T, D).

    Here A (r, V) starts at zero: most of its columns belong to tokens that never come,
    and have no gradient.
    """

    def __init__(
        self, base: nn.Module, spec: Spec, rank: int, alpha: float, place: dict
    ) -> None:
        super().__init__(base, spec, rank, alpha)
        self.make(self.embedding_dim, self.num_embeddings, place)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A zero; B normal."""
        nn.init.zeros_(self.a)
        nn.init.normal_(self.b)

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.base(tokens)
        if self.strength == 0:
            return y
        low = F.embedding(tokens, self.a.t()).to(y.dtype)  # (B, T, r)
        scale = self.scale * self.strength
        return y + F.linear(low * scale, self.b.to(y.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """E + s (B A)^T."""
        return weight + self.change().t(), bias
