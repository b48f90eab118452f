"""Adapters on disk, in the PEFT library's format: a few megabytes beside a model.

    adapter_config.json          which method, which layers, which scale
    adapter_model.safetensors    its tensors, under the names of that library

What either wrote the other reads. Which layers are adapted, and with which ranks, is
read from the tensors themselves: a pattern in the config may mean more layers here.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minllama.architecture.model import MinimalLlama
from minllama.architecture.weights_files import read_json
from minllama.architecture.weights_save import fresh_folder
from minllama.peft.adapter import set_adapter, specs
from minllama.peft.attach import all_or_nothing, check_free
from minllama.peft.base import float_weight
from minllama.peft.file_config import write_config
from minllama.peft.file_load import add_from_file
from minllama.peft.file_tensors import (
    PREFIX,
    adapter_tensors,
    chains,
    fill,
    our_module,
)
from minllama.peft.prefix import PrefixCore
from minllama.peft.prompt import PromptEmbedding
from minllama.peft.rows import check_not_mixed
from minllama.peft.targets import outer_modules
from minllama.peft.tokens import TokenRows
from minllama.peft.vera import VeRALinear

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BASE_WEIGHT = ".base_layer.weight"
WRAPPERS = (".modules_to_save.", ".original_module.")  # of the PEFT library


def save_adapter(
    model: MinimalLlama,
    folder: str | Path,
    name: str | None = None,
    base_model: str | None = None,
) -> None:
    """Write one adapter; the model's own weights stay where they are.

    Of a sharded model every process calls this: all gather, the first one writes.

    Args:
        model: with adapters.
        folder: is made; an adapter in it is replaced when the new one is whole.
        name: of the adapter; None: the only one.
        base_model: name or path of the model, noted in the config.

    Raises:
        ValueError: no adapter, several and no name, or one that no file can hold: a
            mix, or rows and another change of one table.
    """
    there = specs(model)
    check_not_mixed(there.values())
    if name is None and len(there) != 1:
        raise ValueError(
            f"the model has {len(there)} adapters ({', '.join(there) or 'none'}); "
            "say which one is saved with name=."
        )
    name = name or next(iter(there))
    if name not in there:
        raise ValueError(f"adapter {name!r} is none of {', '.join(there)}.")
    found = adapter_tensors(model, name)
    if meta := [key for key, tensor in found.items() if tensor.is_meta]:
        raise ValueError(f"{meta[0]} is a meta tensor and holds nothing to save.")
    tensors = {key: _whole(tensor) for key, tensor in found.items()}
    config = write_config(model, there[name], base_model)
    if _is_first():
        with fresh_folder(folder, (TENSORS,), last=CONFIG) as fresh:
            save_file(tensors, fresh / TENSORS, metadata={"format": "pt"})
            (fresh / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def load_adapter(
    model: MinimalLlama,
    folder: str | Path,
    name: str = "default",
    dtype: torch.dtype | None = None,
) -> MinimalLlama:
    """Add the adapter of a folder to a model, and switch it on alone.

    Args:
        model: changed in place and returned.
        folder: written by `save_adapter` or by the PEFT library.
        name: that it shall have here.
        dtype: of its weights; None: as `add_lora` chooses it.

    Raises:
        ValueError: files that are missing, damaged or of a kind unknown here; an
            adapter of another model; or a name that is taken.
    """
    folder = Path(folder)
    for file in (CONFIG, TENSORS):
        if not (folder / file).is_file():
            raise ValueError(f"{folder} has no {file}; give the folder of an adapter.")
    config, tensors = read_json(folder / CONFIG), _read_tensors(folder / TENSORS)
    check_tables(model, tensors)
    check_free(model, name)
    with all_or_nothing(model, name):
        add_from_file(model, config, tensors, name, dtype)
        _fill_all(model, name, tensors)
    set_adapter(model, name)
    return model


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, each one once.

    Under bias="all" the PEFT library writes the biases of modules_to_save again, under
    the names of its own wrapper.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no whole file: {error}") from None
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"{key} is of {tensor.dtype}; an adapter is read in floating point: "
                "save it without quantizing it."
            )
    return {k: t for k, t in tensors.items() if not _is_said_twice(k, tensors)}


def _is_said_twice(key: str, tensors: dict[str, Tensor]) -> bool:
    return any(
        wrapper in key and key.replace(wrapper, ".") in tensors for wrapper in WRAPPERS
    )


@torch.no_grad()
def check_tables(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Compare the tables that a file brings along with the model's own.

    The PEFT library saves embedding and head beside their adapters. They are no part of
    the adapter; but where they differ, it was trained on another model.

    Raises:
        ValueError: they differ in shape, or by more than their rounding.
    """
    modules = outer_modules(model)
    for key, theirs in tensors.items():
        if not key.endswith(BASE_WEIGHT):
            continue
        at = our_module(key.removeprefix(PREFIX).removesuffix(BASE_WEIGHT))
        mine = float_weight(modules[at]) if at in modules else None
        if mine is None or mine.is_meta:
            continue
        mine = _whole(mine)
        rounding = max(torch.finfo(t.dtype).eps for t in (mine, theirs))
        alike = mine.shape == theirs.shape and torch.allclose(
            mine.float(), theirs.float(), rtol=rounding, atol=0.0
        )
        if not alike:
            raise ValueError(
                f"{key} of shape {tuple(theirs.shape)} is not this model's {at} of "
                f"shape {tuple(mine.shape)}: the adapter was trained on another table. "
                "Load that model, or copy the file's table into this one first."
            )


@torch.no_grad()
def _fill_all(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    found = list(chains(model, name))
    if "prompt_embeddings" in tensors:
        return _fill_prompt(found, tensors["prompt_embeddings"])
    used: set[str] = set()
    for at, adapter in found:
        if at == "lm_head" and _follows_embedding(adapter, at, tensors):
            continue
        kin = [other for place, other in found if place == at]
        used |= fill(adapter, at, kin, tensors)
        if isinstance(adapter, VeRALinear) and "base_model.vera_A" in tensors:
            adapter.shared_a.copy_(tensors["base_model.vera_A"])
            adapter.shared_b.copy_(tensors["base_model.vera_B"])
    unread = sorted(tensors.keys() - used - {"base_model.vera_A", "base_model.vera_B"})
    unread = [key for key in unread if ".base_layer." not in key]
    if unread:
        raise ValueError(
            f"{len(unread)} tensors of the file belong nowhere in this model: "
            f"{', '.join(unread[:5])}."
        )


def _follows_embedding(adapter, at: str, tensors: dict[str, Tensor]) -> bool:
    """Whether it is the head's side of rows that the embedding's side has filled."""
    keys = [k for k in tensors if "trainable_tokens_delta" in k and at in k]
    return isinstance(adapter, TokenRows) and not keys


def _fill_prompt(found: list, flat: Tensor) -> None:
    cores = [one for _, one in found if isinstance(one, PrefixCore)]
    if cores:
        parts = flat.chunk(len(cores), dim=-1)
        pairs = [(core.prefix, part) for core, part in zip(cores, parts)]
    else:
        pairs = [(p.rows, flat) for _, p in found if isinstance(p, PromptEmbedding)]
    for mine, theirs in pairs:
        if mine.shape != theirs.shape:
            raise ValueError(
                f"prompt_embeddings of shape {tuple(flat.shape)} are of another model."
            )
        mine.copy_(theirs)


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on the CPU; shards of it are gathered, on every process."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()  # type: ignore[operator]
    return tensor.detach().to("cpu", copy=True).contiguous()


def _is_first() -> bool:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not ready or torch.distributed.get_rank() == 0
