"""Rotary positions: turn each channel pair by an angle that grows with the position.

    angle(p, i) = p * theta ** (-2 i / d)          pair i = channels (i, i + d/2)

A query at p and a key at s, both turned, meet under the angle (p - s): attention then
knows distances, not places. Pair 0 turns once in six tokens, the last one hardly at
all: a clock with d/2 hands.

Pairs are (i, i + d/2), as in Hugging Face's files. Meta pairs neighbours (0, 1),
(2, 3), ..., so its wq and wk are permuted on loading.
Paper: Su et al. 2021, arXiv:2104.09864, section 3.4.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minllama.architecture.config import LlamaConfig


class Rotation(NamedTuple):
    """The angles of T tokens, ready to turn queries and keys.

    A pair (low, high) becomes (low cos - high sin, high cos + low sin). Both halves of
    the head are done at once: `cos` is repeated for the two halves, and the first half
    of `sin` carries the minus sign.
    """

    cos: Tensor  # (B or 1, T, 1, d) float32
    sin: Tensor  # (B or 1, T, 1, d) float32: -sin, then sin

    def turn(self, x: Tensor) -> Tensor:
        """Rotate the channel pairs (i, i + d/2). (B, T, H, d) -> (B, T, H, d).

        The arithmetic is float32 for half precisions and float64 for float64, because
        `cos` and `sin` are float32 and take part in type promotion.
        """
        swapped = x.roll(x.size(-1) // 2, dims=-1)  # (high, low)
        return torch.addcmul(x * self.cos, swapped, self.sin).to(x.dtype)

    def turn_both(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """`turn` of queries (B, T, H, d) and keys (B, T, K, d) in one call.

        A decoding step is bound by the number of kernels launched, so the heads are
        turned side by side; a fused kernel overrides this.
        """
        if q.size(1) > 1:  # many tokens: a copy costs more than a launch
            return self.turn(q), self.turn(k)
        turned = self.turn(torch.cat([q, k], dim=2))  # (B, 1, H + K, d)
        return turned[:, :, : q.size(2)], turned[:, :, q.size(2) :]


class Rope(nn.Module):
    """Positions (B or 1, T) -> Rotation. Owns no tensor: safe on the meta device."""

    amplitude = 1.0  # YaRN and LongRoPE sharpen attention: queries and keys grow by it

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta

    def speeds(self, positions: Tensor) -> Tensor:
        """Radians per token of each pair, (d/2,) float32. Seam of rope scaling.

        Written 1 / theta^x and not theta^-x: so it rounds as Hugging Face's does, and
        long positions multiply every rounding.
        """
        even = torch.arange(0, self.head_dim, 2, device=positions.device).float()
        return 1.0 / self.theta ** (even / self.head_dim)

    def forward(self, positions: Tensor) -> Rotation:
        speed = self.speeds(positions)  # (d/2,)
        both = torch.cat([-speed, speed])  # (d,): cos is even, sin takes the sign
        angle = positions[..., None, None] * both  # (B, T, 1, d)
        cos, sin = angle.cos(), angle.sin()
        if self.amplitude != 1.0:
            cos, sin = cos * self.amplitude, sin * self.amplitude
        return Rotation(cos, sin)


class Llama3Rope(Rope):
    """Llama 3.1's longer context: slow pairs slower, fast pairs untouched.

    A pair that turned more than `high_freq_factor` times within the original context
    tells near tokens apart and stays. One that turned less than `low_freq_factor`
    times is divided by `factor`: it never saw a full turn, and shall not now. Between
    the two, a straight line. Source: Meta's llama-models, `apply_scaling`.
    """

    def __init__(self, head_dim: int, theta: float, scaling: dict) -> None:
        super().__init__(head_dim, theta)
        self.factor = scaling["factor"]
        self.low = scaling["low_freq_factor"]
        self.high = scaling["high_freq_factor"]
        self.original = scaling["original_max_position_embeddings"]

    def speeds(self, positions: Tensor) -> Tensor:
        speed = super().speeds(positions)  # (d/2,)
        turns = self.original * speed / (2 * math.pi)  # within the original context
        keep = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return speed * keep + speed / self.factor * (1 - keep)


def make_rope(config: LlamaConfig) -> Rope:
    """The rope that a config asks for."""
    if config.rope_scaling is None:
        return Rope(config.head_dim, config.rope_theta)
    return Llama3Rope(config.head_dim, config.rope_theta, config.rope_scaling)
