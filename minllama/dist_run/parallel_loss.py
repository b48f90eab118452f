"""Cross-entropy of logits whose words lie on different ranks.

    loss = log(sum of e^z over all words) - z of the target

Each rank holds (n, V / ranks) logits. The maximum and the sum of e^z are two reductions
over the ranks, the target's logit a third: the rank that holds the word knows it, the
others add zero. The gradient, softmax minus one at the target, needs no exchange.
Paper: Megatron, Shoeybi et al. 2019, arXiv:1909.08053, section 3.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from minllama.architecture.data import IGNORE


def vocabulary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed over the targets that count, 0-d, in float32 or wider.

    Args:
        logits: (n, V), a DTensor cut along V; or a plain tensor, for the plain loss.
        targets: (n,) int64, IGNORE where nothing is learned; the same on every rank.

    Raises:
        ValueError: logits that are distributed otherwise.
    """
    if not isinstance(logits, DTensor):
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return torch.nn.functional.cross_entropy(
            wide, targets, ignore_index=IGNORE, reduction="sum"
        )
    if tuple(logits.placements) not in ((Shard(1),), (Shard(-1),)):
        raise ValueError(
            f"logits are placed {logits.placements}; they must be cut by words, "
            "as tensor_parallel(model, mesh, gather_logits=False) leaves them."
        )
    mesh, V = logits.device_mesh, logits.size(1)
    width = -(-V // mesh.size())  # as DTensor cuts: the last rank has the rest
    first = mesh.get_local_rank() * width
    return _CrossEntropy.apply(logits.to_local(), targets, first, mesh.get_group())


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, first: int, group) -> Tensor:
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        low = torch.full((len(z), 1), -torch.inf, dtype=z.dtype, device=z.device)
        top = torch.cat([z, low], dim=1).amax(1)  # a rank may hold no word at all
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        e = (z - top[:, None]).exp_()  # (n, V / ranks)
        here = targets - first
        mine = (here >= 0) & (here < z.size(1))
        at = here.clamp(0, max(z.size(1) - 1, 0))[:, None]
        own = z.gather(1, at)[:, 0] - top if z.size(1) else torch.zeros_like(top)
        sums = torch.stack([e.sum(1), own.where(mine, 0)])  # (2, n)
        dist.all_reduce(sums, group=group)
        counts = targets != IGNORE
        ctx.save_for_backward(e.div_(sums[0, :, None]), at, mine, counts)
        ctx.dtype = logits.dtype
        return (sums[0].log() - sums[1]).where(counts, 0).sum()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        softmax, at, mine, counts = ctx.saved_tensors
        d = softmax * (counts * grad)[:, None]
        if d.size(1):
            d.scatter_add_(1, at, -(mine & counts).to(d.dtype)[:, None] * grad)
        return d.to(ctx.dtype), None, None, None
