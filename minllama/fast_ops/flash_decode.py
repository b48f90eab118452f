"""Attention of a few new tokens to a long cache: split the keys, then combine.

One new token has one row of scores per head: no arithmetic to speak of, all of the
cache to read. With a program per head, batch 1 keeps 8 of 132 multiprocessors busy. So
the keys are split, each program answers as if its share were all, and keeps the
logsumexp of its scores; the answers are then averaged with the weights 2 ** lse:

    o = sum_i w_i o_i        w_i = 2 ** lse_i / sum_j 2 ** lse_j

The query heads that share a key head are rows of one tile, so each key is read once.
The programs of a head take tiles of keys in turn, as cards are dealt, up to `last`,
which is read on the GPU: so rows of any length are split evenly, no number ever travels
to the host, and the step can be captured as a graph.
Source: Dao, Haziza, Massa and Sizov 2023, "Flash-Decoding for long-context inference".
"""

import torch
from torch import Tensor

from minllama.architecture.kernels import (
    GRID,
    UPCAST,
    cdiv,
    launch,
    next_power_of_2,
    operator,
    processors,
    takes_kernel,
    tl,
    triton,
)
from minllama.architecture.tuning import tuned
from minllama.fast_ops.flash_attention import (
    as_autocast,
    check,
    flash_attention_reference,
    whole_interval,
)
from minllama.fast_ops.flash_attention_tiles import (
    LOG2E,
    interval_of,
    pointers,
    seen_keys,
    shared_memory,
    side_by_side,
)

MAX_ROWS = 128  # new tokens times query heads that share a key head: one tile


