"""FSDP2 shards a model that was made fast: two processes, one row each, one answer."""

import copy
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from minllama.architecture.data import Batch
from minllama.architecture.kernels import HAS_TRITON, interpreting
from minllama.architecture.train import next_token_loss
from minllama.fast_ops import fast_loss, use_fast_ops
from tests.conftest import make_model

pytestmark = pytest.mark.skipif(
    not HAS_TRITON or not interpreting(), reason="gloo on CPU: needs the interpreter"
)


def gradient_error(rank: int, tied: bool) -> float:
    """Of any parameter, sharded and fast against whole and plain, relative."""
    torch.manual_seed(0)
    plain = make_model("llama", tie_embeddings=tied)
    fast = use_fast_ops(copy.deepcopy(plain))
    for layer in fast.layers:
        fully_shard(layer)
    fully_shard(fast)
    register_fsdp_forward_method(fast, "hidden_states")
    tokens, targets = torch.randint(0, 97, (2, 2, 5))
    positions = torch.arange(5).expand(2, 5)
    next_token_loss(plain, Batch(tokens, targets, positions)).backward()
    own = slice(rank, rank + 1)
    loss = fast_loss(fast, Batch(tokens[own], targets[own], positions[own]))
    (2 * loss).backward()  # gradients are averaged over the two
    errors = [
        (p.grad.full_tensor() - q.grad).abs().max() / q.grad.abs().max()
        for p, q in zip(fast.parameters(), plain.parameters())
    ]
    return float(max(errors))


def work(rank: int, port: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    errors = [gradient_error(rank, tied) for tied in (False, True)]
    if rank == 0:
        Path(path).write_text(" ".join(map(str, errors)))
    dist.barrier()
    os._exit(0)  # a gloo thread may abort a process that ends by itself


def test_sharded_gradients_are_the_plain_models(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = tmp_path / "errors"
    mp.spawn(work, (port, str(path)), nprocs=2)
    errors = [float(word) for word in path.read_text().split()]
    assert len(errors) == 2 and max(errors) < 1e-4
