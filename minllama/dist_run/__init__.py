"""Many processes, one model: data, sharded and tensor parallel, and what goes with it.

Reading order: launch and mesh (who is there); data_parallel and fsdp_by_hand (how it
works); shard, tensor, parallel_loss and activations (PyTorch's engine, told what a
Llama is); materialize and team (how the hub's loop trains it); accounting, timeline
and watch (what it costs, where time goes, who hangs); context and pipeline (cutting
the text, cutting the layers).
"""

from minllama.dist_run.accounting import Sharding, sharded_moments, sharded_peak
from minllama.dist_run.activations import checkpoint_activations, keep_activations
from minllama.dist_run.context import CutBatches, context_loss, context_parallel
from minllama.dist_run.data_parallel import no_sync, replicate
from minllama.dist_run.fsdp_by_hand import shard_by_hand
from minllama.dist_run.launch import launch
from minllama.dist_run.materialize import materialize
from minllama.dist_run.mesh import data_ranks, init_mesh, is_first
from minllama.dist_run.parallel_loss import vocabulary_cross_entropy
from minllama.dist_run.pipeline import Pipeline, pipeline
from minllama.dist_run.shard import largest_unit, shard
from minllama.dist_run.team import MeshTeam
from minllama.dist_run.tensor import tensor_parallel, tensor_parallel_loss
from minllama.dist_run.timeline import (
    draw_timeline,
    exposed_communication,
    trace_step,
)
from minllama.dist_run.watch import Watch, install_sigterm, should_stop

__all__ = [
    "CutBatches",
    "MeshTeam",
    "Pipeline",
    "Sharding",
    "Watch",
    "checkpoint_activations",
    "context_loss",
    "context_parallel",
    "data_ranks",
    "draw_timeline",
    "exposed_communication",
    "init_mesh",
    "install_sigterm",
    "is_first",
    "keep_activations",
    "largest_unit",
    "launch",
    "materialize",
    "no_sync",
    "pipeline",
    "replicate",
    "shard",
    "shard_by_hand",
    "sharded_moments",
    "sharded_peak",
    "should_stop",
    "tensor_parallel",
    "tensor_parallel_loss",
    "trace_step",
    "vocabulary_cross_entropy",
]
