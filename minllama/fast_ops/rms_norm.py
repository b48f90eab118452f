"""Root-mean-square norm, alone or with the addition before it, in one trip to memory.

    s = x + residual                       (add_rms_norm only)
    y = w s / rms(s)                       rms(s) = sqrt(mean(s^2) + eps)

    ds = (w dy - s mean(w dy s) / rms^2) / rms          dw = sum over rows of dy s / rms

A row fits into the registers of one program, so it is read once and written once: 2
values per element forward, 3 backward (4 and 4 with the addition). What costs the
backward pass its speed is dw, a sum over all rows. So its programs stay (two of 4,096
columns a multiprocessor, each walking down every n-th row), add it up in registers, and
write only as many partial rows as there are programs, which a small kernel sums. While
such a program works on a row, the next two are on their way to shared memory: without
that, few programs could not keep the memory busy. Forward has no such sum, and one
program a row is faster there.

Statistics and sums are float32; the order of all sums is fixed, so gradients repeat.
Paper: Zhang and Sennrich 2019, arXiv:1910.07467.
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
    processors,
    takes_kernel,
    tl,
    triton,
)
from minllama.architecture.tuning import tuned

HELD = 8192  # values in the backward programs of a multiprocessor: 2 rows of 4096
MAX_WIDTH = 32768  # a row in registers: 32 float32 a thread of the largest program


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """The definition: w x / sqrt(mean(x^2) + eps). (..., D), (D,) -> (..., D)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rms = wide.square().mean(-1, keepdim=True).add(eps).sqrt()  # (..., 1)
    return (wide / rms * weight).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The definition: s = x + residual, and its norm. Twice (..., D) -> (..., D)."""
    total = x + residual
    return total, rms_norm_reference(total, weight, eps)


@triton.jit
def _rms_norm_forward(
    x_ptr, r_ptr, w_ptr, s_ptr, y_ptr, n_rows, D, x_stride, r_stride, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < n_rows) & (col < D)
    x = tl.load(x_ptr + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + col, mask=col < D, other=0.0, eviction_policy="evict_last")
    w = w.to(tl.float32)  # the same for all programs: worth its place in the cache
    if ADD:
        r = tl.load(r_ptr + row * r_stride + col, mask=inside, other=0.0)
        total = (x + r.to(tl.float32)).to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + row * D + col, total, mask=inside)
        x = total.to(tl.float32)  # the norm sees what was stored
    inverse = 1 / tl.sqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + eps)
    y = (x * inverse * w).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * D + col, y, mask=inside)


@triton.jit
def _rms_norm_backward(
    dy_ptr, ds_ptr, x_ptr, w_ptr, dx_ptr, dw_ptr, n_rows, D, dy_stride, ds_stride,
    x_stride, eps, ADD: tl.constexpr, WEIGHT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    col = tl.arange(0, BLOCK)[None, :]
    w = tl.load(w_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(program * ROWS, n_rows, programs * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < n_rows) & (col < D)
        x = tl.load(x_ptr + row * x_stride + col, mask=inside, other=0.0)
        dy = tl.load(dy_ptr + row * dy_stride + col, mask=inside, other=0.0)
        x, dy = x.to(tl.float32), dy.to(tl.float32)
        square = tl.sum(x * x, axis=1, keep_dims=True) / D
        along = tl.sum(dy * w * x, axis=1, keep_dims=True) / D
        inverse = 1 / tl.sqrt(square + eps)  # found anew: a row is here anyway
        x_hat = x * inverse
        dx = (dy * w - x_hat * along * inverse) * inverse
        if ADD:
            ds = tl.load(ds_ptr + row * ds_stride + col, mask=inside, other=0.0)
            dx += ds.to(tl.float32)
        tl.store(dx_ptr + row * D + col, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if WEIGHT:
            dw += dy * x_hat
    if WEIGHT:
        at = dw_ptr + program * D + col
        tl.store(at, tl.sum(dw, axis=0, keep_dims=True), mask=col < D)


@triton.jit
def _sum_rows(part_ptr, out_ptr, n_rows, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, n_rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        at = part_ptr + row * D + col
        total += tl.load(at, mask=(row < n_rows) & (col < D), other=0.0)
    out = tl.sum(total, axis=0, keep_dims=True).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + col, out, mask=col < D)


def sizes(D: int) -> dict[str, int]:
    """Rows a program and its warps: 16 values a thread, two wide loads of bfloat16."""
    block = next_power_of_2(D)
    rows = max(1, 2048 // block)
    return {"ROWS": rows, "num_warps": min(rows * block // 512, 32)}


def backward_sizes(D: int, value_bytes: int) -> dict[str, int]:
    """As forward; programs a multiprocessor, and stages of their loop.

    Two rows are on their way if 64 KiB of shared memory hold them. Measured on an H200,
    16384 x 4096 bfloat16, forward and backward: three stages 175 us, two 202, one (no
    row fetched ahead) 216.
    """
    common = sizes(D)
    held = common["ROWS"] * next_power_of_2(D)
    ahead = min(2**16 // (held * value_bytes), 2)
    return {**common, "PROGRAMS": max(1, HELD // held), "STAGES": 1 + ahead}


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    D = x.size(-1)
    dtype = x.dtype if residual is None else _sum_dtype(x, residual)
    y = x.new_empty(x.shape, dtype=dtype)
    total = y if residual is None else torch.empty_like(y)
    x2 = as_rows(x)
    r2 = x2 if residual is None else as_rows(residual)
    block, adds = next_power_of_2(D), residual is not None
    key = (block, x.element_size(), adds)
    meta = tuned(_rms_norm_forward, key, x.device, sizes(D))
    launch(
        _rms_norm_forward, (cdiv(x2.size(0), meta["ROWS"]),),
        x2, r2, weight.contiguous(), total, y, x2.size(0), D, x2.stride(0),
        r2.stride(0), eps, ADD=adds, BLOCK=block, **meta,
    )  # fmt: skip
    return total, y


def _backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, weight: Tensor, eps: float, need_dw: bool
) -> tuple[Tensor, Tensor]:
    D, dx = x.size(-1), x.new_empty(x.shape)
    x2, dy2 = as_rows(x), as_rows(dy)
    ds2 = dy2 if ds is None else as_rows(ds)
    block, value_bytes = next_power_of_2(D), x.element_size() * (2 if ds is None else 3)
    meta = tuned(
        _rms_norm_backward, (block, value_bytes), x.device,
        backward_sizes(D, value_bytes),
    )  # fmt: skip
    per = meta.pop("PROGRAMS")
    n = min(cdiv(x2.size(0), meta["ROWS"]), per * processors(x.device))
    shape = (n if need_dw else 0, D)
    part = x.new_empty(shape, dtype=torch.float32)
    launch(
        _rms_norm_backward, (n,), dy2, ds2, x2, weight.contiguous(), dx, part,
        x2.size(0), D, dy2.stride(0), ds2.stride(0), x2.stride(0), eps,
        ADD=ds is not None, WEIGHT=need_dw, BLOCK=block, **meta,
    )  # fmt: skip
    if not need_dw:
        return dx, weight.new_empty(0)
    dw = weight.new_empty(D)
    launch(
        _sum_rows, (cdiv(D, 32),), part, dw, n, D,
        ROWS=32, BLOCK=32, num_warps=4,
    )  # fmt: skip
    return dx, dw


def _sum_dtype(x: Tensor, residual: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, residual.dtype)


def _fake_backward(dy, x, weight, eps, need_dw):
    return x.new_empty(x.shape), weight.new_empty(weight.size(0) if need_dw else 0)


@operator(fake=lambda x, weight, eps: x.new_empty(x.shape))
def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(..., D), (D,) -> (..., D)."""
    return _forward(x, None, weight, eps)[1]


