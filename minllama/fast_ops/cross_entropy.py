"""Cross-entropy whose gradient takes the place of the logits: one kernel for both.

    loss = lse(x) - (1 - e) x[target] - e mean(x) + z lse(x)^2       lse = log sum exp
    dx   = softmax(x) (1 + 2 z lse) - (1 - e) [i = target] - e / V

with e = label_smoothing and z = z_loss. A row of 128,256 logits is a quarter of a
megabyte. A first pass finds lse online (see softmax.py), a second writes the gradient
over the logits, walking backwards, because what was read last is still in the cache.
No second (N, V) tensor exists, and backward has nothing left to do but to scale.

The first pass keeps a maximum and a sum per 8 neighbouring values, which one thread
holds: threads need not wait for each other until the end of the row, and an exponential
is computed 9 times per 8 values. Arithmetic is float32, the order of sums fixed.
Papers: Szegedy et al. 2015, arXiv:1512.00567, section 7 (label smoothing); Chowdhery et
al. 2022, arXiv:2204.02311, section 5 (z-loss).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from minllama.architecture.data import IGNORE
from minllama.architecture.kernels import (
    cdiv,
    first_derivative_only,
    launch,
    next_power_of_2,
    operator,
    takes_kernel,
    tl,
    triton,
)
from minllama.architecture.tuning import tuned

REDUCTIONS = ("mean", "sum")
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32
WRITTEN_OVER = (
    "cross_entropy: the gradient, which lies where the logits were, was used up by a "
    "first backward, or modified by an inplace operation on the logits. Call backward "
    "once, and do not write to the logits before; cross_entropy_reference allows both."
)


def cross_entropy_reference(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = IGNORE,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The definition. (..., V), (...) -> 0-d, in float32 or wider."""
    x = logits.unsqueeze(0).flatten(0, -2)  # (N, V)
    x = x.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.flatten()
    loss = F.cross_entropy(
        x, targets, ignore_index=ignore_index, label_smoothing=label_smoothing,
        reduction="none",
    )  # fmt: skip
    counted = targets != ignore_index
    if z_loss:
        more = z_loss * x.logsumexp(-1).square()
        loss = loss + more.masked_fill(~counted, 0)  # a factor 0 gave 0 / 0 a gradient
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum()


