"""A mesh: the processes as a grid, one axis for each way of dividing the work.

replicate   each holds all, sees other rows, sums gradients      (data parallel)
shard       each holds a slice, sees other rows                  (FSDP)
tensor      each holds a slice of every matrix, sees the same rows

init_mesh(replicate=2, shard=4, tensor=8): 64 processes. The innermost axis talks
most, so `tensor` joins neighbours: GPUs of one host.
"""

import math
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("replicate", "shard", "tensor")


def init_mesh(
    replicate: int = 1,
    shard: int = -1,
    tensor: int = 1,
    device: str | None = None,
    timeout: float = 600.0,
) -> DeviceMesh:
    """The mesh of all processes, with the axes replicate, shard and tensor.

    Starts the process group where none runs: from torchrun's variables, or, without
    them, a group of this process alone, so that the same script runs everywhere.

    Args:
        replicate: groups that hold the same slices (HSDP); 1: plain FSDP.
        shard: processes that share one copy of the model; -1: all that are left (so in
            one of the axes).
        tensor: processes that share each matrix product.
        device: cuda (over NCCL) or cpu (over gloo). None: cuda where there is one.
        timeout: seconds after which a collective that hangs fails.

    Raises:
        ValueError: the sizes do not multiply to the number of processes, or are none.
    """
    sizes = {"replicate": replicate, "shard": shard, "tensor": tensor}
    _check_sizes(sizes, timeout)
    if device is None:
        over_gloo = dist.is_initialized() and dist.get_backend() == "gloo"
        device = "cuda" if torch.cuda.is_available() and not over_gloo else "cpu"
    if not dist.is_initialized():
        _init_group(device, timeout)
    world = dist.get_world_size()
    left = world // math.prod(size for size in sizes.values() if size != -1)
    shape = tuple(left if size == -1 else size for size in sizes.values())
    if math.prod(shape) != world:
        raise ValueError(
            f"{_named(sizes)} do not multiply to the {world} processes of this run; "
            "change them, or torchrun's --nproc-per-node and --nnodes."
        )
    return init_device_mesh(device, shape, mesh_dim_names=AXES)


def _named(sizes: dict[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items())


def _check_sizes(sizes: dict[str, int], timeout: float) -> None:
    wrong = {axis: size for axis, size in sizes.items() if size < 1 and size != -1}
    if wrong:
        raise ValueError(
            f"{_named(wrong)} must be at least 1, or -1: all processes that are left."
        )
    rest = {axis: size for axis, size in sizes.items() if size == -1}
    if len(rest) > 1:
        raise ValueError(
            f"{_named(rest)}: only one axis can take all that are left; give the "
            "other a number, as shard=1."
        )
    if timeout <= 0:
        raise ValueError(f"timeout={timeout} seconds must be greater than 0.")


def _init_group(device: str, timeout: float) -> None:
    limit = timedelta(seconds=timeout)
    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=limit)
    else:
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(
            backend, store=alone, rank=0, world_size=1, timeout=limit
        )


def size_of(mesh: DeviceMesh | None, axis: str) -> int:
    """Processes along an axis; 1 where there is no such axis."""
    names = () if mesh is None else mesh.mesh_dim_names or ()
    return mesh[axis].size() if mesh is not None and axis in names else 1


def data_ranks(mesh: DeviceMesh | None) -> tuple[int, int]:
    """Which part of a batch this process sees, and how many parts there are.

    Processes along `tensor` see the same rows; all others see different ones.
    """
    if mesh is not None and not set(mesh.mesh_dim_names or ()) & set(AXES):
        raise ValueError(
            f"the mesh has the axes {mesh.mesh_dim_names}, none of {', '.join(AXES)}: "
            "nobody knows who sees which rows; make it with init_mesh."
        )
    rank, parts = 0, 1
    for axis in ("replicate", "shard"):
        if size_of(mesh, axis) > 1:
            assert mesh is not None
            rank = rank * mesh[axis].size() + mesh[axis].get_local_rank()
            parts *= mesh[axis].size()
    return rank, parts


def is_first() -> bool:
    """True in the process that prints and writes: rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0
