"""Many processes, one model: data, sharded and tensor parallel, and what goes with it.

Reading order: launch and mesh (who is there), data_parallel and fsdp_by_hand (how it
works), shard, tensor, parallel_loss and activations (PyTorch's engine, told what a
Llama is), materialize and team (how the hub's loop trains it).
"""

from minllama.dist_run.activations import checkpoint_activations, keep_activations
from minllama.dist_run.data_parallel import no_sync, replicate
from minllama.dist_run.launch import launch
from minllama.dist_run.materialize import materialize
from minllama.dist_run.mesh import data_ranks, init_mesh, is_first
from minllama.dist_run.parallel_loss import vocabulary_cross_entropy
from minllama.dist_run.shard import largest_unit, shard
from minllama.dist_run.team import MeshTeam
from minllama.dist_run.tensor import tensor_parallel, tensor_parallel_loss

__all__ = [
    "MeshTeam",
    "checkpoint_activations",
    "data_ranks",
    "init_mesh",
    "is_first",
    "keep_activations",
    "largest_unit",
    "launch",
    "materialize",
    "no_sync",
    "replicate",
    "shard",
    "tensor_parallel",
    "tensor_parallel_loss",
    "vocabulary_cross_entropy",
]
