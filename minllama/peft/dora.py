"""DoRA: LoRA for the direction of each row of a weight, and a number for its length.

    y = m V x / |V|        V = W + s B A, row by row; m starts at |W|

|V| counts as a constant in the backward pass (section 4.3), and it needs no V:

    |v_i|^2 = |w_i|^2 + 2 s b_i . (A w_i) + s^2 b_i . (A A^T) b_i

A W^T is `base` applied to the rows of A, so the weight is never seen, let alone copied.
Paper: Liu et al. 2024, arXiv:2402.09353, section 4.
"""

import torch
from torch import Tensor, nn

from minllama.peft.adapter import Spec
from minllama.peft.base import float_weight, innermost, is_plain
from minllama.peft.lora_layers import LoRALinear, linear_with_low_rank


def without_bias(layer: nn.Module, rows: Tensor) -> Tensor:
    """rows W^T, however W is stored. (n, in) -> (n, out)."""
    return layer(rows) - layer(torch.zeros_like(rows[:1]))


@torch.no_grad()
def row_lengths(layer, dtype: torch.dtype, device) -> Tensor:
    """|w_i| of each row of a layer's weight, (out,), in float32 or wider."""
    weight = float_weight(layer)
    wide = torch.promote_types(dtype, torch.float32)
    if weight is not None and is_plain(layer):
        return torch.linalg.vector_norm(weight, dim=1, dtype=wide)
    total = torch.zeros(layer.out_features, dtype=wide, device=device)
    eye = torch.eye(layer.in_features, dtype=dtype, device=device)
    for rows in eye.split(1024):  # columns of the weight, some at a time
        total += without_bias(layer, rows).to(wide).square().sum(0)
    return total.sqrt()


class DoRALinear(LoRALinear):
    """A linear layer whose rows turn by B A and have lengths m. (…, in) -> (…, out)."""

    adds = False

    def __init__(
        self, base: nn.Module, spec: Spec, rank: int, alpha: float, place: dict
    ) -> None:
        super().__init__(base, spec, rank, alpha, place)
        lengths = row_lengths(innermost(base), place["dtype"], place["device"])
        self.length = nn.Parameter(lengths, requires_grad=False)  # |W|, not trained
        self.m = nn.Parameter(lengths.to(place["dtype"], copy=True))
        self.measure()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "m"):
            self.measure()

    @torch.no_grad()
    def measure(self) -> None:
        """m = |W + s B A| as it is now, so that the layer computes just that."""
        lengths = row_lengths(innermost(self.base), self.a.dtype, self.a.device)
        self.length.copy_(lengths)
        self.m.copy_(self.lengths(self.length))

    def trained(self) -> list[nn.Parameter]:
        return [*super().trained(), self.m]

    @torch.no_grad()
    def lengths(self, length: Tensor) -> Tensor:
        """|W + s B A| from |W|, row by row. (out,) -> (out,), in m's dtype."""
        wide, asked = length.dtype, self.as_input(self.a)
        a, b = self.a.to(wide), self.b.to(wide)
        if self.base_bias() is None:
            aw = self.base(asked)  # (r, out)
        else:
            aw = without_bias(self.base, asked)
        cross = (b * aw.to(wide).t()).sum(1)  # (out,)
        square = (b @ (a @ a.t()) * b).sum(1)  # (out,)
        change = self.scale * (2 * cross + self.scale * square) / length.square()
        turned = length * (1 + change).clamp(min=0).sqrt()
        alone = self.scale * square.sqrt()  # where the weight's row is zero
        return torch.where(length > 0, turned, alone).to(self.m.dtype)

    def as_input(self, x: Tensor) -> Tensor:
        """In the dtype that the base multiplies."""
        weight = float_weight(innermost(self.base))
        return x if weight is None else x.to(weight.dtype)

    def base_bias(self) -> Tensor | None:
        """The bias below, which has no part in the lengths."""
        if is_plain(self.base):
            return getattr(innermost(self.base), "bias", None)
        return self.base(self.as_input(self.a.new_zeros(1, self.a.size(1))))[0]

    def forward(self, x: Tensor) -> Tensor:
        if self.strength == 0:
            return self.base(x)
        plain = is_plain(self.base)
        length = self.length if plain else row_lengths(self.base, x.dtype, x.device)
        lengths = self.lengths(length)
        grow = torch.where(lengths > 0, self.m / lengths, 1).to(x.dtype)  # 1 at birth
        y = linear_with_low_rank(
            self.base, x, self.dropout(x), self.a, self.b, self.scale
        )
        bias = self.base_bias()
        if bias is None:
            return y * grow
        return torch.addcmul((1 - grow) * bias.to(x.dtype), y, grow)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """m (W + s B A) / |W + s B A|."""
        turned = weight + self.change()
        length = torch.linalg.vector_norm(turned, dim=1)
        grow = torch.where(length > 0, self.m.to(turned.dtype) / length, 1)
        return turned * grow[:, None], bias
