"""Weights of any folder, straight into the shards of a model.

Built on the meta device and sharded there, a model has placements and no bytes. Then
each process gets memory for its part, and reads the boxes of the files that fill it:

    peak of a process  =  its part of the model  +  the largest box it reads

No process ever has the model, nor a tensor of it, and nothing is sent between them.
(A pickle, `.pth` or `.bin`, is mapped; of Meta's folders one tensor is in memory.)
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from minllama.architecture.config import LlamaConfig
from minllama.architecture.model import MinimalLlama
from minllama.architecture.weights import (
    check_complete,
    describe_problems,
    key_problems,
    open_weights,
    shipped_names,
)
from minllama.architecture.weights_config import read_config
from minllama.architecture.weights_files import StoredTensor, StoredWeights
from minllama.architecture.weights_meta import to_halves
from minllama.dist_checkpoint.contents import has_both_ends, model_tensors, unwrap
from minllama.dist_checkpoint.dcp_folder import INDEX, open_dcp, our_names
from minllama.dist_checkpoint.fit import check_config
from minllama.dist_checkpoint.folders import MANIFEST, step_folders
from minllama.dist_checkpoint.load import allocate, find_checkpoint, verify_files
from minllama.dist_checkpoint.manifest import read_manifest, tensors_of
from minllama.dist_checkpoint.pieces import Box, Tensors, fill
from minllama.dist_checkpoint.ranks import Ranks


def load_weights(
    model: nn.Module,
    folder: str | Path,
    *,
    device: torch.device | str | None = None,
    new: Iterable[str] = (),
    verify: bool = True,
) -> nn.Module:
    """Fill a model, sharded or not, from files; each process reads only its part.

    Args:
        model: on the meta device (it gets memory) or not; its dtype is kept.
        folder: a shipped name, a folder of Hugging Face or Meta, a checkpoint of
            `save_checkpoint`, or a folder of torch.distributed.checkpoint.
        device: for a model on the meta device. None: that of its mesh, else the CPU.
        new: parameters that the files need not hold, as names or patterns; on the meta
            device they get the values of `init_weights`.
        verify: of `save_checkpoint`'s folders, compare the files with their hashes.

    Returns:
        The model.

    Raises:
        ValueError: no such folder, a broken file, keys that do not fit (all of them
            are listed), a config that computes something else, or a stage of a
            pipeline.
    """
    ranks, new = Ranks(), tuple(new)
    bare = unwrap(model)
    assert isinstance(bare, MinimalLlama)
    stored = ranks.together(lambda: _open_checked(folder, bare, new))
    manifest = stored.path / MANIFEST
    if verify and manifest.is_file():
        verify_files(stored.path, read_manifest(stored.path), {"model"}, ranks)

    def put() -> None:
        unfilled = [n for n in model_tensors(model) if n not in stored.tensors]
        allocate(model, device, drawn=unfilled)
        bare.tie_weights()
        tensors = model_tensors(model)
        in_file_order = {n: tensors[n] for n in stored.tensors if n in tensors}
        with torch.no_grad():
            fill(in_file_order, stored.read_part)
        check_complete(bare)

    ranks.together(put)
    return model


def _open_checked(
    folder: str | Path, model: MinimalLlama, new: tuple[str, ...]
) -> StoredWeights:
    if not has_both_ends(model):
        raise ValueError(
            f"the model is a stage of a pipeline, and {folder} is a whole one; load it "
            f"before pipeline(model), or call split({str(folder)!r}, out, world) once, "
            "and load_checkpoint(out, model)."
        )
    stored = open_any(folder, model.config)
    problems = key_problems(model, stored, new)
    if problems:
        raise ValueError(describe_problems(type(model), stored, problems))
    check_config(stored.path, stored.config, model)
    return stored


def open_any(folder: str | Path, config: LlamaConfig | None = None) -> StoredWeights:
    """The weights of any folder that is read here, looked at but not read.

    Args:
        folder: as `load_weights`.
        config: of a folder that has none: torchtitan's.

    Raises:
        ValueError: nothing that is known, or no config.
    """
    path = Path(folder)
    if isinstance(folder, str) and folder in shipped_names():
        return open_weights(folder)
    if (path / MANIFEST).is_file() or step_folders(path):
        return open_checkpoint(find_checkpoint(path), config)
    if (path / INDEX).is_file():
        tensors = open_dcp(path)
        names, turned = our_names(tensors)
        return _as_weights(tensors, names, _config(path, config), turned)
    return open_weights(folder)


def open_checkpoint(
    path: Path, config: LlamaConfig | None = None
) -> StoredWeights:  # fmt: skip
    """The model inside of a checkpoint of `save_checkpoint`.

    Raises:
        ValueError: it is not whole, or has no config.
    """
    tensors = tensors_of(path, read_manifest(path))
    names = {name: f"model.{name}" for name in tensors.under("model.")}
    return _as_weights(tensors, names, _config(path, config), set())


def _config(path: Path, config: LlamaConfig | None) -> LlamaConfig:
    if (path / "config.json").is_file():
        return read_config(path)
    if config is None:
        raise ValueError(
            f"{path} has no config.json, which says what the model is; hand over its "
            "config, e.g. LlamaConfig.from_name(…)."
        )
    return config


def _as_weights(
    tensors: Tensors, names: dict[str, str], config: LlamaConfig, turned: set[str]
) -> StoredWeights:
    """A folder of pieces as the hub's weights."""

    def cut(name: str, box: Box) -> torch.Tensor:
        if name not in turned:
            return tensors.read(names[name], box)
        shape = tensors.stored[names[name]].shape
        whole = tensors.read(names[name], tuple(slice(0, size) for size in shape))
        return to_halves(whole, config.head_dim)[box]

    def copy_into(name: str, out: torch.Tensor) -> None:
        out.copy_(cut(name, tuple(slice(0, size) for size in out.shape)))

    listed = {}
    for name, theirs in names.items():
        shape, dtype, pieces = tensors.stored[theirs]
        listed[name] = StoredTensor(shape, dtype, pieces[0].file, theirs)
    return StoredWeights(
        path=tensors.path, config=config, tensors=listed, copy_into=copy_into, cut=cut
    )
