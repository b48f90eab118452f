"""The processes of a recipe: one, or as many as torchrun started.

    minllama train …                                            one
    torchrun --nproc-per-node 4 -m minllama.recipes.train …     four, and a mesh of them

A model that many share is built as shapes, cut, and only then given its bytes, so that
no process ever holds all of it.
"""

import gc
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from minllama.architecture.config import LlamaConfig
from minllama.architecture.model import MinimalLlama
from minllama.architecture.train import Team
from minllama.architecture.weights import open_weights
from minllama.dist_checkpoint import load_weights
from minllama.dist_run.activations import checkpoint_activations
from minllama.dist_run.materialize import materialize
from minllama.dist_run.mesh import init_mesh, is_first, size_of
from minllama.dist_run.shard import shard
from minllama.dist_run.team import MeshTeam
from minllama.dist_run.tensor import tensor_parallel
from minllama.recipes.devices import check_device

Result = TypeVar("Result")


@dataclass(frozen=True)
class Workers:
    """Who works together, and where."""

    device: str
    mesh: DeviceMesh | None  # None: this process alone
    team: Team

    @property
    def world(self) -> int:
        """Processes."""
        return 1 if self.mesh is None else self.mesh.size()

    @property
    def rank(self) -> int:
        """Of this process among those that see rows of their own."""
        return self.team.rank if isinstance(self.team, MeshTeam) else 0

    def first(self, work: Callable[[], Result]) -> Result | None:
        """Rank 0 does it, and the others wait."""
        result = work() if is_first() else None
        if self.mesh is not None:
            dist.barrier()
        return result

    def cut(
        self,
        model: MinimalLlama,
        dtype: torch.dtype | None = None,
        sequence: bool = True,
        sharded: bool = True,
    ) -> None:
        """Cut a model of shapes along the axes of the mesh."""
        if self.mesh is None:
            return
        if size_of(self.mesh, "tensor") > 1:
            tensor_parallel(model, self.mesh, sequence=sequence)
        if sharded:
            reduce = None if dtype is None else torch.float32
            shard(model, self.mesh, param_dtype=dtype, reduce_dtype=reduce)

    def end(self) -> None:
        """Leave together; gloo's threads must not meet a half-dead interpreter."""
        if self.mesh is not None:
            gc.collect()
            dist.barrier()
            dist.destroy_process_group()


def world_size() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_workers(
    device: str | None, replicate: int = 1, shard: int = -1, tensor: int = 1
) -> Workers:
    """The processes that torchrun started, as a mesh; or this one.

    Raises:
        ValueError: no such device, or axes that do not fit the number of processes.
    """
    if world_size() > 1:
        _quiet()
        kind = None if device is None else torch.device(device).type
        mesh = init_mesh(replicate, shard, tensor, kind)
        at = "cpu"
        if mesh.device_type == "cuda":
            at = f"cuda:{torch.cuda.current_device()}"
        return Workers(at, mesh, MeshTeam(mesh))
    if replicate != 1 or shard not in (-1, 1) or tensor != 1:
        raise ValueError(
            f"replicate={replicate}, shard={shard}, tensor={tensor} need more than one "
            "process; start them: torchrun --nproc-per-node N -m minllama.recipes.train"
        )
    return Workers(check_device(device), None, Team())


def _quiet() -> None:
    """Two remarks that PyTorch makes in each rank and that ask nothing of a reader.

    That logits must not be changed in place; that a norm over two axes takes two sums.
    """
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def build_model(
    workers: Workers,
    source: LlamaConfig | str,
    dtype: torch.dtype | None = None,
    compute: torch.dtype | None = None,
    change: Callable[[MinimalLlama], object] = lambda model: None,
    checkpointing: str | None = None,
    **cut,
) -> MinimalLlama:
    """A model from its config (random weights) or a folder, cut over the workers.

    Args:
        workers: who shares it.
        source: a config, or what `load_weights` reads.
        dtype: of the weights. None: as the files hold them, or float32.
        compute: of sharded weights while they are used. None: their own.
        change: what is done to the shapes before they are cut.
        checkpointing: full or selective. None: activations are kept.
        cut: more for `Workers.cut`.
    """
    if workers.mesh is None and isinstance(source, str):
        model = MinimalLlama.from_pretrained(source, dtype, workers.device)
        change(model)
    else:
        config = source if isinstance(source, LlamaConfig) else None
        stored = None if isinstance(source, LlamaConfig) else open_weights(source)
        if config is None:
            assert stored is not None
            config = stored.config
            dtype = dtype or stored.dtype
        with torch.device("meta"):
            model = MinimalLlama.from_config(config).to(dtype or torch.float32)
        change(model)
        workers.cut(model, compute, **cut)
        if isinstance(source, LlamaConfig):
            materialize(model, workers.device)
        else:
            load_weights(model, source, device=workers.device)
    if checkpointing is not None:
        checkpoint_activations(model, checkpointing)
    return model
