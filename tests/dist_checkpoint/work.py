"""What the tests of this chapter share: models cut in several ways, and steps."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from minllama.architecture.data import Batch
from minllama.architecture.model import MinimalLlama
from minllama.architecture.train import next_token_loss
from tests.conftest import MODELS, tiny_config

ENDS = {
    "embed_tokens": RowwiseParallel(input_layouts=Replicate()),
    "lm_head": ColwiseParallel(output_layouts=Replicate()),
}
BLOCK = {
    "self_attn.q_proj": ColwiseParallel(),
    "self_attn.k_proj": ColwiseParallel(),
    "self_attn.v_proj": ColwiseParallel(),
    "self_attn.o_proj": RowwiseParallel(),
    "mlp.gate_proj": ColwiseParallel(),
    "mlp.up_proj": ColwiseParallel(),
    "mlp.down_proj": RowwiseParallel(),
}


def cut(model: MinimalLlama, kind: str) -> nn.Module:
    """The model as fsdp, hsdp, tp, 2d (FSDP over TP) or ddp; 2d and hsdp on 4 ranks."""
    world = dist.get_world_size()
    if kind == "ddp":
        return DistributedDataParallel(model)
    inner = {"fsdp": 1, "tp": world, "2d": world // 2, "hsdp": world // 2}[kind]
    mesh = init_device_mesh("cpu", (world // inner, inner), mesh_dim_names=("a", "b"))
    if kind in ("tp", "2d"):
        parallelize_module(model, mesh["b"], ENDS)
        for layer in model.layers:
            parallelize_module(layer, mesh["b"], BLOCK)
        model.tie_weights()
    if kind in ("fsdp", "2d", "hsdp"):
        mesh = mesh if kind == "hsdp" else mesh["a"]
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def meta_model(name: str = "llama", **changes) -> MinimalLlama:
    family, settings = MODELS[name]
    with torch.device("meta"):
        return family(tiny_config(**{**settings, **changes}))


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor put together again, in every process."""
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in tensors.items()
    }


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def make_rows(step: int, rows: int = 4, length: int = 8) -> Tensor:
    """The tokens of a step, alike in every process: (rows, length + 1)."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 97, (rows, length + 1), generator=generator)


def train_step(model, optimizer, rows: Tensor, kind: str = "fsdp") -> float:
    """One step on these rows, each rank on those that are its own. The mean loss."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    alike = {"tp": world, "2d": world // 2}.get(kind, 1)  # neighbours see the same
    mine = rows[rank // alike :: world // alike]
    places = torch.arange(rows.size(1) - 1).expand(len(mine), -1)
    batch = Batch(mine[:, :-1].contiguous(), mine[:, 1:].contiguous(), places)
    loss = next_token_loss(model, batch) / batch.counted()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss = loss.detach()
    if world > 1:
        dist.all_reduce(loss)
    return float(loss) / world


def optimizer_tensors(model: nn.Module, optimizer) -> dict[str, Tensor]:
    """All state tensors of an optimizer, whole, by the name of the parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        f"{names[id(p)]}.{key}": value
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    return whole(found)
