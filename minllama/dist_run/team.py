"""What the hub's loop asks of the processes that share a step, answered for a mesh.

The loss of a step is the mean over all targets of all processes, however unevenly the
rows fill them: counts and losses are added up, gradients arrive averaged.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from minllama.architecture.train import Team
from minllama.dist_run.data_parallel import set_exchange
from minllama.dist_run.fsdp_by_hand import Engine, clip_shards
from minllama.dist_run.mesh import data_ranks, size_of


class MeshTeam(Team):
    """The processes of a mesh, as one team: `train(…, team=MeshTeam(mesh))`."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.rank, self.parts = data_ranks(mesh)
        axes = ("replicate", "shard")
        self.by_hand: nn.Module | None = None  # a model distributed by hand
        self.groups = [mesh[a].get_group() for a in axes if size_of(mesh, a) > 1]

    def sum(self, x: Tensor) -> Tensor:
        """Added up over the processes that see other rows; `tensor` sees the same."""
        x = x.clone()
        for group in self.groups:
            dist.all_reduce(x, group=group)
        return x

    def exchange(self, model: nn.Module, now: bool) -> None:
        """Gradients travel after the last backward pass of a step only."""
        self.by_hand = model if hasattr(model, "gradient_exchange") else None
        if self.by_hand is not None:
            set_exchange(model, now)
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(now)
            model.set_is_last_backward(now)

    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        """The norm over all slices; those of one mesh at a time, so kinds may mix."""
        if isinstance(getattr(self.by_hand, "gradient_exchange", None), Engine):
            assert self.by_hand is not None
            return clip_shards(self.by_hand, max_norm)
        kinds: dict[object, list[Tensor]] = {}
        for p in parameters:
            assert p.grad is not None
            kind = (p.grad.device_mesh, p.grad.placements) if isinstance(
                p.grad, DTensor) else None  # fmt: skip
            kinds.setdefault(kind, []).append(p.grad)
        norms = [_whole(nn.utils.get_total_norm(some)) for some in kinds.values()]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        for some in kinds.values():
            _scale(some, max_norm, norm)
        return norm


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def _scale(grads: list[Tensor], max_norm: float, norm: Tensor) -> None:
    share = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as clip_grad_norm_ does
    local = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
    torch._foreach_mul_(local, share)  # type: ignore[attr-defined]
