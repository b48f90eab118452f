"""Softmax over the last dimension, for rows of any length, in one trip to memory.

    y = exp(x - max) / sum(exp(x - max))         dx = y (dy - sum(y dy))

A row of up to 16,384 values stays in registers: read once, written once. A longer one
is read twice, the second time from the cache, and the first pass is *online*: it finds
maximum m and sum s together, piece by piece. When a value x raises the maximum from m
to m', all that was summed was too large by exp(m - m'), so it is scaled:

    m' = max(m, x)        s' = s exp(m - m') + exp(x - m')

Each lane of a program keeps its own m and s, and the lanes are combined by the same
rule at the end. A lane takes 8 values in one step, so that 9 exponentials do what 16
did: in bfloat16 they, and not the memory, had set the pace (78 % of a copy at 32,768
columns, now 94). Flash attention is this rule with a matrix product in it. Arithmetic
is float32.
Paper: Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

import torch
from torch import Tensor

from minllama.architecture.kernels import (
    as_rows,
    cdiv,
    first_derivative_only,
    launch,
    next_power_of_2,
    operator,
    takes_kernel,
    tl,
    triton,
)
from minllama.architecture.tuning import tuned

FORWARD, BACKWARD = 16384, 32768  # longest row in registers: 32 values a thread
PIECE = {"BLOCK": 4096, "num_warps": 8, "num_stages": 1}  # of a longer one, backward
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32: where a maximum begins


def softmax_reference(x: Tensor) -> Tensor:
    """The definition, over the last dimension. (..., N) -> (..., N)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    e = (wide - wide.amax(-1, keepdim=True)).exp()
    return (e / e.sum(-1, keepdim=True)).to(x.dtype)


@triton.jit
def _softmax_forward(
    x_ptr, y_ptr, n_rows, N, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < n_rows) & (col < N)
    other = tl.where(row < n_rows, -float("inf"), 0.0)  # no row of nothing but -inf
    x = tl.load(x_ptr + row * stride + col, mask=inside, other=other).to(tl.float32)
    e = tl.exp(x - tl.max(x, axis=1, keep_dims=True))
    y = (e * (1 / tl.sum(e, axis=1, keep_dims=True))).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * N + col, y, mask=inside)


@triton.jit
def _softmax_backward(
    dy_ptr, y_ptr, dx_ptr, n_rows, N, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # newest first: still cached
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < n_rows) & (col < N)
    dy = tl.load(dy_ptr + row * stride + col, mask=inside, other=0.0)
    y = tl.load(y_ptr + row * N + col, mask=inside, other=0.0)
    dy, y = dy.to(tl.float32), y.to(tl.float32)
    dx = (y * (dy - tl.sum(y * dy, axis=1, keep_dims=True))).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + row * N + col, dx, mask=inside)


@triton.jit
def _softmax_forward_online(
    x_ptr, y_ptr, N, stride, LANES: tl.constexpr, EACH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr, y_ptr = x_ptr + row * stride, y_ptr + row * N
    place = tl.arange(0, EACH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    top = tl.full((LANES,), LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, N, EACH * LANES):
        at = start + place
        x = tl.load(
            x_ptr + at, mask=at < N, other=-float("inf"), eviction_policy="evict_last"
        ).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, axis=0))
        e = tl.exp(x - new_top[None, :])  # (EACH, LANES)
        total = total * tl.exp(top - new_top) + tl.sum(e, axis=0)
        top = new_top
    row_top = tl.max(top, axis=0)
    inverse = 1 / tl.sum(total * tl.exp(top - row_top), axis=0)
    for start in range(0, N, EACH * LANES):
        at = start + place
        x = tl.load(x_ptr + at, mask=at < N, other=0.0, eviction_policy="evict_first")
        y = (tl.exp(x.to(tl.float32) - row_top) * inverse).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + at, y, mask=at < N, eviction_policy="evict_first")


