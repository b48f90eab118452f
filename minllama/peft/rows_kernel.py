"""The thin products of mixed rows, for a few tokens a row.

    low[i, t] = A[i] x[i, t]            y[i, t] += B[i] low[i, t]        i: a row

A new token has nothing to multiply: all of A and B is read once, and what counts is
that many programs read at the same time. A program of the first product takes a rank or
two of one row; of the second, a stretch of the output.

On an H200 a captured step of Llama 3.2 1B has 16 x 11 such products; `torch.bmm` and
`baddbmm` took 4.9 us each, these 2.5. Texts of many tokens are left to the library.
"""

import torch
from torch import Tensor

from minllama.architecture.kernels import (
    cdiv,
    launch,
    next_power_of_2,
    operator,
    takes_kernel,
    tl,
    triton,
)

FEW = 8  # tokens a row, at most
MOST = 64  # ranks: the loop over them is unrolled, so that all loads are under way


def rows_down_reference(x: Tensor, a: Tensor) -> Tensor:
    """A x, row by row. (B, T, in), (B, R, in) -> (B, T, R)."""
    return torch.bmm(x, a.transpose(1, 2))


def rows_up_reference(y: Tensor, low: Tensor, b: Tensor) -> Tensor:
    """y += B low, row by row, in place. (B, T, out), (B, T, r), (B, r, out) -> y."""
    return y.baddbmm_(low, b)


@triton.jit
def _rows_down(
    x_ptr, a_ptr, low_ptr, T, R, IN, x_row, x_token, a_row,
    RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, t = tl.program_id(0).to(tl.int64) // T, tl.program_id(0).to(tl.int64) % T
    rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)[:, None]
    total = tl.zeros((RANKS, BLOCK), tl.float32)
    for start in range(0, IN, BLOCK):
        i = start + tl.arange(0, BLOCK)[None, :]
        x = tl.load(x_ptr + row * x_row + t * x_token + i, mask=i < IN, other=0.0)
        inside = (rank < R) & (i < IN)
        a = tl.load(a_ptr + row * a_row + rank * IN + i, mask=inside, other=0.0)
        total += a.to(tl.float32) * x.to(tl.float32)
    low = tl.sum(total, axis=1, keep_dims=True)
    at = low_ptr + tl.program_id(0).to(tl.int64) * R + rank
    tl.store(at, low.to(low_ptr.dtype.element_ty), mask=rank < R)


@triton.jit
def _rows_up(
    y_ptr, low_ptr, b_ptr, T, OUT, y_row, y_token, low_row, low_token, b_row,
    RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, t = tl.program_id(0).to(tl.int64) // T, tl.program_id(0).to(tl.int64) % T
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y_ptr += row * y_row + t * y_token + n
    low_ptr += row * low_row + t * low_token
    b_ptr += row * b_row + n
    y = tl.load(y_ptr, mask=n < OUT, other=0.0).to(tl.float32)
    for rank in tl.static_range(RANK):  # type: ignore[attr-defined]
        b = tl.load(b_ptr + rank * OUT, mask=n < OUT, other=0.0)
        y += tl.load(low_ptr + rank).to(tl.float32) * b.to(tl.float32)
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=n < OUT)


@operator(fake=lambda x, a: x.new_empty(x.size(0), x.size(1), a.size(1)))
def rows_down_few(x: Tensor, a: Tensor) -> Tensor:
    """(B, T, in), (B, R, in) -> (B, T, R), for few tokens a row."""
    (B, T, d_in), R = x.shape, a.size(1)
    low = x.new_empty(B, T, R)
    block = min(next_power_of_2(d_in), 8192)
    ranks = max(1, 4096 // block)
    launch(
        _rows_down, (B * T, cdiv(R, ranks)), x, a, low, T, R, d_in,
        x.stride(0), x.stride(1), a.stride(0), RANKS=ranks, BLOCK=block,
        num_warps=max(1, ranks * block // 512),  # 16 values a thread
    )  # fmt: skip
    return low


@operator(fake=lambda y, low, b: None, mutates=("y",))
def rows_up_(y: Tensor, low: Tensor, b: Tensor) -> None:
    """y (B, T, out) += low (B, T, r) times b (B, r, out)."""
    (B, T, out), r = y.shape, b.size(1)
    launch(
        _rows_up, (B * T, cdiv(out, 256)), y, low, b, T, out,
        y.stride(0), y.stride(1), low.stride(0), low.stride(1), b.stride(0),
        RANK=r, BLOCK=256, num_warps=1,
    )  # fmt: skip


def _fits(op: str, *tensors: Tensor) -> bool:
    x = tensors[0]
    alike = all(t.dtype == x.dtype and t.stride(-1) == 1 for t in tensors)
    few = x.size(1) <= FEW and not torch.is_grad_enabled()
    return few and alike and takes_kernel(op, *tensors)


def rows_down(x: Tensor, a: Tensor) -> Tensor:
    """A x, row by row. (B, T, in), (B, R, in) -> (B, T, R)."""
    if _fits("rows_down", x, a):
        return rows_down_few(x, a.contiguous())
    return rows_down_reference(x, a)


def rows_up(y: Tensor, low: Tensor, b: Tensor) -> Tensor:
    """y += B low, in place and without gradient. (B, T, out), (B, T, r), (B, r, out).

    A row whose B is zero keeps its bits.
    """
    if b.size(1) > MOST or not _fits("rows_up", y, low, b):
        return rows_up_reference(y, low, b)
    rows_up_(y, low, b.contiguous())
    return y
