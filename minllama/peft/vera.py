"""VeRA: one random pair A, B for all layers; each layer learns two vectors beside it.

    y = W x + b * (B (d * (A x)))      A (r, in), B (out, r) frozen and shared

b starts at zero. Layers of different size take the first rows and columns that they
need. A and B belong to the adapter as much as b and d: they are saved with it.
Paper: Kopiczko et al. 2023, arXiv:2310.11454, section 3.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minllama.peft.adapter import Adapter, Spec
from minllama.peft.attach import attach
from minllama.peft.base import model_dtype, place
from minllama.peft.targets import find_targets


class VeRALinear(Adapter):
    """`base(x)` plus a scaled random path. (…, in) -> (…, out)."""

    adds = True

    shared_a: Tensor  # (r, widest in), one tensor for all layers
    shared_b: Tensor  # (widest out, r)

    def __init__(
        self, base: nn.Module, spec: Spec, shared: tuple[Tensor, Tensor], place: dict
    ) -> None:
        super().__init__(base, spec)
        self.register_buffer("shared_a", shared[0], persistent=False)
        self.register_buffer("shared_b", shared[1], persistent=False)
        self.d = nn.Parameter(torch.empty(len(self.shared_a), **place))
        self.b = nn.Parameter(torch.empty(self.out_features, **place))
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """b zero, d as asked for."""
        nn.init.zeros_(self.b)
        nn.init.constant_(self.d, self.spec.settings["d_initial"])

    def reset_parameters(self) -> None:
        """As at birth; A and B drawn again from their seed."""
        self.start()
        draw_shared(self.shared_a, self.shared_b, self.spec.settings["seed"])

    def trained(self) -> list[nn.Parameter]:
        return [self.d, self.b]

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.strength == 0:
            return y
        a = self.shared_a[:, : self.in_features].to(x.dtype)
        b = self.shared_b[: self.out_features].to(x.dtype)
        low = F.linear(x, a) * (self.strength * self.d.to(x.dtype))  # (…, r)
        return y + F.linear(low, b * self.b.to(x.dtype)[:, None])

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + diag(b) B diag(d) A."""
        a = self.shared_a[:, : self.in_features].to(weight.dtype)
        b = self.shared_b[: self.out_features].to(weight.dtype)
        left, right = self.b.to(weight.dtype)[:, None] * b, self.d.to(weight.dtype)
        return weight + self.strength * left @ (right[:, None] * a), bias


@torch.no_grad()
def draw_shared(a: Tensor, b: Tensor, seed: int) -> None:
    """Fill A and B uniformly within sqrt(6 / columns), on a CPU: a seed says it all."""
    own = torch.Generator().manual_seed(seed)
    for matrix in (a, b):
        bound = (6 / matrix.size(1)) ** 0.5
        drawn = torch.empty(matrix.shape).uniform_(-bound, bound, generator=own)
        matrix.copy_(drawn)


def add_vera(
    model: nn.Module,
    rank: int = 256,
    targets: str | Iterable[str] = ("q_proj", "v_proj"),
    d_initial: float = 0.1,
    seed: int = 0,
    name: str = "default",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Freeze the model, then put VeRA around every layer that `targets` says.

    Args:
        model: changed in place and returned.
        rank: r, of the shared pair; it costs compute, hardly any parameters.
        targets: names, "all-linear" or a regular expression, as in `add_lora`.
        d_initial: what d starts at.
        seed: of A and B.
        name: of the adapter.
        dtype: of all of it; None: the layers'.

    Raises:
        ValueError: a rank below 1, or a name that is not there.
    """
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1.")
    names, activations = find_targets(model, targets), model_dtype(model)
    layers = [model.get_submodule(name) for name in names]
    at = place(layers[0], dtype, activations)
    shape = [max(getattr(m, size) for m in layers) for size in Adapter.sizes[:2]]
    a, b = torch.empty(rank, shape[0], **at), torch.empty(shape[1], rank, **at)
    if not a.is_meta:
        draw_shared(a, b, seed)
    settings = {"rank": rank, "d_initial": d_initial, "seed": seed}
    spec = Spec(name, "vera", settings)

    def make(_: str, base: nn.Module) -> VeRALinear:
        return VeRALinear(base, spec, (a, b), place(base, dtype, activations))

    return attach(model, spec, names, make)
