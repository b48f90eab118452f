"""FSDP: each process keeps a slice of every weight, and borrows the rest for a moment.

    before a block computes    all-gather its slices: the whole block, on every rank
    after it                   forget the borrowed part
    after its backward pass    reduce-scatter its gradients: each rank keeps its slice

Weights, gradients and optimizer states divide by the number of ranks; what is whole at
any time is a block or two. While one block computes, the slices of the next are already
on their way. `fsdp_by_hand.py` does this in the open; here it is PyTorch's own
`fully_shard`, told what a unit of this model is.

Papers: ZeRO, Rajbhandari et al. 2019, arXiv:1910.02054 · PyTorch FSDP, Zhao et al.
2023, 2304.11277.
"""

from typing import TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from minllama.architecture.model import MinimalLlama
from minllama.dist_run.mesh import size_of

Model = TypeVar("Model", bound=MinimalLlama)


def shard(
    model: Model,
    mesh: DeviceMesh,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    reshard: bool = True,
    prefetch: int = 1,
    offload: bool = False,
) -> Model:
    """Keep a slice of every parameter on each rank. The loss does not change.

    In place; parameters become DTensors of the same names. A model on the meta device
    stays there, as slices: `to_empty`, then load them (`dist_checkpoint.load_weights`)
    or draw them (`model.init_weights`), then `tie_weights`.

    Args:
        model: whole, or already tensor parallel; frozen and trainable parameters mixed.
        mesh: of `init_mesh`. Axes shard and replicate are used; with both, slices are
            kept within a group and gradients also averaged between groups (HSDP).
        param_dtype: weights are gathered and multiplied in it (torch.bfloat16), while
            slices and the optimizer keep theirs. None: as they are.
        reduce_dtype: of gradients on their way; float32 is safe. None: as computed.
        reshard: forget a block after its forward pass and gather it anew for the
            backward pass; False keeps it: more memory, a third less traffic.
        prefetch: blocks whose slices are fetched ahead of the one that computes.
        offload: keep slices and optimizer on the CPU (GPUs only).

    Raises:
        ValueError: the model is sharded already, or no axis of the mesh is left for it.
    """
    data = _data_mesh(mesh)
    if isinstance(model, FSDPModule):
        raise ValueError("the model is sharded already; shard(model) is called once.")
    if prefetch < 0:
        raise ValueError(f"prefetch={prefetch} must be at least 0.")
    precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    rotation_stays = MixedPrecisionPolicy(  # or cosines and sines would lose precision
        param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )
    away = CPUOffloadPolicy() if offload else OffloadPolicy()
    units: list[nn.Module] = list(model.layers)
    for block in units:
        fully_shard(
            block,
            mesh=data,
            reshard_after_forward=reshard,
            mp_policy=rotation_stays,
            offload_policy=away,
        )
    ends = [] if model.config.tie_embeddings else [model.embed_tokens, model.lm_head]
    for module in [*ends, model]:  # tied, both are one parameter of the root
        fully_shard(module, mesh=data, mp_policy=precision, offload_policy=away)
    if ends:
        units = [model.embed_tokens, *units, model.lm_head]
    register_fsdp_forward_method(model, "hidden_states")
    _fetch_ahead(units, prefetch)
    return model


def _data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    names = mesh.mesh_dim_names or ()
    if not names and mesh.ndim == 1:
        return mesh
    if "shard" not in names:
        raise ValueError(
            f"the mesh has the axes {', '.join(names) or 'without names'}, and none is "
            "called shard; make it with init_mesh(shard=…)."
        )
    if size_of(mesh, "replicate") > 1:
        return mesh["replicate", "shard"]
    return mesh["shard"]


def _fetch_ahead(units: list[nn.Module], depth: int) -> None:
    """Unit i asks for the next `depth` when it starts; in reverse in the backward pass.

    A backward pass fetches one ahead by itself, and a forward pass as far as the CPU
    runs ahead of the GPU; a depth of 1 adds what that leaves out.
    """
    for index, unit in enumerate(units):
        after = units[index + 1 : index + 1 + depth]
        before = units[max(0, index - depth) : index][::-1]
        if after:
            unit.set_modules_to_forward_prefetch(after)  # type: ignore[operator]
        if before:
            unit.set_modules_to_backward_prefetch(before)  # type: ignore[operator]


def largest_unit(model: MinimalLlama) -> int:
    """Parameters of the largest part that is ever whole on a rank."""
    counts = [sum(p.numel() for p in block.parameters()) for block in model.layers]
    inside = {id(p) for block in model.layers for p in block.parameters()}
    rest = [p.numel() for p in model.parameters() if id(p) not in inside]
    return max([*counts, sum(rest) if model.config.tie_embeddings else max(rest)])
