"""The SwiGLU gate silu(a) * b in one trip to memory. The template for a new operator.

    y = a sigmoid(a) b
    da = dy b s (1 + a (1 - s))        db = dy a s        with s = sigmoid(a)

Eager PyTorch moves five tensors (read a, write silu(a), read it, read b, write y), the
fused kernel three. Both wait on memory: expect 5/3 = 1.67 times. Backward moves five
(read dy, a, b, write da, db) and computes the sigmoid anew, which is free here.
Paper: Shazeer 2020, arXiv:2002.05202.
"""

import torch
from torch import Tensor

from minllama.architecture.kernels import (
    cdiv,
    first_derivative_only,
    launch,
    operator,
    takes_kernel,
    tl,
    triton,
)
from minllama.architecture.tuning import tuned

# 8 values, 16 bytes of bfloat16, a thread: one wide load each
SIZES = {"BLOCK": 1024, "num_warps": 4}


def swiglu_reference(a: Tensor, b: Tensor) -> Tensor:
    """The definition: silu(a) b, elementwise. (...) twice -> (...)."""
    return torch.nn.functional.silu(a) * b


@triton.jit
def _swiglu_forward(a_ptr, b_ptr, y_ptr, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    inside = at < n - start
    a = tl.load(a_ptr + start + at, mask=inside).to(tl.float32)
    b = tl.load(b_ptr + start + at, mask=inside).to(tl.float32)
    y = a * tl.sigmoid(a) * b
    tl.store(y_ptr + start + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(dy_ptr, a_ptr, b_ptr, da_ptr, db_ptr, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    inside = at < n - start
    a = tl.load(a_ptr + start + at, mask=inside).to(tl.float32)
    b = tl.load(b_ptr + start + at, mask=inside).to(tl.float32)
    dy = tl.load(dy_ptr + start + at, mask=inside).to(tl.float32)
    s = tl.sigmoid(a)
    da, db = dy * b * s * (1 + a * (1 - s)), dy * a * s
    tl.store(da_ptr + start + at, da.to(da_ptr.dtype.element_ty), mask=inside)
    tl.store(db_ptr + start + at, db.to(db_ptr.dtype.element_ty), mask=inside)


def _launch(kernel, *tensors: Tensor) -> None:
    x = tensors[0]
    sizes = tuned(kernel, (x.element_size(),), x.device, SIZES)
    launch(kernel, (cdiv(x.numel(), sizes["BLOCK"]),), *tensors, x.numel(), **sizes)


@operator(fake=lambda a, b: a.new_empty(a.shape))
def swiglu_forward(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) b."""
    y = a.new_empty(a.shape)
    _launch(_swiglu_forward, a.contiguous(), b.contiguous(), y)
    return y


@operator(fake=lambda dy, a, b: (a.new_empty(a.shape), b.new_empty(b.shape)))
def swiglu_backward(dy: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a and b."""
    da, db = a.new_empty(a.shape), b.new_empty(b.shape)
    tensors = (x.contiguous() for x in (dy, a, b))
    _launch(_swiglu_backward, *tensors, da, db)
    return da, db


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return swiglu_forward(a, b)

    @staticmethod
    def backward(ctx, dy):
        first_derivative_only("swiglu")
        return swiglu_backward(dy, *ctx.saved_tensors)


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) b, elementwise: the gate of the feed-forward. (...) twice -> (...).

    Inputs that are not contiguous are copied first.

    Raises:
        ValueError: two shapes or two dtypes, or a dtype or device that the kernel does
            not know.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(
            f"swiglu: a is {a.dtype} of shape {tuple(a.shape)}, b is {b.dtype} of "
            f"shape {tuple(b.shape)}; they must be alike."
        )
    if not takes_kernel("swiglu", a, b):
        return swiglu_reference(a, b)
    return _SwiGLU.apply(a, b)