@triton.jit
def _load_keys(
    x, pages, b, h, key, end, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    base, _, stride_b, stride_t, stride_h = x
    column, b = tl.arange(0, BLOCK_D), tl.cast(b, tl.int64)
    if PAGE:
        pages_ptr, pages_b = pages
        page = tl.load(pages_ptr + b * pages_b + key // PAGE, key < end, 0)
        at = page.to(tl.int64) * stride_b + (key % PAGE) * stride_t
    else:
        at = b * stride_b + key.to(tl.int64) * stride_t
    inside = (key < end)[:, None] & (column < D)[None, :]
    tile = tl.load(base + h * stride_h + at[:, None] + column[None, :], inside, 0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _seen_by_one(interval, b, S, INTERVAL: tl.constexpr):
    """Of one new token: the first key that it sees, and the one after its last."""
    begin, end, b = 0, S, tl.cast(b, tl.int64)
    if INTERVAL:
        first_ptr, last_ptr, first_b, _, last_b, _ = interval
        last = tl.load(last_ptr + b * last_b)
        end = tl.minimum(tl.maximum(last, -1), S - 1).to(tl.int32) + 1
        if INTERVAL == 2:
            first = tl.load(first_ptr + b * first_b)
            begin = tl.minimum(tl.maximum(first, 0), S).to(tl.int32)
    return begin, end


@triton.jit
def _decode_split(
    q, k, v, o_part, lse_part, interval, pages, T, S, scale,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    INTERVAL: tl.constexpr, ONE: tl.constexpr, MANY: tl.constexpr, GRID: tl.constexpr,
):  # fmt: skip
    split, splits, heads = tl.program_id(0), tl.num_programs(0), H // GROUP
    at = tl.program_id(1)
    if MANY:  # a grid's second dimension is too short for all heads of all rows
        at += tl.program_id(2) * GRID
        if at >= MANY:
            return
    b, h = at // heads, at % heads
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    query = row // GROUP
    head = h * GROUP + row % GROUP
    base, _, stride_b, stride_t, stride_h = q
    at = tl.cast(b, tl.int64) * stride_b + query * stride_t + head * stride_h
    inside = (query < T)[:, None] & (column < D)[None, :]
    queries = tl.load(base + at[:, None] + column[None, :], inside, 0.0)
    if UPCAST:
        queries = queries.to(tl.float32)
    if ONE:
        begin, end = _seen_by_one(interval, b, S, INTERVAL)  # type: ignore[misc]
    else:
        bounds = seen_keys(interval, b, query, T, S, INTERVAL)
        first, last, begin, _, _, end = bounds
    o_tile = tl.zeros([ROWS, BLOCK_D], tl.float32)
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for n in range(begin + split * BLOCK_N, end, splits * BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)
        keys = _load_keys(k, pages, b, h, key, end, D, BLOCK_D, PAGE)
        values = _load_keys(v, pages, b, h, key, end, D, BLOCK_D, PAGE)
        scores = tl.dot(queries, keys.T, input_precision="ieee") * (scale * LOG2E)
        seen = (key < end)[None, :]
        if not ONE:
            seen &= (key[None, :] >= first[:, None]) & (key[None, :] <= last[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        o_tile = o_tile * shrink[:, None]
        o_tile = tl.dot(p.to(values.dtype), values, o_tile, input_precision="ieee")
        top = new_top
    some = total > 0
    total = tl.where(some, total, 1.0)
    lse = tl.where(some, top + tl.log2(total), float("-inf"))
    at = (tl.cast(b * H + head, tl.int64) * T + query) * splits + split
    tl.store(lse_part + at, lse, query < T)
    tl.store(
        o_part + at[:, None] * D + column[None, :], o_tile / total[:, None], inside
    )


@triton.jit
def _decode_combine(
    o, o_part, lse_part, T, splits, H: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    inside = (split < splits)[:, None] & (column < D)[None, :]
    part = o_part + (at * splits + split)[:, None] * D + column[None, :]
    parts = tl.load(part, inside, 0.0)  # both on their way at once
    lse = tl.load(lse_part + at * splits + split, split < splits, float("-inf"))
    weight = tl.exp2(lse - tl.maximum(tl.max(lse, 0), -1e30))
    weight = weight / tl.maximum(tl.sum(weight, 0), 1e-30)  # all 0: sees no key
    mixed = tl.sum(parts * weight[:, None], 0)
    base, _, stride_b, stride_t, stride_h = o
    base += at // T // H * stride_b + at % T * stride_t + at // T % H * stride_h
    tl.store(base + column, mixed.to(base.dtype.element_ty), column < D)


def decode_sizes(q: Tensor, K: int, S: int) -> dict[str, int]:
    """Rows of a tile, keys of a tile, splits, warps and stages.

    Measured on an H200: one program a multiprocessor, and tiles of 32 KiB of which two
    are on their way, read as fast as a copy at batch 8. More programs read no faster,
    and leave more to combine. Narrow heads of one text were read a little sooner by two
    programs of half the tile. A taller tile has room for fewer keys.
    """
    (B, T, H, d), small = q.shape, q.dtype != torch.float32
    rows = max(16, next_power_of_2(T * (H // K)))
    keys = min(256, (16384 if small else 4096) // max(16, next_power_of_2(d)))
    keys = max(16, min(keys, 8192 // rows))
    few = d <= 64 and 8 * B * K <= processors(q.device)
    keys = max(16, keys // 2) if few else keys
    splits = _splits(max(B * K, 1), processors(q.device), cdiv(S, keys))
    splits = min(2 * splits, cdiv(S, keys)) if few else splits
    room = shared_memory(q.device) > 160 * 1024
    return {
        "ROWS": rows, "BLOCK_N": keys, "splits": splits,
        "num_warps": 4 if rows <= 32 else 8,
        "num_stages": 3 if room and rows <= 32 else 2,
    }  # fmt: skip


def _splits(heads: int, processors: int, most: int) -> int:
    """The fewest that keep 95 % of the processors at work until the end, if any do."""
    choices = range(1, max(1, min(most, 4 * processors // heads)) + 1)

    def busy(splits: int) -> float:
        programs = heads * splits
        return programs / (cdiv(programs, processors) * processors)

    return next((n for n in choices if busy(n) >= 0.95), max(choices, key=busy))


def _decode(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, last: Tensor | None,
    pages: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    (B, T, H, d), (S, K) = q.shape, k.shape[1:3]
    page = 0 if pages is None else S
    if pages is not None:
        S, pages = S * pages.size(1), pages.contiguous()
    q, k, v = (side_by_side(x) for x in (q, k, v))
    o = q.new_empty(B, T, H, d)
    sizes, block_d = decode_sizes(q, K, S), max(16, next_power_of_2(d))
    rows = sizes.pop("ROWS")
    key = (block_d, q.element_size(), rows, B * K, next_power_of_2(S))
    sizes = tuned(_decode_split, key, q.device, sizes)
    splits = sizes.pop("splits")
    o_part = q.new_empty(B, H, T, splits, d, dtype=torch.float32)
    lse_part = q.new_empty(B, H, T, splits, dtype=torch.float32)
    interval, mode = interval_of(first, last)
    launch(
        _decode_split, (splits, min(B * K, GRID), cdiv(B * K, GRID)),
        pointers(q), pointers(k), pointers(v), o_part, lse_part, interval,
        None if pages is None else (pages, pages.stride(0)), T, S, scale,
        H=H, GROUP=H // K, D=d, BLOCK_D=block_d,
        ROWS=rows, PAGE=page, INTERVAL=mode, ONE=T == 1,
        MANY=B * K if B * K > GRID else 0, GRID=GRID, **sizes,
    )  # fmt: skip
    launch(
        _decode_combine, (B * H * T,), pointers(o), o_part, lse_part, T, splits,
        H=H, D=d, BLOCK_D=block_d, SPLITS=next_power_of_2(splits), num_warps=4,
    )  # fmt: skip
    return o


@operator(fake=lambda q, k, v, first, last, pages, scale: q.new_empty(q.shape))
def flash_decode_forward(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, last: Tensor | None,
    pages: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """(B, T, H, d), caches, who sees what -> (B, T, H, d)."""
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape)
    return _decode(q, k, v, first, last, pages, scale)


def gather_pages(x: Tensor, pages: Tensor) -> Tensor:
    """(n, page, K, d) by a table (B, pages of a row) -> (B, S, K, d), a copy."""
    return x[pages.long()].flatten(1, 2)


def _behind(last: Tensor | None, n: int, size: int) -> Tensor | None:
    """Which of n things of `size` keys each begin behind the last key. (B or 1, n)."""
    if last is None or last.numel() == 0:
        return None
    begin = torch.arange(n, device=last.device) * size
    return begin > last.amax(1, keepdim=True)


def flash_decode_reference(
    q: Tensor, k: Tensor, v: Tensor,
    first: Tensor | None = None, last: Tensor | None = None,
    pages: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """The definition: pages laid side by side, then all scores.

    What lies behind `last` is not read, neither pages nor values, as in the kernel.
    """
    if pages is not None:
        behind = _behind(last, pages.size(1), k.size(1))
        pages = pages if behind is None else pages.masked_fill(behind, 0)
        k, v = gather_pages(k, pages), gather_pages(v, pages)
    behind = _behind(last, v.size(1), 1)
    if behind is not None:
        v = v.masked_fill(behind[..., None, None], 0)  # there 0 times NaN is 0
    return flash_attention_reference(q, k, v, first, last, scale)


def flash_decode(
    q: Tensor, k: Tensor, v: Tensor,
    first: Tensor | None = None, last: Tensor | None = None,
    pages: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention of a few tokens to a cache. (B, T, H, d) -> (B, T, H, d). No gradient.

    Args:
        q: queries, T H / K <= 128: one to sixteen tokens in a usual Llama.
        k: keys (B, S, K, d); with `pages` all pages there are, (n, page, K, d).
        v: values, likewise.
        first: index of the first key that each query sees, (B or 1, T); None: 0.
        last: of the last one, on the GPU, as `StaticCaches` count; None: the newest T
            of S keys are the queries' own.
        pages: (B, pages of a row): which page holds keys 0 .. page - 1 of a row, which
            the next ones; only entries up to `last` are read.
        scale: of the scores; None: 1 / sqrt d.

    Raises:
        ValueError: as `flash_attention`; more rows than a tile has; a table of pages
            that does not fit.
    """
    q, k, v = as_autocast(q, k, v)
    if pages is None:
        check("flash_decode", q, k, v, first, last, scale)
    else:
        _check_pages(q, k, pages, last)
        one, other = (x[:1].expand(q.size(0), -1, -1, -1) for x in (k, v))
        check("flash_decode", q, one, other, first, last, scale)  # shapes only
    if q.size(1) * (q.size(2) // k.size(2)) > MAX_ROWS:
        raise ValueError(
            f"flash_decode: {q.size(1)} tokens of {q.size(2) // k.size(2)} heads a key "
            f"head are more than {MAX_ROWS} rows; use flash_attention."
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(
            "flash_decode: an input requires a gradient, and there is none; use "
            "flash_attention, or torch.no_grad()."
        )
    scale = q.size(-1) ** -0.5 if scale is None else scale
    if not takes_kernel("flash_decode", q, k, v):
        return flash_decode_reference(q, k, v, first, last, pages, scale)
    if first is not None and last is None:
        first, last = whole_interval(q, k.size(1), first, last)
    return flash_decode_forward(q, k, v, first, last, pages, scale)


def _check_pages(q: Tensor, k: Tensor, pages: Tensor, last: Tensor | None) -> None:
    whole = not pages.is_floating_point() and pages.dtype != torch.bool
    if pages.dim() != 2 or pages.size(0) != q.size(0) or not whole:
        raise ValueError(
            f"flash_decode: pages {tuple(pages.shape)} of {pages.dtype} do not fit "
            f"{q.size(0)} rows; give whole numbers (B, pages of a row)."
        )
    if k.size(0) == 0:
        raise ValueError(
            f"flash_decode: k {tuple(k.shape)} has no page; give (n, page, K, d)."
        )
    if last is None:
        raise ValueError(
            "flash_decode: last=None with pages; a row seldom fills its last page, so "
            "say which key is each token's own."
        )
    if pages.device != k.device:
        raise ValueError(
            f"flash_decode: pages on {pages.device}, keys on {k.device}; move them to "
            "one."
        )
