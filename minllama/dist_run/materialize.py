"""From shapes to slices: a model that no rank ever holds whole.

    with torch.device("meta"):
        model = MinimalLlama(config)       # shapes, no bytes
    shard(model, mesh)                     # slices of shapes
    materialize(model)                     # slices with random numbers
    # or: dist_checkpoint.load_weights(model, folder), each rank reading its part

Random weights are those of a single process with the same seed: every rank draws every
tensor, one at a time, and keeps its slice. That costs time and no memory.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.overrides import TorchFunctionMode

from minllama.architecture.model import MinimalLlama

DRAWS = {f for name, f in vars(nn.init).items() if name.endswith("_") and callable(f)}
DRAWS |= {Tensor.normal_, Tensor.uniform_, Tensor.exponential_}


def materialize(
    model: MinimalLlama, device: torch.device | str | None = None
) -> MinimalLlama:
    """Give a sharded model on the meta device its bytes, drawn as `init_weights` says.

    Args:
        model: sharded or not, its parameters on the meta device.
        device: where they go. None: the device of the mesh, or the CPU.

    Raises:
        ValueError: `init_weights` of a subclass leaves a parameter or buffer as it is,
            which here means without a value.
    """
    if device is None:
        device = _home(model)
    model.to_empty(device=device)
    model.tie_weights()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for tensor in tensors.values():
            _local(tensor).fill_(torch.nan if tensor.is_floating_point() else 0)
        with _WholeDraws():
            model.init_weights()
    unset = [name for name, t in tensors.items() if _local(t).isnan().any()]
    if unset:
        raise ValueError(
            f"{type(model).__name__}.init_weights does not set {', '.join(unset)}; on "
            "the meta device what __init__ drew is lost, so set them there, too."
        )
    return model


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _home(model: nn.Module) -> torch.device:
    for p in model.parameters():
        if isinstance(p, DTensor):
            if p.device_mesh.device_type == "cuda":
                return torch.device("cuda", torch.cuda.current_device())
            break
    return torch.device("cpu")


class _WholeDraws(TorchFunctionMode):
    """Draw the whole tensor on the CPU, as one process would; keep the slice."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func not in DRAWS:
            return func(*args, **kwargs)
        target = kwargs.pop("tensor") if "tensor" in kwargs else args[0]
        rest = args[1:] if args and args[0] is target else args
        whole = torch.empty(target.shape, dtype=target.dtype)
        func(whole, *rest, **kwargs)
        if isinstance(target, DTensor):
            mesh, cut = target.device_mesh, target.placements
            whole = distribute_tensor(
                whole.to(target.device), mesh, cut, src_data_rank=None
            )
        return target.copy_(whole)
