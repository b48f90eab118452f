"""AdaLoRA: let the layers compete for rank while they train.

    y = W x + (alpha / r) B diag(e) A x

A, e and B stand for a singular value decomposition; e starts at zero. Those e whose
triple (column of B, e, row of A) matters least are set to zero, more and more of them,
until the budget is reached. What a number matters is |p dL/dp|, smoothed over steps,
times how much it varies. A penalty keeps rows of A and columns of B orthogonal.
Paper: Zhang et al. 2023, arXiv:2303.10512, section 3.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from minllama.peft.adapter import Adapter, Spec, adapters
from minllama.peft.attach import attach
from minllama.peft.base import model_dtype, place
from minllama.peft.lora_layers import linear_with_low_rank
from minllama.peft.targets import find_targets, pattern_value


class AdaLoRALinear(Adapter):
    """`base(x)` plus a path whose rank can shrink. (…, in) -> (…, out)."""

    adds = True

    def __init__(self, base: nn.Module, spec: Spec, rank: int, place: dict) -> None:
        super().__init__(base, spec)
        self.rank = rank
        # of the rank to begin with; 1e-5 as the PEFT library has it
        self.scale = spec.settings["alpha"] / (spec.settings["rank"] + 1e-5)
        self.a = nn.Parameter(torch.empty(rank, self.in_features, **place))
        self.e = nn.Parameter(torch.empty(rank, **place))
        self.b = nn.Parameter(torch.empty(self.out_features, rank, **place))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A and B small and random, e zero."""
        nn.init.normal_(self.a, std=0.02)
        nn.init.normal_(self.b, std=0.02)
        nn.init.zeros_(self.e)

    def forward(self, x: Tensor) -> Tensor:
        if self.strength == 0:
            return self.base(x)
        scale, a = self.scale * self.strength, self.a * self.e[:, None]
        return linear_with_low_rank(self.base, x, x, a, self.b, scale)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s B diag(e) A."""
        a, e, b = (p.to(weight.dtype) for p in (self.a, self.e, self.b))
        return weight + self.strength * self.scale * (b * e) @ a, bias


def add_adalora(
    model: nn.Module,
    rank: int = 12,
    alpha: float = 16.0,
    targets: str | Iterable[str] = "all-linear",
    name: str = "default",
    dtype: torch.dtype | None = None,
    rank_pattern: Mapping[str, int] | None = None,
) -> nn.Module:
    """Freeze the model, then put AdaLoRA around every layer that `targets` says.

    Args:
        model: changed in place and returned.
        rank: r to begin with; `RankAllocator` lowers it on average.
        alpha: the change is scaled by alpha / r.
        targets: names, "all-linear" or a regular expression, as in `add_lora`.
        name: of the adapter.
        dtype: of its weights; None: the layer's.
        rank_pattern: name or regular expression -> another rank; the scale stays.

    Raises:
        ValueError: a rank below 1, or a name that is not there.
    """
    if rank < 1 or not alpha > 0:
        raise ValueError(f"rank={rank} must be at least 1, alpha={alpha} above 0.")
    spec = Spec(name, "adalora", {"rank": rank, "alpha": alpha})
    activations = model_dtype(model)

    def make(at: str, base: nn.Module) -> AdaLoRALinear:
        where = place(base, dtype, activations)
        own = pattern_value(dict(rank_pattern or {}), at, rank)
        return AdaLoRALinear(base, spec, own, where)

    return attach(model, spec, find_targets(model, targets), make)


def orthogonality_loss(model: nn.Module) -> Tensor:
    """Mean of |A A^T - 1| and |B^T B - 1|: times 0.5, it is part of the loss."""
    terms = []
    for layer in adapters(model).values():
        if isinstance(layer, AdaLoRALinear):
            for square in (layer.a @ layer.a.t(), layer.b.t() @ layer.b):
                one = torch.eye(len(square), dtype=square.dtype, device=square.device)
                terms.append((square - one).norm())
    return torch.stack(terms).mean()


class RankAllocator:
    """Lowers the number of e that are not zero while an optimizer steps.

    It looks on after each step of the optimizer, where gradients are still there. What
    it remembers is in the optimizer's state, so whoever saves that saves it, too, and a
    run that was stopped goes on bit for bit.

    Args:
        model: with AdaLoRA.
        optimizer: that trains it.
        target_rank: mean rank of the layers in the end.
        steps: of the whole run.
        warmup: steps at full rank before.
        final: steps at the final rank in the end, with the choice settled.
        every: steps between choices.
        beta1: smoothing of what a number matters.
        beta2: smoothing of how much that varies.

    Raises:
        ValueError: no AdaLoRA in the model, or phases that do not fit the run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        target_rank: float,
        steps: int,
        warmup: int = 0,
        final: int = 0,
        every: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        found = adapters(model).values()
        self.layers = [layer for layer in found if isinstance(layer, AdaLoRALinear)]
        if not self.layers:
            raise ValueError("the model has no AdaLoRA layer; call add_adalora first.")
        if not 0 <= warmup < steps - final or steps - final < 2:
            raise ValueError(
                f"warmup={warmup} and final={final} must leave some of steps={steps}, "
                "one to look and one to choose."
            )
        self.full = sum(layer.rank for layer in self.layers)
        self.target = round(target_rank * len(self.layers))
        self.steps, self.warmup, self.final, self.every = steps, warmup, final, every
        self.beta1, self.beta2 = beta1, beta2
        optimizer.register_step_post_hook(self.look)

    def budget(self, step: int) -> int:
        """How many e may stay: all, then fewer along a cubic, then the target."""
        if step <= self.warmup:
            return self.full
        if step > self.steps - self.final:
            return self.target
        length = self.steps - self.final - self.warmup
        left = 1 - (step - self.warmup) / length
        return int((self.full - self.target) * left**3 + self.target)

    @torch.no_grad()
    def look(self, optimizer: torch.optim.Optimizer, *_) -> None:
        """After a step: remember what mattered, and cut if it is time."""
        group = optimizer.param_groups[0]
        step = group["looks"] = group.get("looks", 0) + 1
        settled = self.steps - self.final
        if step < settled:
            for layer in self.layers:
                for p in (layer.a, layer.e, layer.b):
                    if p.grad is not None:
                        self.remember(optimizer.state[p], (p * p.grad).abs())
        if step >= settled or (step > self.warmup and step % self.every == 0):
            self.cut(optimizer, self.budget(step))

    def remember(self, state: dict, matters: Tensor) -> None:
        """Two running means of a parameter: what it matters, and how that varies."""
        mean = state.setdefault("matters", torch.zeros_like(matters))
        spread = state.setdefault("varies", torch.zeros_like(matters))
        mean.mul_(self.beta1).add_(matters, alpha=1 - self.beta1)
        spread.mul_(self.beta2).add_((matters - mean).abs(), alpha=1 - self.beta2)

    def cut(self, optimizer: torch.optim.Optimizer, budget: int) -> None:
        """Of all layers together, the `budget` triples that matter most keep their e.

        Once the means rest, every call makes the same choice: it is settled.
        """

        def worth(p: nn.Parameter) -> Tensor:
            state = optimizer.state.get(p, {})
            if "matters" not in state:  # it never had a gradient
                return torch.zeros_like(p)
            return state["matters"] * state["varies"]

        scores = [
            worth(layer.e) + worth(layer.a).mean(1) + worth(layer.b).mean(0)
            for layer in self.layers
        ]
        every = torch.cat(scores)
        if budget >= len(every):
            return
        limit = every.kthvalue(len(every) - budget).values
        for layer, score in zip(self.layers, scores):
            layer.e.mul_(score > limit)
