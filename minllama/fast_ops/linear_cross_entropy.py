"""The head and its loss in one: the (N, V) logits never exist whole.

    logits = hidden W^T        for a chunk of rows, into one buffer
    loss, dlogits              cross_entropy.py, dlogits over the logits
    dhidden = dlogits W        rows of the result
    dW     += dlogits^T hidden

Gradients are made in the forward pass, so logits need not be kept or made again: three
matrix products, as many as without the fusion, and a buffer of a quarter of a gigabyte
where N = 8,192 tokens of V = 128,256 have 2 GB of bfloat16 logits (eager PyTorch holds
12 GB: logits, their float32 copy, its softmax, two gradients).

The chunk decides. A small one saves memory; but each must read and write all of dW
again, and a matrix product of few rows leaves processors idle. On an H200, N = 8,192,
D = 2,048, V = 128,256, bfloat16, gradients included: 1,024 rows (2^28 bytes of logits)
22 ms and 0.77 GiB, 320 rows 27 ms and 0.60 GiB; the products alone are 19.3 ms.

dW is added up in its own dtype: 8 roundings there. Against float64 its relative error
(of the norm) was 1.5e-3, that of a single product rounded once 1.2e-3.
`accumulate=torch.float32` gives the latter too, for 1 GiB and 1.7 ms more.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from minllama.architecture.data import IGNORE, Batch
from minllama.architecture.kernels import (
    cdiv,
    first_derivative_only,
    operator,
    takes_kernel,
)
from minllama.architecture.model import MinimalLlama
from minllama.fast_ops.cross_entropy import (
    check_settings,
    cross_entropy,
    cross_entropy_reference,
    mean_scale,
    run_cross_entropy,
    scale_,
)

CHUNK_BYTES = 2**28  # of logits that exist at a time
USED_UP = (
    "linear_cross_entropy: its gradients, made in the forward pass, were used up by a "
    "first backward. Call backward once; linear_cross_entropy_reference allows more."
)


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = IGNORE,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The definition: all logits, then their loss. (..., D), (V, D), (...) -> 0-d."""
    logits = hidden @ weight.T  # (..., V)
    return cross_entropy_reference(
        logits, targets, ignore_index, label_smoothing, z_loss, reduction
    )