@triton.jit
def _sums(x_ptr, V, SMOOTH: tl.constexpr, LANES: tl.constexpr):
    """Maximum of a row, sum(exp(x - maximum)), and sum(x) if SMOOTH.

    Their logarithm is not added to the maximum: beside 1e31 it would be rounded away.
    """
    col = tl.arange(0, LANES)[:, None] * 8 + tl.arange(0, 8)[None, :]
    top = tl.full((LANES,), LOWEST, tl.float32)  # -inf minus itself is no number
    total = tl.zeros((LANES,), tl.float32)
    plain = tl.zeros((LANES,), tl.float32)
    for start in range(0, V, LANES * 8):
        at = start + col
        x = tl.load(x_ptr + at, mask=at < V, other=-float("inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, axis=1))
        e = tl.exp(x - new_top[:, None])
        total = total * tl.exp(top - new_top) + tl.sum(e, axis=1)
        top = new_top
        if SMOOTH:
            plain += tl.sum(tl.where(at < V, x, 0.0), axis=1)
    row_top = tl.max(top, axis=0)
    total = tl.sum(total * tl.exp(top - row_top), axis=0)
    return row_top, total, tl.sum(plain, axis=0)


@triton.jit
def _write_gradient(
    x_ptr, V, target, top, factor, spread, own, LANES: tl.constexpr
):  # fmt: skip
    """factor exp(x - top) - spread, less `own` at the target, over the logits."""
    col = tl.arange(0, LANES)[:, None] * 8 + tl.arange(0, 8)[None, :]
    last = (V - 1) // (LANES * 8) * LANES * 8
    for back in range(0, V, LANES * 8):
        at = last - back + col
        x = tl.load(
            x_ptr + at, mask=at < V, other=-float("inf"), eviction_policy="evict_first"
        )
        dx = tl.exp(x.to(tl.float32) - top) * factor - spread
        dx = (dx - tl.where(at == target, own, 0.0)).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + at, dx, mask=at < V, eviction_policy="evict_first")


@triton.jit
def _cross_entropy(
    logits_ptr, target_ptr, loss_ptr, scale_ptr, n_rows, V, stride, ignore_index,
    smoothing, z_loss, GRADIENT: tl.constexpr, SMOOTH: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    scale = tl.load(scale_ptr)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        target = tl.load(target_ptr + row)
        x_ptr = logits_ptr + tl.cast(row, tl.int64) * stride
        if target == ignore_index:
            of_none = scale == float("inf")  # a mean, which is 0 / 0 then
            tl.store(loss_ptr + row, tl.where(of_none, float("nan"), 0.0))
            if GRADIENT:  # exp(x - inf) = 0
                _write_gradient(x_ptr, V, -1, float("inf"), 0.0, 0.0, 0.0, LANES)
        else:
            top, total, plain = _sums(x_ptr, V, SMOOTH, LANES)  # type: ignore[misc]
            lse = top + tl.log(total)
            known = (target >= 0) & (target < V)  # else NaN: a kernel cannot raise
            own = tl.load(x_ptr + target, mask=known, other=float("nan"))
            loss = top - (1 - smoothing) * own.to(tl.float32)
            if SMOOTH:
                loss -= smoothing / V * plain
            loss += tl.log(total) + z_loss * lse * lse
            tl.store(loss_ptr + row, loss * scale)
            if GRADIENT:
                factor = (1 + 2 * z_loss * lse) * scale / total
                spread, own = smoothing / V * scale, (1 - smoothing) * scale
                _write_gradient(x_ptr, V, target, top, factor, spread, own, LANES)


@triton.jit
def _scale(x_ptr, factor_ptr, n, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:  # read on the device: the processor need not wait for it
        start = tl.program_id(0).to(tl.int64) * BLOCK
        at = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + start + at, mask=at < n - start).to(tl.float32) * factor
        x = x.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + start + at, x, mask=at < n - start)


def run_cross_entropy(
    logits: Tensor, targets: Tensor, losses: Tensor, scale: Tensor, ignore_index: int,
    smoothing: float, z_loss: float, gradient: bool,
) -> None:  # fmt: skip
    """Losses of (N, V) logits times `scale`; `gradient` writes over the logits."""
    N, V = logits.shape
    sizes = {"LANES": 128, "num_warps": 4}
    if V >= 8192:  # who writes wants few large programs: their rows stay in the cache
        sizes = {"LANES": 2048, "num_warps": 32}
        sizes = sizes if gradient else {"LANES": 512, "num_warps": 8}
    key = (next_power_of_2(V), logits.element_size(), gradient)
    launch(
        _cross_entropy, (N,), logits, targets, losses, scale, N, V, logits.stride(0),
        ignore_index, smoothing, z_loss, GRADIENT=gradient, SMOOTH=smoothing > 0,
        **tuned(_cross_entropy, key, logits.device, sizes),
    )  # fmt: skip


def mean_scale(targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """What each row's loss counts, as a number on the device: 1, or 1 / counted."""
    if reduction == "sum":
        return torch.ones((), device=targets.device)
    return (targets != ignore_index).sum().float().reciprocal()


def _loss(logits, targets, ignore_index, smoothing, z_loss, reduction, gradient):
    losses = logits.new_empty(logits.size(0), dtype=torch.float32)
    scale = mean_scale(targets, ignore_index, reduction)
    run_cross_entropy(
        logits, targets, losses, scale, ignore_index, smoothing, z_loss, gradient
    )
    empty = reduction == "mean" and not logits.size(0)  # 0 / 0, as PyTorch has it
    return losses.sum() * scale if empty else losses.sum()


def _fake(logits, targets, *settings):
    return logits.new_empty((), dtype=torch.float32)


@operator(fake=_fake)
def cross_entropy_forward(
    logits: Tensor, targets: Tensor, ignore_index: int, smoothing: float,
    z_loss: float, reduction: str,
) -> Tensor:  # fmt: skip
    """The loss of (N, V) logits, which stay."""
    return _loss(
        logits, targets, ignore_index, smoothing, z_loss, reduction, gradient=False
    )


@operator(fake=_fake, mutates=("logits",))
def cross_entropy_gradient_(
    logits: Tensor, targets: Tensor, ignore_index: int, smoothing: float,
    z_loss: float, reduction: str,
) -> Tensor:  # fmt: skip
    """The loss of (N, V) logits, whose gradient takes their place."""
    increment_version(logits)  # who kept the logits for later shall hear of it
    return _loss(
        logits, targets, ignore_index, smoothing, z_loss, reduction, gradient=True
    )


@operator(fake=lambda x, factor: None, mutates=("x",))
def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor (0-d, on the device); no memory is touched where factor is 1."""
    increment_version(x)  # so that a second backward pass is refused
    n = x.numel()
    launch(_scale, (cdiv(n, 4096),), x, factor, n, BLOCK=4096, num_warps=4)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, *settings):
        loss = cross_entropy_gradient_(logits, targets, *settings)
        ctx.save_for_backward(logits)  # the gradient, by now
        return loss

    @staticmethod
    def backward(ctx, dloss):
        first_derivative_only("cross_entropy")
        try:
            (gradient,) = ctx.saved_tensors
        except RuntimeError as error:
            raise RuntimeError(WRITTEN_OVER) from error
        scale_(gradient, dloss)
        return gradient, *[None] * 5


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = IGNORE,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy in nats, 0-d, float32 or wider. (..., V), (...) -> ().

    Where the logits need a gradient it is written over them, now: do not read them
    afterwards, and call backward once (a second one is refused, since the first
    scaled the gradient in place). Without need of a gradient they stay.

    Args:
        logits: copied first if they are not contiguous; the copy is then written over.
        targets: int64. One outside 0..V-1 that is not `ignore_index` makes the loss
            NaN: a kernel cannot raise.
        ignore_index: rows of this target have no loss and no gradient.
        label_smoothing: share of the target's weight spread over all V.
        z_loss: weight of lse^2, which keeps logits from drifting.
        reduction: "mean" over the targets that count, NaN if none does (its gradient
            is 0), or "sum".

    Raises:
        ValueError: shapes that do not belong together, a setting out of range, or a
            dtype or device that the kernel does not know.
        RuntimeError: in backward, for a second time or after a write to the logits.
    """
    if logits.dim() < 1 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"cross_entropy: targets of shape {tuple(targets.shape)} do not fit logits "
            f"of shape {tuple(logits.shape)}; give (...) and (..., V)."
        )
    check_settings("cross_entropy", logits, targets, label_smoothing, z_loss, reduction)
    settings = (ignore_index, label_smoothing, z_loss, reduction)
    if not takes_kernel("cross_entropy", logits):
        return cross_entropy_reference(logits, targets, *settings)
    rows = logits.reshape(-1, logits.size(-1)).contiguous()
    targets = targets.flatten().contiguous()
    if torch.is_grad_enabled() and logits.requires_grad:
        return _CrossEntropy.apply(rows, targets, *settings)
    return cross_entropy_forward(rows, targets, *settings)


def check_settings(
    op: str, words: Tensor, targets: Tensor, smoothing: float, z_loss: float,
    reduction: str,
) -> None:  # fmt: skip
    """Refuse what no loss can be made of. `words`: logits (..., V), or head (D, V).

    Raises:
        ValueError: no words to choose from, targets that are not int64 or elsewhere, or
            a setting out of range.
    """
    if words.size(-1) == 0:
        raise ValueError(f"{op}: V=0 words to choose from; give logits of one or more.")
    if targets.dtype != torch.int64:
        raise ValueError(f"{op}: targets of {targets.dtype}; give ids in torch.int64.")
    if targets.device != words.device:
        raise ValueError(
            f"{op}: targets on {targets.device}, logits on {words.device}; move them "
            "to one."
        )
    if not (0 <= smoothing < 1 and z_loss >= 0):
        raise ValueError(
            f"{op}: label_smoothing={smoothing} must be in 0..1 and z_loss={z_loss} "
            "must not be negative."
        )
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{op}: reduction={reduction!r} is none of {', '.join(REDUCTIONS)}."
        )
