"""FlashAttention-2, backward: probabilities are made again, never stored.

With p = exp(s - lse) from the logsumexp that forward kept, one row of scores gives

    dv_j += p_j do      dp_j = do . v_j      ds_j = p_j (dp_j - delta)
    dq   += ds_j k_j    dk_j += ds_j q       delta = o . do  (= sum_j p_j dp_j)

Two kernels, because a sum that stays in registers needs neither atomics nor an order:
one has a tile of queries and walks over the keys (dq, and delta on the way; below), the
other a tile of keys and walks over the queries (flash_attention_backward_keys.py). That
is seven matrix products where one kernel with atomics needs five, and it gives the same
bits each time.
Paper: Dao 2023, arXiv:2307.08691, algorithm 2.
"""

import torch
from torch import Tensor

from minllama.architecture.kernels import cdiv, launch, next_power_of_2, tl, triton
from minllama.architecture.tuning import tuned
from minllama.fast_ops.flash_attention_backward_keys import (
    _flash_backward_keys,
    query_ranges,
)
from minllama.fast_ops.flash_attention_forward import tile_sizes
from minllama.fast_ops.flash_attention_tiles import (
    LOG2E,
    interval_of,
    load_tile,
    pointers,
    seen_keys,
    side_by_side,
    source,
    store_tile,
    takes_engine,
    whole_tiles,
)


@triton.jit
def _see_keys(
    dq, q, do, lse, delta, k, v, b, h, begin, end, first, last, scale,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, ENGINE: tl.constexpr,
):  # fmt: skip
    for n in range(begin, end, BLOCK_N):
        keys = load_tile(k, b, n, h, BLOCK_N, D, BLOCK_D, ENGINE)
        values = load_tile(v, b, n, h, BLOCK_N, D, BLOCK_D, ENGINE)
        scores = tl.dot(q, keys.T, input_precision="ieee")
        scores = scores * scale - lse[:, None]
        if MASKED:
            key = n + tl.arange(0, BLOCK_N)[None, :]
            seen = (key >= first[:, None]) & (key <= last[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        p = tl.exp2(scores)
        dp = tl.dot(do, values.T, input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision="ieee")
    return dq


@triton.jit
def _flash_backward_queries(
    q, k, v, o, do, dq, lse_ptr, delta_ptr, interval, T, S, scale,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INTERVAL: tl.constexpr, ENGINE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_M)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    start = (tiles - 1 - tile) * BLOCK_M
    b, h = head // H, head % H
    query = start + tl.arange(0, BLOCK_M)
    first, last, begin, full_begin, full_end, end = seen_keys(
        interval, b, query, T, S, INTERVAL
    )
    begin, full_begin, full_end = whole_tiles(begin, full_begin, full_end, BLOCK_N)
    q_tile = load_tile(q, b, start, h, BLOCK_M, D, BLOCK_D, ENGINE)
    do_tile = load_tile(do, b, start, h, BLOCK_M, D, BLOCK_D, ENGINE)
    o_tile = load_tile(o, b, start, h, BLOCK_M, D, BLOCK_D, False)
    delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    at = head.to(tl.int64) * T + query
    tl.store(delta_ptr + at, delta, query < T)  # the other kernel reads it
    lse = tl.load(lse_ptr + at, query < T, 0.0) * LOG2E
    dq_tile = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if INTERVAL:
        dq_tile = _see_keys(
            dq_tile, q_tile, do_tile, lse, delta, k, v, b, h // GROUP,
            begin, tl.minimum(full_begin, end), first, last, scale * LOG2E,
            True, D, BLOCK_D, BLOCK_N, ENGINE,
        )  # fmt: skip
    dq_tile = _see_keys(
        dq_tile, q_tile, do_tile, lse, delta, k, v, b, h // GROUP,
        full_begin, full_end, first, last, scale * LOG2E,
        False, D, BLOCK_D, BLOCK_N, ENGINE,
    )  # fmt: skip
    dq_tile = _see_keys(
        dq_tile, q_tile, do_tile, lse, delta, k, v, b, h // GROUP,
        full_end, end, first, last, scale * LOG2E,
        True, D, BLOCK_D, BLOCK_N, ENGINE,
    )  # fmt: skip
    store_tile(dq, b, start, h, dq_tile * scale, BLOCK_M, D, BLOCK_D)


def flash_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor,
    first: Tensor | None, last: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, in their shapes."""
    (B, T, H, d), (S, K) = q.shape, k.shape[1:3]
    q, k, v, do = (side_by_side(x) for x in (q, k, v, do))
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta, (interval, mode) = torch.empty_like(lse), interval_of(first, last)
    block_d = max(16, next_power_of_2(d))
    engine = block_d <= 128 and takes_engine(q, k, v, do)  # else registers run out
    shared = {
        "H": H, "GROUP": H // K, "D": d, "BLOCK_D": block_d,
        "INTERVAL": mode, "ENGINE": engine,
    }  # fmt: skip

    key = (block_d, q.element_size(), mode, engine)
    sizes = tuned(_flash_backward_queries, key, q.device, tile_sizes(q, "queries"))
    m, n = sizes["BLOCK_M"], sizes["BLOCK_N"]
    launch(
        _flash_backward_queries, (cdiv(T, m) * B * H,),
        source(q, m, block_d, engine), source(k, n, block_d, engine),
        source(v, n, block_d, engine), pointers(o), source(do, m, block_d, engine),
        pointers(dq), lse, delta, interval, T, S, scale, **shared, **sizes,
    )  # fmt: skip

    sizes = tuned(_flash_backward_keys, key, q.device, tile_sizes(q, "keys"))
    m, n = sizes["BLOCK_M"], sizes["BLOCK_N"]
    launch(
        _flash_backward_keys, (cdiv(S, n) * B * K,),
        source(q, m, block_d, engine), source(k, n, block_d, engine),
        source(v, n, block_d, engine), source(do, m, block_d, engine),
        pointers(dk), pointers(dv), lse, delta, interval,
        query_ranges(interval, mode, T, S, n), T, S, scale, **shared, **sizes,
    )  # fmt: skip
    return dq, dk, dv
