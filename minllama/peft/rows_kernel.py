"""The thin products of mixed rows, for a few tokens a row.

    low[i, t] = A[i] x[i, t]            y[i, t] += B[i] low[i, t]        i: a row

A new token has nothing to multiply: all of A and B is read once, and what counts is
that many programs read at the same time, and that there are few kernels. A program of
the first product takes a rank or two of one row; of the second, a stretch of what one
of the layers that share x puts out. A captured step of Llama 3.2 1B (H200) had 16 x 11
such products of `torch.bmm` and `baddbmm`, 4.9 us each; it has 16 x 8 of these. Texts
of many tokens are left to the library.
"""

import torch
from torch import Tensor

from minllama.architecture.kernels import (
    UPCAST,
    cdiv,
    launch,
    next_power_of_2,
    operator,
    takes_kernel,
    tl,
    triton,
)

FEW = 8  # tokens a row, at most
BLOCK = 256  # outputs of a program


def rows_down_reference(x: Tensor, a: Tensor) -> Tensor:
    """A x, row by row. (B, T, in), (B, R, in) -> (B, T, R)."""
    return torch.bmm(x, a.transpose(1, 2))


def rows_up_reference(ys: list[Tensor], low: Tensor, bs: list[Tensor]) -> list[Tensor]:
    """y += B low, row by row, in place, for layers whose parts of low are in a row.

    (B, T, out) each, (B, T, R), (B, r, out) each -> ys.
    """
    lows = low.split([b.size(1) for b in bs], dim=-1)
    return [y.baddbmm_(own, b) for y, own, b in zip(ys, lows, bs)]


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
    ys, bs, outs, ranks, low_ptr, T, R, COUNT: tl.constexpr, RANK: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, t = tl.program_id(0).to(tl.int64), tl.arange(0, TOKENS)[:, None]
    tile, rank = tl.program_id(1), tl.arange(0, RANK)
    low_ptr += (row * T + t) * R + rank[None, :]
    for layer in tl.static_range(COUNT):  # type: ignore[attr-defined]
        out, r = outs[layer], ranks[layer]
        if tile >= 0 and tile < tl.cdiv(out, BLOCK):  # this program's layer
            n = tile * BLOCK + tl.arange(0, BLOCK)[None, :]
            low = tl.load(low_ptr, mask=(t < T) & (rank < r)[None, :], other=0.0)
            at = bs[layer] + (row * r + rank[:, None]) * out + n
            b = tl.load(at, mask=(rank < r)[:, None] & (n < out), other=0.0)
            at, inside = ys[layer] + (row * T + t) * out + n, (t < T) & (n < out)
            y = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            if UPCAST:
                low, b = low.to(tl.float32), b.to(tl.float32)
            y = tl.dot(low, b, y, input_precision="ieee")
            tl.store(at, y.to(ys[layer].dtype.element_ty), mask=inside)
        tile -= tl.cdiv(out, BLOCK)
        low_ptr += r


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


@operator(fake=lambda ys, low, bs: None, mutates=("ys",))
def rows_up_(ys: list[Tensor], low: Tensor, bs: list[Tensor]) -> None:
    """y (B, T, out) += its part of low (B, T, R) times b (B, r, out), for each pair."""
    B, T, R = low.shape
    outs, ranks = tuple(y.size(2) for y in ys), tuple(b.size(1) for b in bs)
    launch(
        _rows_up, (B, sum(cdiv(out, BLOCK) for out in outs)), tuple(ys), tuple(bs),
        outs, ranks, low, T, R, COUNT=len(ys), TOKENS=16, BLOCK=BLOCK,
        RANK=max(16, next_power_of_2(max(ranks))), num_warps=4,
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


def rows_up(ys: list[Tensor], low: Tensor, bs: list[Tensor]) -> list[Tensor]:
    """As `rows_up_reference`. A row whose B is zero keeps its bits."""
    whole = all(x.is_contiguous() for x in (*ys, low, *bs))
    if not whole or not _fits("rows_up", *ys, low, *bs):
        return rows_up_reference(ys, low, bs)
    rows_up_(ys, low, bs)
    return ys