@triton.jit
def _softmax_backward_long(dy_ptr, y_ptr, dx_ptr, N, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    dy_ptr, y_ptr, dx_ptr = dy_ptr + row * stride, y_ptr + row * N, dx_ptr + row * N
    col, along = tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        at = start + col
        dy = tl.load(dy_ptr + at, mask=at < N, other=0.0).to(tl.float32)
        along += dy * tl.load(y_ptr + at, mask=at < N, other=0.0).to(tl.float32)
    mean = tl.sum(along, axis=0)
    for start in range(0, N, BLOCK):
        at = start + col
        dy = tl.load(dy_ptr + at, mask=at < N, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + at, mask=at < N, other=0.0).to(tl.float32)
        dx = y * (dy - mean)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=at < N)


def sizes(N: int, most: int = 32) -> dict[str, int]:
    """Rows a program and its warps: 16 values a thread, two wide loads of bfloat16."""
    block = next_power_of_2(N)
    rows = max(1, 2048 // block)
    return {"ROWS": rows, "num_warps": min(rows * block // 512, most)}


def online_sizes(x: Tensor) -> dict[str, int]:
    """Lanes, values that each takes in a step, and warps.

    The best of those measured on an H200, for rows of 20,000 to 128,256. Beyond 192 KiB
    these are fewer and larger programs, whose rows fit into the cache together.
    """
    long = x.size(-1) * x.element_size() > 3 * 2**16
    warps = 16 if long or x.element_size() > 2 else 8
    return {"LANES": 4096 if long else 2048, "EACH": 8, "num_warps": warps}


@operator(fake=lambda x: x.new_empty(x.shape))
def softmax_forward(x: Tensor) -> Tensor:
    """Softmax over the last dimension."""
    y, N, x2 = x.new_empty(x.shape), x.size(-1), as_rows(x)
    rows, block = x2.size(0), next_power_of_2(N)
    key = (block, x.element_size())
    if N > FORWARD:
        meta = tuned(_softmax_forward_online, key, x.device, online_sizes(x2))
        launch(_softmax_forward_online, (rows,), x2, y, N, x2.stride(0), **meta)
    else:
        meta = tuned(_softmax_forward, key, x.device, sizes(N))
        launch(
            _softmax_forward, (cdiv(rows, meta["ROWS"]),), x2, y, rows, N,
            x2.stride(0), BLOCK=block, **meta,
        )  # fmt: skip
    return y


@operator(fake=lambda dy, y: y.new_empty(y.shape))
def softmax_backward(dy: Tensor, y: Tensor) -> Tensor:
    """Gradient of the input, from the contiguous output and its gradient."""
    dx, N, dy2 = y.new_empty(y.shape), y.size(-1), as_rows(dy)
    y = y.contiguous()
    rows, block = dy2.size(0), next_power_of_2(N)
    key = (block, y.element_size())
    if N > BACKWARD:
        meta = tuned(_softmax_backward_long, key, y.device, PIECE)
        launch(_softmax_backward_long, (rows,), dy2, y, dx, N, dy2.stride(0), **meta)
    else:  # 32 warps have 64 registers a thread: too few
        meta = tuned(_softmax_backward, key, y.device, sizes(N, most=16))
        launch(
            _softmax_backward, (cdiv(rows, meta["ROWS"]),), dy2, y, dx, rows, N,
            dy2.stride(0), BLOCK=block, **meta,
        )  # fmt: skip
    return dx


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = softmax_forward(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        first_derivative_only("softmax")
        (y,) = ctx.saved_tensors
        return softmax_backward(dy, y)


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension, in the dtype of x. (..., N) -> (..., N).

    Raises:
        ValueError: a number without dimension, or a dtype or device that the kernel
            does not know.
    """
    if x.dim() == 0:
        raise ValueError("softmax: x of shape () has no last dimension; give (..., N).")
    if not takes_kernel("softmax", x) or x.numel() == 0:
        return softmax_reference(x) if x.numel() else x.clone()
    return _Softmax.apply(x)
