"""What a checkpoint holds, by name: tensors that may be in pieces, and plain numbers.

model.<parameter>                    as in model.state_dict(); tied: the embedding
optimizer.<parameter>.<state>        exp_avg, momentum, …
rng.<rank>.cpu, rng.<rank>.cuda      the random numbers of each process
"""

import hashlib
import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"  # one tensor, if tied
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # compiled, checkpointed


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel or torch.compile."""
    if isinstance(model, DistributedDataParallel):
        return unwrap(model.module)
    return getattr(model, "_orig_mod", model)


def model_tensors(
    model: nn.Module, parts: str | Iterable[str] | None = None
) -> dict[str, Tensor]:
    """Parameters and buffers by name, one of two tied names.

    Args:
        model: of any kind, sharded or not.
        parts: None: all. "trainable": what requires_grad. Else patterns of names, as
            `("layers.0.*", "norm.*")`.

    Raises:
        ValueError: nothing is left, a state that is no tensor, or a model whose slices
            are plain tensors, which look like the whole.
    """
    if hasattr(getattr(unwrap(model), "gradient_exchange", None), "units"):
        raise ValueError(
            "the model was cut by shard_by_hand, whose slices do not say what they are "
            "slices of; use shard(model, mesh) for what is to be saved."
        )
    tensors, seen = {}, set()
    for name, tensor in unwrap(model).state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name} is a {type(tensor).__name__}; only tensors are kept: register "
                "it as a buffer, or hand it over as extra."
            )
        if id(tensor) not in seen:
            tensors[clean_name(name)] = tensor
        seen.add(id(tensor))
    tied = getattr(getattr(unwrap(model), "config", None), "tie_embeddings", False)
    if tied and HEAD in tensors and not has_both_ends(unwrap(model)):
        tensors[EMBEDDING] = tensors.pop(HEAD)  # the last stage of a pipeline
    if parts == "trainable":
        chosen = {n: t for n, t in tensors.items() if t.requires_grad}
    elif parts is not None:
        patterns = [parts] if isinstance(parts, str) else list(parts)
        chosen = {
            n: t for n, t in tensors.items() if any(fnmatchcase(n, p) for p in patterns)
        }
    else:
        chosen = tensors
    if not chosen:
        raise ValueError(
            f"parts={parts!r} chooses nothing; there are {', '.join(tensors)[:200]}."
        )
    return chosen


def has_both_ends(model: nn.Module) -> bool:
    """Whether embedding and head are here; a stage of a pipeline may lack one."""
    ends = (getattr(model, name.split(".")[0], None) for name in (EMBEDDING, HEAD))
    return not any(isinstance(end, nn.Identity) for end in ends)


def clean_name(name: str) -> str:
    """Without what torch.compile and checkpointing put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def check_json(what: str, content: Any) -> Any:
    """`content` as it will be read back.

    Raises:
        ValueError: JSON cannot hold it.
    """
    try:
        return json.loads(json.dumps(content))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{what} cannot be kept as JSON ({error}); hand over numbers, strings, "
            "lists and dicts of them."
        ) from None


def rng_tensors(rank: int, device: torch.device) -> dict[str, Tensor]:
    """The states of this process's random numbers, as bytes."""
    states = {f"{rank:05}.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states[f"{rank:05}.cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_rng(states: dict[str, Tensor], rank: int, device: torch.device) -> None:
    """Go on with saved random numbers."""
    if f"{rank:05}.cpu" in states:
        torch.set_rng_state(states[f"{rank:05}.cpu"])
    if f"{rank:05}.cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states[f"{rank:05}.cuda"], device)


def reseed(state: Tensor, rank: int) -> None:
    """Seed this process from another's saved state and its own rank."""
    digest = hashlib.sha256(state.numpy().tobytes() + rank.to_bytes(8, "little"))
    torch.manual_seed(int.from_bytes(digest.digest()[:7], "little"))
