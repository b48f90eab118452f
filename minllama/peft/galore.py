"""GaLore: train all weights, but keep the optimizer's numbers for a low-rank gradient.

    G = U S V^T,  P = first r columns of U      refreshed now and then
    R = P^T G (r, n)  ->  Adam's step N on R  ->  W -= rate * scale * P N

AdamW holds two numbers a weight; of an (m, n) matrix this holds 2 r n and P's m r. The
full-rank alternative to LoRA: nothing is frozen, and nothing is to be merged.
Paper: Zhao et al. 2024, arXiv:2403.03507, section 4.
"""

import torch
from torch import Tensor, nn


class GaLore(torch.optim.Optimizer):
    """AdamW whose groups with a `rank` step inside a subspace of their gradients.

    Args:
        groups: as of any optimizer; a group with "rank" holds matrices only.
        lr: the rate.
        betas: of Adam's two means.
        eps: keeps a division from zero.
        weight_decay: of the weights themselves, decoupled.
        every: steps between two looks for the subspace.
        scale: of the steps in it.

    Raises:
        ValueError: a group with a rank holds a tensor that is no matrix.
    """

    def __init__(
        self,
        groups,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        every: int = 200,
        scale: float = 0.25,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "every": every,
            "scale": scale,
            "rank": None,
        }
        super().__init__(groups, defaults)
        for group in self.param_groups:
            shapes = [tuple(p.shape) for p in group["params"] if p.dim() != 2]
            if group["rank"] is not None and shapes:
                raise ValueError(
                    f"rank={group['rank']} for a tensor of shape {shapes[0]}; only "
                    "matrices have one. Put the others into a group without rank."
                )

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        """One step along the present gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, group)

    def _step(self, p: nn.Parameter, group: dict) -> None:
        state, grad = self.state[p], p.grad
        assert grad is not None
        count = state["step"] = state.get("step", 0) + 1
        rank: int = group["rank"] or min(p.shape, default=1)
        low = rank < min(p.shape, default=1)
        wide = p.size(0) <= p.size(1) if low else True  # project the shorter side
        if low:
            if (count - 1) % group["every"] == 0:
                state["basis"] = subspace(grad if wide else grad.t(), rank)
            basis = state["basis"]
            grad = basis.t() @ (grad if wide else grad.t())  # (r, n)
        step = self._adam(state, grad, count, group)
        if low:
            step = group["scale"] * (state["basis"] @ step)  # (m, n)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(step if wide else step.t(), alpha=group["lr"])

    def _adam(self, state: dict, grad: Tensor, count: int, group: dict) -> Tensor:
        if "mean" not in state:
            state["mean"], state["square"] = (
                torch.zeros_like(grad),
                grad.new_zeros(grad.shape),
            )
        beta1, beta2 = group["betas"]
        state["mean"].lerp_(grad, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        mean = state["mean"] / (1 - beta1**count)
        square = state["square"] / (1 - beta2**count)
        return mean / (square.sqrt() + group["eps"])


def subspace(grad: Tensor, rank: int) -> Tensor:
    """The `rank` directions that hold most of a gradient. (m, n) -> (m, r)."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    u = torch.linalg.svd(grad.to(wide), full_matrices=False).U
    return u[:, :rank].to(grad.dtype).contiguous()  # as a checkpoint gives it back


def make_galore(
    model: nn.Module,
    lr: float,
    rank: int = 128,
    every: int = 200,
    scale: float = 0.25,
    weight_decay: float = 0.0,
) -> GaLore:
    """GaLore over the matrices of the blocks, AdamW over all else that trains.

    Raises:
        ValueError: a rank below 1, or nothing trains.
    """
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1.")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("no parameter has requires_grad=True; nothing would train.")
    inner = [p for n, p in trained.items() if n.startswith("layers.") and p.dim() == 2]
    ids = {id(p) for p in inner}
    rest = [p for p in trained.values() if id(p) not in ids]
    groups = [{"params": inner, "rank": rank}, {"params": rest}]
    groups = [group for group in groups if group["params"]]
    return GaLore(groups, lr, weight_decay=weight_decay, every=every, scale=scale)
