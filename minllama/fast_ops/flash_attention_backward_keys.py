"""FlashAttention-2, backward for keys and values: one program per tile of keys.

It walks over the queries that see the tile, of all query heads that share the key head,
so the sum over those heads needs no second kernel. Which queries these are is plain for
a triangle; for intervals a small kernel finds the range once for all heads. A range may
hold queries that see nothing of the tile: masked, they cost time and no more.
Paper: Dao 2023, arXiv:2307.08691, algorithm 2.
"""

import torch

from minllama.architecture.kernels import cdiv, launch, tl, triton
from minllama.fast_ops.flash_attention_tiles import (
    LOG2E,
    load_tile,
    seen_keys,
    store_tile,
    whole_tiles,
)


@triton.jit
def _seeing_queries(
    ranges_ptr, interval, T, S, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    INTERVAL: tl.constexpr,
):  # fmt: skip
    """Which queries see some key of a tile, and which run of them sees all."""
    tiles = tl.cdiv(S, BLOCK_N)
    tile, b = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    low = tile * BLOCK_N
    high = tl.minimum(low + BLOCK_N, S) - 1
    begin, end = tl.full([CHUNK], T, tl.int32), tl.zeros([CHUNK], tl.int32)
    full_begin, full_end, full = begin, end, end
    for t in range(0, T, CHUNK):
        query = t + tl.arange(0, CHUNK)
        first, last, _, _, _, _ = seen_keys(interval, b, query, T, S, INTERVAL)
        some = (first <= high) & (last >= low)
        every = (first <= low) & (last >= high)
        begin = tl.minimum(begin, tl.where(some, query, T))
        end = tl.maximum(end, tl.where(some, query + 1, 0))
        full_begin = tl.minimum(full_begin, tl.where(every, query, T))
        full_end = tl.maximum(full_end, tl.where(every, query + 1, 0))
        full += every.to(tl.int32)
    start, stop = tl.min(full_begin), tl.max(full_end)
    start = tl.where(stop - start == tl.sum(full), start, T)  # with holes: mask them
    ranges_ptr += tl.program_id(0).to(tl.int64) * 4
    tl.store(ranges_ptr, tl.min(begin))
    tl.store(ranges_ptr + 1, start)
    tl.store(ranges_ptr + 2, stop)
    tl.store(ranges_ptr + 3, tl.max(end))


@triton.jit
def _see_queries(
    dk, dv, q, do, lse_ptr, delta_ptr, k, v, b, h, key, begin, end, interval, T, S,
    scale, MASKED: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    INTERVAL: tl.constexpr, ENGINE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(end - begin, BLOCK_M)
    for i in range(0, tiles * GROUP):  # one loop over heads and tiles: no seams
        head, m = h * GROUP + i // tiles, begin + i % tiles * BLOCK_M
        queries = load_tile(q, b, m, head, BLOCK_M, D, BLOCK_D, ENGINE)
        douts = load_tile(do, b, m, head, BLOCK_M, D, BLOCK_D, ENGINE)
        query = m + tl.arange(0, BLOCK_M)
        at = tl.cast(b * H + head, tl.int64) * T + query
        lse = tl.load(lse_ptr + at, query < T, 0.0) * LOG2E
        delta = tl.load(delta_ptr + at, query < T, 0.0)
        scores = tl.dot(k, queries.T, input_precision="ieee")  # (BLOCK_N, BLOCK_M)
        scores = scores * scale - lse[None, :]
        if MASKED:
            first, last, _, _, _, _ = seen_keys(interval, b, query, T, S, INTERVAL)
            seen = (key >= first[None, :]) & (key <= last[None, :])
            scores = tl.where(seen, scores, float("-inf"))
        p = tl.exp2(scores)
        dv = tl.dot(p.to(douts.dtype), douts, dv, input_precision="ieee")
        dp = tl.dot(v, douts.T, input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _flash_backward_keys(
    q, k, v, do, dk, dv, lse_ptr, delta_ptr, interval, ranges, T, S, scale,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INTERVAL: tl.constexpr, ENGINE: tl.constexpr,
):  # fmt: skip
    tiles, heads = tl.cdiv(S, BLOCK_N), H // GROUP
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    start, b, h = tile * BLOCK_N, head // heads, head % heads
    key = start + tl.arange(0, BLOCK_N)[:, None]
    if INTERVAL:
        ranges_ptr, ranges_b = ranges
        ranges_ptr += b * ranges_b + tile * 4
        begin, full_begin = tl.load(ranges_ptr), tl.load(ranges_ptr + 1)
        full_end, end = tl.load(ranges_ptr + 2), tl.load(ranges_ptr + 3)
    else:
        begin = tl.maximum(start - (S - T), 0)
        full_begin = tl.minimum(tl.maximum(start + BLOCK_N - 1 - (S - T), 0), T)
        full_end, end = T, T
    begin, full_begin, full_tiles_end = whole_tiles(
        begin, full_begin, full_end, BLOCK_M
    )
    if INTERVAL:
        full_end = (
            full_tiles_end  # of a triangle, the last tile may be short: all zeros
        )
    k_tile = load_tile(k, b, start, h, BLOCK_N, D, BLOCK_D, ENGINE)
    v_tile = load_tile(v, b, start, h, BLOCK_N, D, BLOCK_D, ENGINE)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dk_tile, dv_tile = _see_queries(
        dk_tile, dv_tile, q, do, lse_ptr, delta_ptr, k_tile, v_tile, b, h, key,
        begin, tl.minimum(full_begin, end), interval, T, S, scale * LOG2E,
        True, H, GROUP, D, BLOCK_D, BLOCK_M, INTERVAL, ENGINE,
    )  # fmt: skip
    dk_tile, dv_tile = _see_queries(
        dk_tile, dv_tile, q, do, lse_ptr, delta_ptr, k_tile, v_tile, b, h, key,
        full_begin, full_end, interval, T, S, scale * LOG2E,
        False, H, GROUP, D, BLOCK_D, BLOCK_M, INTERVAL, ENGINE,
    )  # fmt: skip
    if INTERVAL:
        dk_tile, dv_tile = _see_queries(
            dk_tile, dv_tile, q, do, lse_ptr, delta_ptr, k_tile, v_tile, b, h, key,
            full_end, end, interval, T, S, scale * LOG2E,
            True, H, GROUP, D, BLOCK_D, BLOCK_M, INTERVAL, ENGINE,
        )  # fmt: skip
    store_tile(dk, b, start, h, dk_tile * scale, BLOCK_N, D, BLOCK_D)
    store_tile(dv, b, start, h, dv_tile, BLOCK_N, D, BLOCK_D)


def query_ranges(interval: tuple | None, mode: int, T: int, S: int, n: int):
    """For each tile of n keys: queries that see some, and those that see all."""
    if interval is None:
        return None
    first, last = interval[:2]
    rows, tiles = max(first.size(0), last.size(0)), cdiv(S, n)
    ranges = first.new_empty(rows, tiles, 4, dtype=torch.int32)
    grid = (rows * tiles,)
    launch(
        _seeing_queries, grid, ranges, interval, T, S,
        BLOCK_N=n, CHUNK=1024, INTERVAL=mode,
    )  # fmt: skip
    return ranges, ranges.stride(0) if rows > 1 else 0
