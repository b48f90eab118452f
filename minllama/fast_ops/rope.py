"""Rotary positions: queries and keys turned in one pass, not in place.

    low' = low cos - high sin          high' = high cos + low sin

Pairs are (i, i + d/2). A program takes a token, fetches its angles and turns some heads
of q and of k by them: 2 values moved per element, and one launch where PyTorch needs
about ten. Backward is the turn by the opposite angle, the same kernel. Row and token
are places in the grid, so that no program has to divide by T before it can load.

The result is new memory. Turning in place moves as many bytes and would save a copy of
q and k, but must not be done to a gradient that another path shares; and q and k before
the turn are freed at once anyway, because no backward pass reads them.
Arithmetic is float32. Paper: Su et al. 2021, arXiv:2104.09864, section 3.4.
"""

import torch
from torch import Tensor

from minllama.architecture.kernels import (
    GRID,
    cdiv,
    first_derivative_only,
    launch,
    next_power_of_2,
    operator,
    takes_kernel,
    tl,
    triton,
)
from minllama.architecture.rope import Rotation
from minllama.architecture.tuning import tuned

# A program is one warp, with as many heads of q as give each of its 32 threads 16 bytes
# of low halves and 16 of high ones. Measured on an H200 against programs of all heads:
# 1 % of a copy better at d = 64, 5 % at d = 128. Angles are read again for each row and
# part, hence "evict_last".
SIZES = {"HALF_BYTES": 32 * 16, "num_warps": 1}


def rope_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, by the hub. (B, T, H, d), (B, T, K, d) -> the same."""
    rotation = Rotation(cos, sin)
    return rotation.turn(q), rotation.turn(k)


@triton.jit
def _places(
    part, HEADS: tl.constexpr, D: tl.constexpr, HEAD_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Head and channel of the low halves of a part of the heads, and which exist."""
    head = part * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    return head, i, (head < HEADS) & (i < D // 2)


@triton.jit
def _store_turned(out_ptr, low, high, cos, sin, inside, HALF: tl.constexpr):
    low, high = low.to(tl.float32), high.to(tl.float32)
    turned_low, turned_high = low * cos - high * sin, high * cos + low * sin
    tl.store(out_ptr, turned_low.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + HALF, turned_high.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rope(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out, k_out, B, T, q_batch, q_token, q_head,
    k_batch, k_token, k_head, angle_batch, BACK: tl.constexpr, H: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, H_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, MANY: tl.constexpr, GRID: tl.constexpr,
):  # fmt: skip
    t, part = (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(0) % PARTS
    b = tl.program_id(1).to(tl.int64)
    if MANY:  # a grid's second dimension is too short for them
        b += tl.program_id(2) * GRID
        if b >= B:
            return
    i = tl.arange(0, BLOCK)[None, :]
    at = b * angle_batch + t * D + D // 2 + i  # the half of sin that has no sign
    real = i < D // 2
    cos = tl.load(cos_ptr + at, mask=real, other=0.0, eviction_policy="evict_last")
    sin = tl.load(sin_ptr + at, mask=real, other=0.0, eviction_policy="evict_last")
    if BACK:
        sin = -sin
    q_row, q_i, q_in = _places(part, H, D, H_BLOCK, BLOCK)  # type: ignore[misc]
    k_row, k_i, k_in = _places(part, K, D, K_BLOCK, BLOCK)  # type: ignore[misc]
    q_ptr += b * q_batch + t * q_token + q_row * q_head + q_i
    k_ptr += b * k_batch + t * k_token + k_row * k_head + k_i
    q_low = tl.load(q_ptr, mask=q_in, other=0.0)  # all loads before any store
    q_high = tl.load(q_ptr + D // 2, mask=q_in, other=0.0)
    k_low = tl.load(k_ptr, mask=k_in, other=0.0)
    k_high = tl.load(k_ptr + D // 2, mask=k_in, other=0.0)
    q_out += (b * T + t) * H * D + q_row * D + q_i
    k_out += (b * T + t) * K * D + k_row * D + k_i
    _store_turned(q_out, q_low, q_high, cos, sin, q_in, D // 2)
    _store_turned(k_out, k_low, k_high, cos, sin, k_in, D // 2)


def _fake(q, k, cos, sin, back):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@operator(fake=_fake)
def rope_turn(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their angles, or back by them."""
    (B, T, H, d), K = q.shape, k.size(2)
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    block, size = next_power_of_2(d // 2), q.element_size()
    sizes = tuned(_rope, (block, size), q.device, SIZES)
    h_block = min(next_power_of_2(H), max(1, sizes["HALF_BYTES"] // (block * size)))
    parts = max(1, cdiv(H, h_block))
    launch(
        _rope, (T * parts, min(B, GRID), cdiv(B, GRID)), q, k, cos, sin, q_out, k_out,
        B, T, *q.stride()[:3], *k.stride()[:3], T * d if cos.size(0) > 1 else 0,
        BACK=back, H=H, K=K, D=d, H_BLOCK=h_block,
        K_BLOCK=next_power_of_2(cdiv(K, parts)), BLOCK=block, PARTS=parts,
        MANY=B > GRID, GRID=GRID, num_warps=sizes["num_warps"],
    )  # fmt: skip
    return q_out, k_out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rope_turn(q, k, cos, sin, False)

    @staticmethod
    def backward(ctx, dq, dk):
        first_derivative_only("rope")
        cos, sin = ctx.saved_tensors
        dq, dk = rope_turn(dq, dk, cos, sin, True)
        return dq, dk, None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn channel pairs (i, i + d/2). (B, T, H, d), (B, T, K, d) -> the same, new.

    Args:
        q: queries; heads may be strided, as in a slice of one projection of q, k and v.
        k: keys.
        cos: (B or 1, T, 1, d), the two halves alike, as the hub's `Rotation` has it.
        sin: the same; its first half is minus its second, which alone is read.

    Raises:
        ValueError: shapes that do not belong together, or a dtype or device that the
            kernel does not know.
    """
    _check(q, k, cos, sin)
    learns = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    if not takes_kernel("rope", q, k, cos, sin) or learns:
        return rope_reference(q, k, cos, sin)  # it knows gradients of the angles
    return _Rope.apply(q, k, cos, sin)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    fit = q.dim() == k.dim() == cos.dim() == 4 and cos.shape == sin.shape
    fit = fit and q.shape[:2] == k.shape[:2] and q.size(3) == k.size(3) == cos.size(3)
    fit = fit and cos.size(0) in (1, q.size(0)) and cos.shape[1:3] == (q.size(1), 1)
    if not fit or q.size(3) % 2:
        raise ValueError(
            f"rope: q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)} and "
            f"sin {tuple(sin.shape)} do not fit; give (B, T, H, d), (B, T, K, d) and "
            "(B or 1, T, 1, d) twice, d even."
        )


class FastRotation(Rotation):
    """The hub's rotation, with queries and keys turned by one kernel."""

    def turn(self, x: Tensor) -> Tensor:
        return rope(x, x[:, :, :0], self.cos, self.sin)[0]

    def turn_both(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rope(q, k, self.cos, self.sin)