def chunk_rows(N: int, row_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Rows of logits that fit into `chunk_bytes`, a multiple of 64, at least 64.

    Example:
        >>> chunk_rows(8192, row_bytes=2 * 128256)
        1024
    """
    fit = max(64, chunk_bytes // row_bytes // 64 * 64)
    chunks = max(1, cdiv(N, fit))
    return max(64, cdiv(cdiv(N, chunks), 64) * 64)


def _fake(hidden, weight, targets, *settings):
    need_dh, need_dw = settings[-2:]
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(hidden.shape if need_dh else (0,)),
        hidden.new_empty(weight.shape if need_dw else (0,)),
    )


@operator(fake=_fake)
def linear_cross_entropy_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int,
    smoothing: float, z_loss: float, reduction: str, accumulate: torch.dtype,
    chunk_bytes: int, need_dh: bool, need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, and the gradients that are needed, of (N, D) and (V, D)."""
    N, V = hidden.size(0), weight.size(0)
    losses = hidden.new_empty(N, dtype=torch.float32)
    scale = mean_scale(targets, ignore_index, reduction)
    dh = hidden.new_empty(hidden.shape if need_dh else (0,))
    dw = weight.new_empty((V if need_dw else 0, weight.size(1)), dtype=accumulate)
    step = chunk_rows(N, V * hidden.element_size(), chunk_bytes)
    buffer = hidden.new_empty(min(step, N), V)
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        h = hidden[rows]
        logits = torch.mm(h, weight.T, out=buffer[: h.size(0)])
        run_cross_entropy(
            logits, targets[rows], losses[rows], scale, ignore_index, smoothing,
            z_loss, gradient=need_dh or need_dw,
        )  # fmt: skip
        if need_dh:
            torch.mm(logits, weight, out=dh[rows])
        if need_dw:
            _add_product(dw, logits.T, h, beta=min(start, 1))
    if not N:
        dw.zero_()
    loss = losses.sum() if N or reduction == "sum" else losses.sum() * scale
    return loss, dh, dw.to(hidden.dtype) if need_dw else dw.new_empty(0).to(dh.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """total = beta total + a b, in the dtype of total; beta = 0 reads nothing."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, *settings):
        loss, dh, dw = linear_cross_entropy_forward(hidden, weight, targets, *settings)
        ctx.save_for_backward(dh, dw)
        ctx.needs = settings[-2:]
        return loss

    @staticmethod
    def backward(ctx, dloss):
        first_derivative_only("linear_cross_entropy")
        try:
            dh, dw = ctx.saved_tensors
        except RuntimeError as error:
            raise RuntimeError(USED_UP) from error
        need_dh, need_dw = ctx.needs
        if need_dh:
            scale_(dh, dloss)
        if need_dw:
            scale_(dw, dloss)
        return dh if need_dh else None, dw if need_dw else None, *[None] * 9


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = IGNORE,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    accumulate: torch.dtype | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Cross-entropy of hidden W^T, in nats. (..., D), (V, D), (...) -> 0-d float32.

    Gradients are made now, unless `torch.no_grad()` says that none will be asked for;
    backward scales them in place, so call it once.

    Args:
        hidden: contiguous, or copied first. Under autocast it and the weight are
            converted, as a linear layer would.
        weight: of the head, may be the embedding's.
        targets: see `cross_entropy`, as are the settings.
        ignore_index: see `cross_entropy`.
        label_smoothing: see `cross_entropy`.
        z_loss: see `cross_entropy`.
        reduction: see `cross_entropy`.
        accumulate: dtype in which chunks of the weight's gradient are added up; None:
            the weight's own.
        chunk_bytes: of logits that exist at a time.

    Raises:
        ValueError: shapes or dtypes that do not belong together, or as
            `cross_entropy`.
        RuntimeError: in backward, for a second time.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    _check(hidden, weight, targets)
    _check_chunks(weight, accumulate, chunk_bytes)
    check_settings(
        "linear_cross_entropy", weight.T, targets, label_smoothing, z_loss, reduction
    )
    settings = (ignore_index, label_smoothing, z_loss, reduction)
    if not takes_kernel("linear_cross_entropy", hidden, weight):
        return linear_cross_entropy_reference(hidden, weight, targets, *settings)
    rows = hidden.reshape(-1, hidden.size(-1))
    targets = targets.flatten().contiguous()
    more = (accumulate or weight.dtype, chunk_bytes)
    if not torch.is_grad_enabled():  # what is measured only costs one product
        return linear_cross_entropy_forward(
            rows, weight, targets, *settings, *more, False, False
        )[0]
    needs = rows.requires_grad, weight.requires_grad
    return _LinearCrossEntropy.apply(rows, weight, targets, *settings, *more, *needs)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    fit = hidden.dim() > 0 and weight.dim() == 2 and hidden.size(-1) == weight.size(1)
    if not fit or hidden.shape[:-1] != targets.shape or hidden.dtype != weight.dtype:
        raise ValueError(
            f"linear_cross_entropy: hidden {hidden.dtype} {tuple(hidden.shape)}, "
            f"weight {weight.dtype} {tuple(weight.shape)} and targets "
            f"{tuple(targets.shape)} do not fit; give (..., D), (V, D) of one dtype "
            "and (...)."
        )


def _check_chunks(
    weight: Tensor, accumulate: torch.dtype | None, chunk_bytes: int
) -> None:
    if accumulate not in (None, torch.float32, weight.dtype):
        raise ValueError(
            f"linear_cross_entropy: accumulate={accumulate} adds up no gradient of "
            f"{weight.dtype}; give torch.float32, or None for the weight's own."
        )
    if not isinstance(chunk_bytes, int) or chunk_bytes < 1:
        raise ValueError(
            f"linear_cross_entropy: chunk_bytes={chunk_bytes!r} is no number of bytes; "
            "give a positive int, as 2**28."
        )


def fast_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The hub's `next_token_loss` without its logits: summed, in nats, 0-d.

    For `train(…, loss=fast_loss)`. A head that is no plain linear layer any more
    (adapted, quantized, cut by words, with a bias, watched by hooks) is called as it
    is, and only its loss is fused; so is a model with a `forward` of its own. Forward
    hooks on the model itself are not called: there is no forward.
    """
    trunk: Any = model  # nn.Module's attributes have no types
    own = "forward" in vars(model) or (
        isinstance(model, MinimalLlama)
        and type(model).forward is not MinimalLlama.forward
    )
    if own:
        logits = model(batch.tokens, layout=batch.layout)
        return _loss_of(model, logits, batch.targets)
    hidden = trunk.hidden_states(batch.tokens, layout=batch.layout)
    return head_loss(trunk.lm_head, hidden, batch.targets)


def head_loss(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of `head(hidden)`, whose logits exist only if they must.

    A head that FSDP sharded has its whole weight only while it is called, so it is
    called, with this loss in place of its product.

    Args:
        head: of the model.
        hidden: (..., D).
        targets: (...), IGNORE where nothing is learned.
    """

    def loss(x: Tensor) -> Tensor:
        weight = cast(Tensor, head.weight)
        return linear_cross_entropy(x, weight, targets, reduction="sum")

    plain = type(head).forward is nn.Linear.forward and head.bias is None
    backward_hooks = head._backward_hooks or head._backward_pre_hooks
    plain = plain and not ("forward" in vars(head) or backward_hooks)
    if plain and isinstance(head, FSDPModule):
        head.forward = loss
        try:
            return head(hidden)
        finally:
            del head.forward
    if plain and not (head._forward_hooks or head._forward_pre_hooks):
        return loss(hidden)
    return _loss_of(head, head(hidden), targets)


def _loss_of(module: nn.Module, logits: Tensor, targets: Tensor) -> Tensor:
    """Of logits that are there; backward hooks of who made them want these unharmed."""
    if module._backward_hooks or module._backward_pre_hooks:
        logits = logits.clone()
    return cross_entropy(logits, targets, reduction="sum")