@operator(fake=_fake_backward)
def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, need_dw: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; the latter empty unless `need_dw`."""
    return _backward(dy, None, x, weight, eps, need_dw)


def _fake_add_forward(x, residual, weight, eps):
    total = x.new_empty(x.shape, dtype=_sum_dtype(x, residual))
    return total, torch.empty_like(total)


def _fake_add_backward(dy, ds, total, weight, eps, need_dw):
    return _fake_backward(dy, total, weight, eps, need_dw)


@operator(fake=_fake_add_forward)
def add_rms_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + residual, and its norm."""
    return _forward(x, residual, weight, eps)


@operator(fake=_fake_add_backward)
def add_rms_norm_backward(
    dy: Tensor, ds: Tensor, total: Tensor, weight: Tensor, eps: float, need_dw: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of the sum, which is that of both summands, and of weight."""
    return _backward(dy, ds, total, weight, eps, need_dw)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm_forward(x, weight, eps)

    @staticmethod
    def backward(ctx, dy):
        first_derivative_only("rms_norm")
        x, weight = ctx.saved_tensors
        need_dw = ctx.needs_input_grad[1]
        dx, dw = rms_norm_backward(dy, x, weight, ctx.eps, need_dw)
        return dx, dw if need_dw else None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        total, y = add_rms_norm_forward(x, residual, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.dtypes = eps, (x.dtype, residual.dtype)
        return total, y

    @staticmethod
    def backward(ctx, ds, dy):
        first_derivative_only("add_rms_norm")
        total, weight = ctx.saved_tensors
        need_dw = ctx.needs_input_grad[2]
        d, dw = add_rms_norm_backward(dy, ds, total, weight, ctx.eps, need_dw)
        dx, dr = (d.to(dtype) for dtype in ctx.dtypes)
        return dx, dr, dw if need_dw else None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """w x / sqrt(mean(x^2) + eps) over the last dimension. (..., D), (D,) -> (..., D).

    Raises:
        ValueError: weight is not (D,), a row is too long for one program, or a dtype or
            device that the kernel does not know.
    """
    _check("rms_norm", x, weight)
    if not takes_kernel("rms_norm", x, weight):
        return rms_norm_reference(x, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """s = x + residual, and rms_norm(s): the residual stream, and what is read off it.

    Twice (..., D) -> twice (..., D). The sum is rounded to its dtype before the norm,
    as it is where the two are done apart.

    Raises:
        ValueError: as `rms_norm`, or summands of two shapes.
    """
    if x.shape != residual.shape:
        raise ValueError(
            f"add_rms_norm: x of shape {tuple(x.shape)} and residual of shape "
            f"{tuple(residual.shape)} must be alike; expand one first."
        )
    _check("add_rms_norm", x, weight)
    if not takes_kernel("add_rms_norm", x, residual, weight):
        return add_rms_norm_reference(x, residual, weight, eps)
    return _AddRMSNorm.apply(x, residual, weight, eps)


def _check(op: str, x: Tensor, weight: Tensor) -> None:
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{op}: weight of shape {tuple(weight.shape)} does not fit x of shape "
            f"{tuple(x.shape)}; give one weight per channel, (D,)."
        )
    if x.size(-1) > MAX_WIDTH:
        raise ValueError(
            f"{op}: D={x.size(-1)} is more than the {MAX_WIDTH} that one program "
            f"holds; call {op}_reference."
        )
