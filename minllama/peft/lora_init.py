"""Where A and B start: PiSSA and OLoRA begin inside the weight instead of beside it.

PiSSA takes the r largest singular directions of W into B A and freezes the rest; OLoRA
takes r columns of Q and rows of R of W = Q R. What trains is then what matters most.
`base` keeps W - s B A, so the sum is W to rounding.

Papers: PiSSA Meng et al. 2024, arXiv:2404.02948 · OLoRA Büyükakyüz 2024, 2406.01775.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minllama.peft.base import float_weight, innermost, is_tied
from minllama.peft.lora_layers import LoRALinear, add_low_rank, linear_with_low_rank

STARTS = ("uniform", "gaussian", "pissa", "olora")


def split_pissa(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with s B A the best rank-r part of W (out, in)."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def split_olora(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r): the first rows of R, the first columns of Q."""
    q, r = torch.linalg.qr(weight)
    return r[:rank].contiguous(), q[:, :rank].contiguous()


SPLITS = {"pissa": split_pissa, "olora": split_olora}


def check_splits(model: nn.Module, ranks: Mapping[str, int], init: str) -> None:
    """Refuse what no part of a weight can be taken of, before any is taken.

    Args:
        model: not changed.
        ranks: name of a linear layer -> rank of the part.
        init: "pissa" or "olora".

    Raises:
        ValueError: a rank that the weight does not have, or a head whose weight is the
            embedding's, too.
    """
    for at, rank in ranks.items():
        layer: Any = model.get_submodule(at)  # nn.Module's attributes have no types
        most = min(layer.in_features, layer.out_features)
        if rank > most:
            raise ValueError(
                f"rank={rank} of {at} exceeds {most}, its smaller side: init={init!r} "
                "finds no more directions in it; lower the rank, or use init='uniform'."
            )
    if "lm_head" in ranks and is_tied(model):
        raise ValueError(
            f"init={init!r} on lm_head would take its part out of the embedding, which "
            "shares the weight; use init='uniform', or leave the head out of targets."
        )


class SplitLoRALinear(LoRALinear):
    """LoRA that begins with a part of the weight; `base` keeps the rest.

    The part is remembered (a0, b0), so that switching the adapter off gives W again,
    to rounding.

    Raises:
        ValueError: the base has no plain weight of its own to take a part of.
    """

    def reset_parameters(self) -> None:
        self.restore_base()
        self.split()

    @torch.no_grad()
    def split(self) -> None:
        """Take the part out of the base's weight."""
        weight = self.own_weight()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        a, b = SPLITS[self.spec.settings["init"]](wide, self.rank, self.scale)
        self.a.copy_(a)
        self.b.copy_(b)
        self.a0 = nn.Parameter(self.a.detach().clone(), requires_grad=False)
        self.b0 = nn.Parameter(self.b.detach().clone(), requires_grad=False)
        weight.copy_(wide - self.scale * b @ a)

    def own_weight(self) -> Tensor:
        """The weight that is split."""
        weight = float_weight(self.base)
        if weight is None or innermost(self.base) is not self.base:
            raise ValueError(
                f"{self.spec.settings['init']} takes its start out of a weight, but "
                f"{type(self.base).__name__} has no plain one of its own; use "
                "init='uniform', or start before quantize and other adapters."
            )
        return weight

    @torch.no_grad()
    def restore_base(self) -> None:
        if hasattr(self, "a0"):
            weight = self.own_weight()
            wide = torch.promote_types(weight.dtype, torch.float32)
            part = self.scale * self.b0.to(wide) @ self.a0.to(wide)
            weight.copy_(weight + part)
            del self.a0, self.b0

    def trained(self) -> list[nn.Parameter]:
        return [self.a, self.b]

    def forward(self, x: Tensor) -> Tensor:
        scale, dropped = self.scale * self.strength, self.dropout(x)
        y = linear_with_low_rank(self.base, x, dropped, self.a, self.b, scale)
        if self.strength != 1:
            y = add_low_rank(y, x, self.a0, self.b0, self.scale * (1 - self.strength))
        return y

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W - s B0 A0 + w s B A + (1 - w) s B0 A0, with w the strength."""
        start = self.b0.to(weight.dtype) @ self.a0.to(weight.dtype)
        rest = (1 - self.strength) * self.scale * start
        return weight + self.change() + rest, bias
