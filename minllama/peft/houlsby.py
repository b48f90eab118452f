"""Houlsby adapters: a small bottleneck after each half of a block.

    z = y + up(gelu(down(y)))      y: what o_proj or down_proj give to the stream

`up` starts at zero. Unlike LoRA it is no change of a weight, so it cannot be merged and
costs its time for ever.
Paper: Houlsby et al. 2019, arXiv:1902.00751, section 2.1; there `up` starts near zero.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minllama.peft.adapter import Adapter, Spec
from minllama.peft.attach import attach
from minllama.peft.base import model_dtype, place
from minllama.peft.targets import find_targets


class HoulsbyLinear(Adapter):
    """`base`, then a bottleneck beside a shortcut. (…, in) -> (…, out)."""

    def __init__(self, base: nn.Module, spec: Spec, size: int, place: dict) -> None:
        super().__init__(base, spec)
        width = self.out_features
        self.down = nn.Parameter(torch.empty(size, width, **place))
        self.down_bias = nn.Parameter(torch.empty(size, **place))
        self.up = nn.Parameter(torch.empty(width, size, **place))
        self.up_bias = nn.Parameter(torch.empty(width, **place))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """`down` small and random, the rest zero."""
        nn.init.normal_(self.down, std=self.down.size(1) ** -0.5)
        for zero in (self.down_bias, self.up, self.up_bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.strength == 0:
            return y
        down, up = self.down.to(y.dtype), self.up.to(y.dtype)
        low = F.gelu(F.linear(y, down, self.down_bias.to(y.dtype)))  # (…, size)
        return y + F.linear(low, up, self.up_bias.to(y.dtype))


def add_houlsby(
    model: nn.Module,
    size: int = 64,
    targets: str | Iterable[str] = ("o_proj", "down_proj"),
    name: str = "default",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Freeze the model, then put a bottleneck of `size` behind each target.

    Args:
        model: changed in place and returned.
        size: of the bottleneck.
        targets: layers, as in `add_lora`; the defaults end the two halves of a block.
        name: of the adapter.
        dtype: of its weights; None: the layer's.

    Raises:
        ValueError: a size below 1, or a name that is not there.
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1.")
    spec, activations = Spec(name, "houlsby", {"size": size}), model_dtype(model)

    def make(_: str, base: nn.Module) -> HoulsbyLinear:
        return HoulsbyLinear(base, spec, size, place(base, dtype, activations))

    return attach(model, spec, find_targets(model, targets), make)
