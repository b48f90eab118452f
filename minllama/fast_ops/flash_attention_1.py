"""FlashAttention-1: the idea at its simplest. Forward only; the one to read first.

One program per head brings a tile of keys and values to the chip, and lets all queries
pass by. Each query takes home what it learned: its output so far, its largest score and
its sum of exponentials, through memory, once per tile of keys:

    for each tile of keys:                      read once
        for each tile of queries:               o, top, total: read and written
            s      = q k^T
            top'   = max(top, max s)
            total' = total 2^(top - top') + sum 2^(s - top')
            o'     = (o total 2^(top - top') + 2^(s - top') v) / total'

The scores live in registers only, so memory traffic is T S d / tile instead of T S, and
o is a true average after each step. What version 2 mends: o travels S / tile times, it
is divided each time, and only B H programs run, which leaves most of a GPU idle.
Paper: Dao et al. 2022, arXiv:2205.14135, algorithm 1.
"""

import torch
from torch import Tensor

from minllama.architecture.kernels import (
    launch,
    next_power_of_2,
    takes_kernel,
    tl,
    triton,
)
from minllama.fast_ops.flash_attention import check, flash_attention_reference
from minllama.fast_ops.flash_attention_tiles import (
    LOG2E,
    load_tile,
    pointers,
    side_by_side,
    store_tile,
)


@triton.jit
def _flash_attention_1(
    q, k, v, o, top_ptr, total_ptr, T, S, scale,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    at = tl.program_id(0).to(tl.int64) * T
    for n in range(0, S, BLOCK):
        keys = load_tile(k, b, n, h // GROUP, BLOCK, D, BLOCK_D, False)
        values = load_tile(v, b, n, h // GROUP, BLOCK, D, BLOCK_D, False)
        key = n + tl.arange(0, BLOCK)
        seeing = tl.maximum(n - (S - T), 0) // BLOCK * BLOCK  # the first that may
        for m in range(seeing, T, BLOCK):
            query = m + tl.arange(0, BLOCK)
            queries = load_tile(q, b, m, h, BLOCK, D, BLOCK_D, False)
            o_tile = load_tile(o, b, m, h, BLOCK, D, BLOCK_D, False)
            top = tl.load(top_ptr + at + query, query < T, 0.0)
            total = tl.load(total_ptr + at + query, query < T, 1.0)

            s = tl.dot(queries, keys.T, input_precision="ieee") * (scale * LOG2E)
            seen = key[None, :] <= query[:, None] + (S - T)
            s = tl.where(seen & (key < S)[None, :], s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new_top[:, None])
            kept = total * tl.exp2(top - new_top)
            new_total = kept + tl.sum(p, 1)
            pv = tl.dot(p.to(values.dtype), values, input_precision="ieee")
            o_tile = (o_tile * kept[:, None] + pv) / new_total[:, None]

            store_tile(o, b, m, h, o_tile, BLOCK, D, BLOCK_D)
            tl.store(top_ptr + at + query, new_top, query < T)
            tl.store(total_ptr + at + query, new_total, query < T)
        tl.debug_barrier()  # what one thread wrote, another may read


def flash_attention_1(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A triangle, by FlashAttention-1. (B, T, H, d), (B, S, K, d) twice -> as q.

    Raises:
        ValueError: as `flash_attention`.
    """
    check("flash_attention_1", q, k, v, None, None, None)
    if not takes_kernel("flash_attention_1", q, k, v):
        return flash_attention_reference(q, k, v)
    (B, T, H, d), (S, K) = q.shape, k.shape[1:3]
    q, k, v = (side_by_side(x.detach()) for x in (q, k, v))
    o = torch.zeros(B, T, H, d, dtype=torch.float32, device=q.device)
    top, total = o.new_full((B, H, T), -1e30), o.new_zeros(B, H, T)
    launch(
        _flash_attention_1, (B * H,), pointers(q), pointers(k), pointers(v),
        pointers(o), top, total, T, S, d**-0.5, H=H, GROUP=H // K, D=d,
        BLOCK_D=max(16, next_power_of_2(d)), BLOCK=32, num_warps=4,
    )  # fmt: skip
    return o.to(q.dtype)
