"""FlashAttention-2, forward: one program per tile of queries walks over the keys.

The softmax of a row needs the sum over all its keys, yet no row of scores is ever
whole. So a program carries, per query, the largest score so far and the sum and output
relative to it. A tile that raises the maximum shrinks the two that were carried:

    top' = max(top, max_j s_j)        shrink = 2 ** (top - top')
    total' = total shrink + sum_j 2 ** (s_j - top')
    o'     = o     shrink + sum_j 2 ** (s_j - top') v_j

and at the end o / total is exact. Of FlashAttention-1 this changes the order of loops:
queries outside, so o, top and total never leave the registers, programs of one head
work side by side, and o is divided once.

Scores are scaled by log2 e beforehand, since exp2 is the GPU's own instruction. Tiles
that no query sees are skipped; only tiles that are partly seen are masked.
Paper: Dao 2023, arXiv:2307.08691, section 3.1.
"""

import torch
from torch import Tensor

from minllama.architecture.kernels import cdiv, launch, next_power_of_2, tl, triton
from minllama.architecture.tuning import tuned
from minllama.fast_ops.flash_attention_tiles import (
    LOG2E,
    interval_of,
    load_tile,
    pointers,
    seen_keys,
    shared_memory,
    side_by_side,
    source,
    store_tile,
    takes_engine,
    whole_tiles,
)


@triton.jit
def _see_keys(
    o, top, total, q, k, v, b, h, begin, end, first, last, scale,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, ENGINE: tl.constexpr,
):  # fmt: skip
    for n in range(begin, end, BLOCK_N):
        keys = load_tile(k, b, n, h, BLOCK_N, D, BLOCK_D, ENGINE)
        scores = tl.dot(q, keys.T, input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        if MASKED:
            key = n + tl.arange(0, BLOCK_N)[None, :]
            seen = (key >= first[:, None]) & (key <= last[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        values = load_tile(v, b, n, h, BLOCK_N, D, BLOCK_D, ENGINE)
        o = o * shrink[:, None]
        o = tl.dot(p.to(values.dtype), values, o, input_precision="ieee")
        top = new_top
    return o, top, total


@triton.jit
def _flash_forward(
    q, k, v, o, lse_ptr, interval, T, S, scale,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INTERVAL: tl.constexpr, ENGINE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_M)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    start = (tiles - 1 - tile) * BLOCK_M  # the longest rows first, so all end together
    b, h = head // H, head % H
    query = start + tl.arange(0, BLOCK_M)
    first, last, begin, full_begin, full_end, end = seen_keys(
        interval, b, query, T, S, INTERVAL
    )
    begin, full_begin, full_end = whole_tiles(begin, full_begin, full_end, BLOCK_N)
    q_tile = load_tile(q, b, start, h, BLOCK_M, D, BLOCK_D, ENGINE)
    o_tile = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], -1e30, tl.float32)  # finite: -inf less -inf is no number
    total = tl.zeros([BLOCK_M], tl.float32)
    scale *= LOG2E
    if INTERVAL:
        o_tile, top, total = _see_keys(
            o_tile, top, total, q_tile, k, v, b, h // GROUP,
            begin, tl.minimum(full_begin, end), first, last, scale,
            True, D, BLOCK_D, BLOCK_N, ENGINE,
        )  # fmt: skip
    o_tile, top, total = _see_keys(
        o_tile, top, total, q_tile, k, v, b, h // GROUP,
        full_begin, full_end, first, last, scale,
        False, D, BLOCK_D, BLOCK_N, ENGINE,
    )  # fmt: skip
    o_tile, top, total = _see_keys(
        o_tile, top, total, q_tile, k, v, b, h // GROUP,
        full_end, end, first, last, scale,
        True, D, BLOCK_D, BLOCK_N, ENGINE,
    )  # fmt: skip
    some = total > 0  # a query that sees no key has the output 0
    total = tl.where(some, total, 1.0)
    o_tile = o_tile / total[:, None]
    lse = tl.where(some, (top + tl.log2(total)) / LOG2E, float("-inf"))
    store_tile(o, b, start, h, o_tile, BLOCK_M, D, BLOCK_D)
    tl.store(lse_ptr + head.to(tl.int64) * T + query, lse, query < T)


def tile_sizes(x: Tensor, kernel: str) -> dict[str, int]:
    """Rows of queries and of keys in a tile, warps and stages, for a width of head.

    Measured on an H200 (bf16, causal, T 4096). Four warps, which are one warp group of
    the matrix unit, win over eight: two to four programs share a multiprocessor, and
    while one is at its exponentials another multiplies. Sums held in registers set the
    other limit: dK and dV are two, so d = 128 takes 32 queries at a time.
    """
    block_d = max(16, next_power_of_2(x.size(-1)))
    rows = {
        "forward": (64, 64, 4, 3) if block_d <= 128 else (64, 32, 4, 3),
        "queries": (64, 64, 4, 3) if block_d <= 128 else (64, 32, 4, 3),
        "keys": {256: (32, 32, 4, 2), 128: (32, 64, 4, 3)}.get(block_d, (64, 64, 4, 3)),
    }[kernel]
    if x.dtype == torch.float32:  # exact products run outside of the matrix unit
        rows = (32, 32, 4 if block_d <= 64 else 8, 2)
    m, n, warps, stages = rows
    if shared_memory(x.device) < 160 * 1024:  # stages wait in shared memory
        stages = 2
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, last: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(B, T, H, d), (B, S, K, d) twice -> o (B, T, H, d), logsumexp (B, H, T)."""
    (B, T, H, d), (S, K) = q.shape, k.shape[1:3]
    q, k, v = (side_by_side(x) for x in (q, k, v))
    o = q.new_empty(B, T, H, d)
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    interval, mode = interval_of(first, last)
    engine, block_d = takes_engine(q, k, v), max(16, next_power_of_2(d))
    key = (block_d, q.element_size(), mode, engine)
    sizes = tuned(_flash_forward, key, q.device, tile_sizes(q, "forward"))
    m, n = sizes["BLOCK_M"], sizes["BLOCK_N"]
    launch(
        _flash_forward, (cdiv(T, m) * B * H,),
        source(q, m, block_d, engine), source(k, n, block_d, engine),
        source(v, n, block_d, engine), pointers(o), lse, interval,
        T, S, scale, H=H, GROUP=H // K, D=d, BLOCK_D=block_d,
        INTERVAL=mode, ENGINE=engine, **sizes,
    )  # fmt: skip
    return o, lse
