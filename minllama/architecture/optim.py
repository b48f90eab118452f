"""Optimizers over what trains: AdamW, and Muon for the matrices inside the blocks.

AdamW scales each weight's step by its own history. Muon looks at a matrix as a whole:
it takes the momentum M = U S V^T and steps along U V^T, so that every direction of the
matrix learns at the same rate and not only the few that dominate the gradient. U V^T
comes from five rounds of a polynomial in M M^T, without a decomposition.

Papers: AdamW Loshchilov and Hutter 2017, arXiv:1711.05101 · Muon Jordan et al. 2024,
kellerjordan.github.io/posts/muon; its scale Liu et al. 2025, 2502.16982, section 2.2.
"""

import torch
from torch import Tensor, nn


def make_adamw(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
) -> torch.optim.AdamW:
    """AdamW over what trains; matrices decay, norms and biases do not.

    Raises:
        ValueError: nothing in the model has requires_grad.
    """
    groups = [
        {"params": part, "weight_decay": decay}
        for part, decay in zip(_matrices_and_rest(model), (weight_decay, 0.0))
    ]
    fused = all(p.device.type == "cuda" for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused or None)


def _matrices_and_rest(
    model: nn.Module,
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter has requires_grad=True; nothing would train.")
    return [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]


def orthogonalize(matrix: Tensor, rounds: int = 5) -> Tensor:
    """Nearly U V^T of matrix = U S V^T: singular values near 1. (…, m, n) -> same.

    Each round maps every singular value s to 3.4445 s - 4.7750 s^3 + 2.0315 s^5, which
    lifts small ones fast and leaves all between 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for the groups that say `muon=True`, AdamW for the others.

    The step is scaled by 0.2 sqrt(max(m, n)), the size of a typical AdamW step, so that
    one learning rate and one weight decay serve both.
    """

    def __init__(self, groups: list[dict], lr: float, momentum: float = 0.95) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": (0.9, 0.95), "eps": 1e-8}
        super().__init__(groups, {**defaults, "weight_decay": 0.0, "muon": False})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        """One step along the present gradients."""
        for group in self.param_groups:
            pairs = [(p, p.grad) for p in group["params"] if p.grad is not None]
            for p, _ in pairs:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            (self._muon if group["muon"] else self._adam)(pairs, group)

    def _muon(self, pairs: list[tuple[Tensor, Tensor]], group: dict) -> None:
        alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for p, grad in pairs:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(grad, 1 - group["momentum"])
            ahead = grad.lerp(state["momentum"], group["momentum"])  # Nesterov
            alike.setdefault(p.shape, []).append((p, ahead))
        for shape, some in alike.items():  # equal shapes go as one batch
            steps = orthogonalize(torch.stack([ahead for _, ahead in some]))
            scale = 0.2 * max(shape) ** 0.5 * group["lr"]
            for (p, _), step in zip(some, steps):
                p.sub_(step, alpha=scale)

    def _adam(self, pairs: list[tuple[Tensor, Tensor]], group: dict) -> None:
        beta1, beta2 = group["betas"]
        for p, grad in pairs:
            state = self.state[p]
            if not state:
                state["step"] = 0
                state["mean"], state["square"] = (
                    torch.zeros_like(p),
                    torch.zeros_like(p),
                )
            state["step"] += 1
            state["mean"].lerp_(grad, 1 - beta1)
            state["square"].lerp_(grad.square(), 1 - beta2)
            mean = state["mean"] / (1 - beta1 ** state["step"])
            square = state["square"] / (1 - beta2 ** state["step"])
            p.sub_(group["lr"] * mean / (square.sqrt() + group["eps"]))


def make_muon(model: nn.Module, lr: float, weight_decay: float = 0.1) -> Muon:
    """Muon over the matrices of the blocks; AdamW over embedding, head and vectors.

    Raises:
        ValueError: nothing in the model has requires_grad, or it is in plain slices.
    """
    if hasattr(getattr(model, "gradient_exchange", None), "units"):
        raise ValueError(
            "the model was cut by shard_by_hand, and Muon looks at whole matrices; use "
            "make_adamw, or replicate(model), which keeps them whole."
        )
    matrices, vectors = _matrices_and_rest(model)
    outer = {id(p) for name in ("embed_tokens", "lm_head")
             for p in getattr(model, name).parameters()}  # fmt: skip
    inner = [p for p in matrices if id(p) not in outer]
    groups = [
        {"params": inner, "weight_decay": weight_decay, "muon": True},
        {
            "params": [p for p in matrices if id(p) in outer],
            "weight_decay": weight_decay,
        },
        {"params": vectors},
    ]
    return Muon([group for group in groups if group["params"]], lr)
