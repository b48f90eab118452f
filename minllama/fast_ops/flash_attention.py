"""Attention whose scores never reach memory: exact, in tiles that fit on the chip.

    o = softmax(q k^T / sqrt d) v           each query sees the keys first .. last

Written down as it stands, T queries and S keys make T S scores, written and read again
three times: at T = 4096 more than a hundred times the bytes of q, k, v and o. In tiles,
they live and die in registers, and only o and one number a row (the logsumexp, for the
backward pass) are written. The surprise is that the backward pass is faster for making
all scores anew: arithmetic is cheaper than memory.

    flash_attention_1.py         the idea at its simplest, one program a head
    flash_attention_forward.py   FlashAttention-2: loops exchanged
    flash_attention_backward.py  gradients of queries (…_backward_keys.py: the others)
    flash_attention_tiles.py     what these share

Who sees whom is a triangle, or an interval of keys per query: packed documents, windows
and rows of different length, without a (T, S) mask. Query heads that share a key head
read the same keys; nothing is repeated. Sums and softmax are float32 (float32 inputs:
exact products, no tf32). Gradients are the same bits each time.
Papers: Dao et al. 2022, arXiv:2205.14135 · Dao 2023, arXiv:2307.08691.
"""

import torch
from torch import Tensor

from minllama.architecture.kernels import (
    first_derivative_only,
    operator,
    takes_kernel,
)
from minllama.fast_ops.flash_attention_backward import flash_backward
from minllama.fast_ops.flash_attention_forward import flash_forward

MAX_WIDTH = 256  # of a head: what one program can hold


def flash_attention_reference(
    q: Tensor, k: Tensor, v: Tensor,
    first: Tensor | None = None, last: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """The definition, with all (B, H, T, S) scores. Arguments as `flash_attention`."""
    (H, d), (S, K) = q.shape[2:], k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.repeat_interleave(H // K, dim=2).to(wide) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.to(wide), k)
    key = torch.arange(S, device=q.device)
    first, last = whole_interval(q, S, first, last)
    seen = (key >= first[..., None]) & (key <= last[..., None])  # (B or 1, T, S)
    scores = scores * (d**-0.5 if scale is None else scale)
    p = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    p = p.masked_fill(~seen[:, None], 0)  # a query that sees no key has the output 0
    return torch.einsum("bhts,bshd->bthd", p, v).to(q.dtype)


def whole_interval(
    q: Tensor, S: int, first: Tensor | None, last: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both ends of what each of T queries sees of S keys, (B or 1, T) each."""
    if last is None:
        T = q.size(1)
        last = torch.arange(S - T, S, device=q.device)[None]
    return (torch.zeros_like(last) if first is None else first), last


def _fake_forward(q, k, v, first, last, scale):
    (B, T, H, _) = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)


def _fake_backward(q, k, v, o, lse, do, first, last, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


@operator(fake=_fake_forward)
def flash_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, last: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (B, T, H, d), and logsumexp (B, H, T) in float32."""
    if q.numel() == 0 or k.numel() == 0:
        lse = q.new_full((q.size(0), q.size(2), q.size(1)), -torch.inf)
        return q.new_zeros(q.shape), lse.float()
    return flash_forward(q, k, v, first, last, scale)


@operator(fake=_fake_backward)
def flash_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor,
    first: Tensor | None, last: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    return flash_backward(q, k, v, o, lse, do, first, last, scale)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, first, last, scale):
        o, lse = flash_attention_forward(q, k, v, first, last, scale)
        ctx.save_for_backward(q, k, v, o, lse, first, last)
        ctx.scale = scale
        return o

    @staticmethod
    def backward(ctx, do):
        first_derivative_only("flash_attention")
        q, k, v, o, lse, first, last = ctx.saved_tensors
        d = flash_attention_backward(q, k, v, o, lse, do, first, last, ctx.scale)
        return (*d, None, None, None)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor,
    first: Tensor | None = None, last: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """softmax(q k^T scale) v. (B, T, H, d), (B, S, K, d) twice -> (B, T, H, d).

    Args:
        q: queries; H is a multiple of K.
        k: keys, as far as they go: a cache is cut to the keys it holds, or `last` says
            (what lies behind must be finite: 0 times NaN is NaN).
        v: values.
        first: index of the first key that each query sees, (B or 1, T); None: 0.
        last: of the last one; None: the newest T of S keys are the queries' own, and
            each sees everything up to its own (a triangle, the fastest case).
        scale: of the scores, positive; None: 1 / sqrt d.

    Raises:
        ValueError: shapes that do not fit, a head wider than 256, or a dtype or device
            that the kernel does not know.
    """
    q, k, v = as_autocast(q, k, v)
    check("flash_attention", q, k, v, first, last, scale)
    scale = q.size(-1) ** -0.5 if scale is None else scale
    if not takes_kernel("flash_attention", q, k, v):
        return flash_attention_reference(q, k, v, first, last, scale)
    if first is not None and last is None:
        first, last = whole_interval(q, k.size(1), first, last)
    return _FlashAttention.apply(q, k, v, first, last, scale)


def as_autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors, in autocast's dtype where it is on: as PyTorch's own attention."""
    kind = tensors[0].device.type
    if kind not in ("cuda", "cpu") or not torch.is_autocast_enabled(kind):
        return list(tensors)
    return [x.to(torch.get_autocast_dtype(kind)) for x in tensors]


def check(
    op: str, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None,
    last: Tensor | None, scale: float | None,
) -> None:  # fmt: skip
    """Refuse what the kernels would misread.

    Raises:
        ValueError: see `flash_attention`.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"{op}: {shapes}; give (B, T, H, d) and twice (B, S, K, d).")
    if q.size(0) != k.size(0) or q.size(3) != k.size(3):
        raise ValueError(f"{op}: {shapes}; B and d of queries and keys must be alike.")
    if k.size(2) == 0 or q.size(2) % k.size(2):
        raise ValueError(
            f"{op}: {q.size(2)} query heads are no multiple of {k.size(2)} key heads; "
            "each key head serves the same number of query heads."
        )
    if not 1 <= q.size(3) <= MAX_WIDTH:
        raise ValueError(
            f"{op}: head width {q.size(3)} is not within 1 .. {MAX_WIDTH}; use "
            "scaled_dot_product_attention."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"{op}: q is {q.dtype}, k {k.dtype}, v {v.dtype}; convert them to one."
        )
    if last is None and q.size(1) > k.size(1):
        raise ValueError(
            f"{op}: {q.size(1)} queries and {k.size(1)} keys make no triangle; the "
            "queries' own keys come last. Give first and last for another pattern."
        )
    for name, x in (("first", first), ("last", last)):
        if x is None:
            continue
        if x.dim() != 2 or x.size(0) not in (1, q.size(0)) or x.size(1) != q.size(1):
            raise ValueError(
                f"{op}: {name} of shape {tuple(x.shape)} does not fit {q.size(1)} "
                f"queries in {q.size(0)} rows; give (B, T) or (1, T)."
            )
        if x.is_floating_point() or x.device != q.device:
            raise ValueError(
                f"{op}: {name} is {x.dtype} on {x.device}; give whole numbers on "
                f"{q.device}."
            )
    if scale is not None and not scale > 0:
        raise ValueError(f"{op}: scale={scale} is not positive; negate q instead.")
