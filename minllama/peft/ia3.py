"""IA3: scale keys, values and the inner activations of the feed-forward part.

    y = l * (W x)      keys and values, l (out,)
    y = W (l * x)      down_proj, l (in,): its input is what the paper scales

l starts at one. Far fewer numbers than LoRA, and merged without a trace.
Paper: Liu et al. 2022, arXiv:2205.05638, section 3.3.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from minllama.peft.adapter import Adapter, Spec
from minllama.peft.attach import attach
from minllama.peft.base import model_dtype, place
from minllama.peft.targets import find_targets


class IA3Linear(Adapter):
    """`base` with its output, or its input, scaled by l. (…, in) -> (…, out)."""

    def __init__(
        self, base: nn.Module, spec: Spec, scales_input: bool, place: dict
    ) -> None:
        super().__init__(base, spec)
        self.scales_input = scales_input
        size = self.in_features if scales_input else self.out_features
        self.l = nn.Parameter(torch.ones(size, **place))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """All ones."""
        nn.init.ones_(self.l)

    def forward(self, x: Tensor) -> Tensor:
        if self.strength == 0:
            return self.base(x)
        if self.scales_input:
            return self.base(x * self.l.to(x.dtype))
        y = self.base(x)
        return y * self.l.to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The rows, or the columns, scaled."""
        scale = self.l.to(weight.dtype)
        if self.scales_input:
            return weight * scale, bias
        return weight * scale[:, None], None if bias is None else bias * scale


def add_ia3(
    model: nn.Module,
    targets: str | Iterable[str] = ("k_proj", "v_proj", "down_proj"),
    feedforward: str | Iterable[str] = ("down_proj",),
    name: str = "default",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Freeze the model, then scale the layers that `targets` says.

    Args:
        model: changed in place and returned.
        targets: names, "all-linear" or a regular expression, as in `add_lora`.
        feedforward: those of them whose input is scaled, not their output.
        name: of the adapter.
        dtype: of l; None: the layer's.

    Raises:
        ValueError: a name that is not there.
    """
    names = find_targets(model, targets)
    inner = set(find_targets(model, feedforward)) if feedforward else set()
    spec, activations = Spec(name, "ia3"), model_dtype(model)

    def make(at: str, base: nn.Module) -> IA3Linear:
        return IA3Linear(base, spec, at in inner, place(base, dtype, activations))

    return attach(model, spec, names, make)
