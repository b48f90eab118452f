"""What the kernels of flash attention share: a tile of rows, and who sees which keys.

A tile is what one program holds at a time: some rows of one head, in registers or in
shared memory. It comes through pointers, which every GPU can read, or through a tensor
descriptor: Hopper's copy engine then finds the addresses and fills in the zeros, which
frees registers (measured on an H200 at d = 64 and 128: kernels 4 to 26 % faster).
"""

from functools import cache

import torch
from torch import Tensor

from minllama.architecture.kernels import HAS_TRITON, UPCAST, tl, triton

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

ENGINE_SIZES = (2,)  # bytes of a number: wider ones are not worth a tile of it
LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = 2 ** (x log2 e), one instruction


@triton.jit
def load_tile(
    x, b, start, h, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ENGINE: tl.constexpr,
):  # fmt: skip
    """Rows start .. start + ROWS of text b, head h; zeros past its end and beyond D."""
    if ENGINE:
        tile = x.load([b, start, h, 0]).reshape(ROWS, BLOCK_D)
    else:
        base, length, stride_b, stride_t, stride_h = x
        row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
        inside = (start + row < length)[:, None] & (column < D)[None, :]
        base += tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h
        base += tl.cast(start, tl.int64) * stride_t  # 64 bits here, 32 inside a tile
        tile = tl.load(base + row[:, None] * stride_t + column[None, :], inside, 0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_tile(
    x, b, start, h, tile, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The other way: the rows that exist, D columns wide."""
    base, length, stride_b, stride_t, stride_h = x
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    inside = (start + row < length)[:, None] & (column < D)[None, :]
    base += tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h
    base += tl.cast(start, tl.int64) * stride_t
    tile = tile.to(base.dtype.element_ty)
    tl.store(base + row[:, None] * stride_t + column[None, :], tile, inside)


@triton.jit
def seen_keys(interval, b, query, T, S, INTERVAL: tl.constexpr):
    """First and last key that each query sees, and four bounds for the whole tile.

    Some query sees a key of begin .. end; all see every key of full_begin .. full_end.
    INTERVAL is 0 for a triangle, 1 where every `first` is 0, and 2 with both given.
    """
    if INTERVAL:
        first_ptr, last_ptr, first_b, first_t, last_b, last_t = interval
        real, b = query < T, tl.cast(b, tl.int64)
        last = tl.load(last_ptr + b * last_b + query * last_t, real, -1)
        last = tl.minimum(tl.maximum(last, -1), S - 1).to(tl.int32)  # after its bounds
        first = tl.where(real, 0, S)
        if INTERVAL == 2:
            first = tl.load(first_ptr + b * first_b + query * first_t, real, S)
            first = tl.minimum(tl.maximum(first, 0), S).to(tl.int32)
        begin, end = tl.min(first), tl.max(last) + 1
        full_begin = tl.maximum(tl.max(tl.where(real, first, 0)), begin)
        full_end = tl.min(tl.where(real, last, S - 1)) + 1
    else:  # a triangle: the newest T of S keys are the queries' own
        last = query + (S - T)
        first = last * 0
        begin, full_begin = 0, 0
        full_end = tl.min(last) + 1
        end = tl.minimum(tl.max(last) + 1, S)
    return first, last, begin, full_begin, full_end, end


@triton.jit
def whole_tiles(begin, full_begin, full_end, SIZE: tl.constexpr):
    """The same bounds, moved to borders of tiles; full_begin <= full_end."""
    begin = begin // SIZE * SIZE
    full_begin = tl.cdiv(full_begin, SIZE) * SIZE
    full_end = tl.maximum(full_end // SIZE * SIZE, full_begin)
    return begin, full_begin, full_end


def pointers(x: Tensor) -> tuple:
    """What `load_tile` takes where ENGINE is False. (B, T, H, d)."""
    return (x, x.size(1), x.stride(0), x.stride(1), x.stride(2))


def source(x: Tensor, rows: int, block_d: int, engine: bool):
    """What `load_tile` takes to read `rows` rows of a head of x (B, T, H, d)."""
    if not engine:
        return pointers(x)
    box = [1, rows, 1, block_d]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box)


def side_by_side(x: Tensor) -> Tensor:
    """x, or a copy whose last dimension is contiguous."""
    return x if x.stride(-1) == 1 or x.size(-1) == 1 else x.contiguous()


def takes_engine(*tensors: Tensor) -> bool:
    """Whether the copy engine can read these: Hopper or newer, 16-byte steps."""
    return has_engine(tensors[0].device) and all(
        x.element_size() in ENGINE_SIZES
        and x.data_ptr() % 16 == 0
        and x.stride(-1) == 1
        and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:-1])
        for x in tensors
    )


@cache
def has_engine(device: torch.device) -> bool:
    """NVIDIA's Hopper or newer: a copy engine, and kernels that wait on the GPU."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that one program may use; as much as an H200's while interpreting."""
    if device.type != "cuda":
        return 227 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def interval_of(first: Tensor | None, last: Tensor | None) -> tuple:
    """What `seen_keys` takes, and its INTERVAL. A shared row has a step of 0."""
    if last is None:
        return None, 0
    mode, first = (1, last) if first is None else (2, first)
    first_b, last_b = (x.stride(0) if x.size(0) > 1 else 0 for x in (first, last))
    return (first, last, first_b, first.stride(1), last_b, last.stride(1)), mode
