"""From a checkpoint to a folder for everybody, and back; one process, no group.

    consolidate("run/step-00001000", "my-llama")    Hugging Face's format, for all
    split("my-llama", "my-llama-8", world=8)        8 ranks read, each its own file

One tensor is in memory at a time, whatever the size of the model.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from minllama.architecture.config import LlamaConfig
from minllama.architecture.families import class_for
from minllama.architecture.model import MinimalLlama
from minllama.architecture.weights import (
    build_checked,
    describe_problems,
    key_problems,
)
from minllama.architecture.weights_files import StoredWeights, check_dtype
from minllama.architecture.weights_save import SHARD_BYTES, fresh_folder, weight_shapes
from minllama.dist_checkpoint import folders
from minllama.dist_checkpoint.manifest import (
    check_files,
    read_manifest,
    write_manifest,
)
from minllama.dist_checkpoint.shard_file import DTYPES, Planned, write_shard
from minllama.dist_checkpoint.weights import open_any
from minllama.dist_checkpoint.write import write_config, write_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def consolidate(
    source: str | Path,
    out: str | Path,
    dtype: torch.dtype | None = None,
    *,
    cls: type[MinimalLlama] = MinimalLlama,
    config: LlamaConfig | None = None,
    verify: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the weights of a checkpoint as a Hugging Face folder.

    Args:
        source: a checkpoint, a folder of them (the newest), or a folder of
            torch.distributed.checkpoint; or whatever `load_weights` reads.
        out: is made; weights in it are replaced once all are written.
        dtype: of the new weights. None: as they are.
        cls: the class of the model, if it is one of your own.
        config: of a source that has none.
        verify: compare the files with their hashes before.
        shard_bytes: most bytes of weights in one file.

    Returns:
        `out`. Tokenizer files are copied there if they lie in the checkpoint or in
        the folder around it.

    Raises:
        ValueError: the source is damaged or partial, or no plain model of its class:
            merge adapters first.
        RuntimeError: the disk is full; `out` is as it was.
    """
    check_dtype(dtype)
    stored, family = _open_whole(source, cls, config, verify)
    dtype = dtype or stored.dtype
    names = [n for n in weight_shapes(build_checked(family, stored))]
    plans = {name: _planned(stored, name, dtype) for name in names}
    stale = ("*.safetensors", "*.safetensors.index.json")
    with fresh_folder(out, stale) as fresh:
        files = list(_cut(list(plans.values()), shard_bytes))
        places = {}
        for number, some in enumerate(files, start=1):
            file = f"model-{number:05}-of-{len(files):05}.safetensors"
            file = file if len(files) > 1 else "model.safetensors"
            write_shard(fresh / file, some)
            places |= {planned.key: file for planned in some}
        if len(files) > 1:
            size = {"total_size": sum(planned.nbytes for planned in plans.values())}
            index = {"metadata": size, "weight_map": places}
            write_json(fresh / "model.safetensors.index.json", index)
        kind = stored.config.model_type or family.model_type
        write_config(fresh, stored.config, kind, dtype)
        for place in (stored.path.parent, stored.path):
            for name in TOKENIZER_FILES:
                if (place / name).is_file():
                    shutil.copyfile(place / name, fresh / name)
    return Path(out)


def split(
    source: str | Path,
    out: str | Path,
    world: int,
    *,
    step: int = 0,
    cls: type[MinimalLlama] = MinimalLlama,
    config: LlamaConfig | None = None,
) -> Path:
    """Write weights as a checkpoint whose parts are those of `world` ranks under FSDP.

    Each rank then reads one file, once, from its beginning to its end.

    Args:
        source: whatever `load_weights` reads.
        out: a folder of checkpoints; is made.
        world: ranks that will read. Others can, too, as with any checkpoint.
        step: names the checkpoint.
        cls: the class of the model, if it is one of your own.
        config: of a source that has none.

    Returns:
        The folder of the checkpoint.

    Raises:
        ValueError: `world` is no positive number, or the source does not load.
        RuntimeError: the disk is full; nothing is in force.
    """
    if world < 1:
        raise ValueError(f"world={world} must be at least 1.")
    stored, family = _open_whole(source, cls, config, verify=True)
    names = list(weight_shapes(build_checked(family, stored)))
    work, final = folders.begin(Path(out), step)
    files, tensors = {}, {}
    try:
        for rank in range(world):
            file = f"model-{rank:05}-of-{world:05}.safetensors"
            cuts = {n: _rows(stored.tensors[n].shape, rank, world) for n in names}
            plan = [
                _planned_rows(stored, name, cut) for name, cut in cuts.items() if cut
            ]
            written = write_shard(work / file, plan)
            files[file] = {"bytes": written.bytes, "sha256": written.sha256}
            for planned in plan:
                whole = stored.tensors[planned.key]
                start = cuts[planned.key].start  # type: ignore[union-attr]
                offset = [start, *[0] * (len(whole.shape) - 1)]
                place = {"file": file, "key": planned.key, "offset": offset}
                place |= {"shape": list(planned.shape), **written.tensors[planned.key]}
                entry = {"dtype": DTYPES[whole.dtype], "shape": list(whole.shape)}
                name = f"model.{planned.key}"
                tensors.setdefault(name, {**entry, "pieces": []})["pieces"].append(
                    place
                )
        kind = stored.config.model_type or family.model_type
        files |= write_config(work, stored.config, kind, stored.dtype)
        said = {"step": step, "tokens": 0, "world": world, "extra": {}}
        said["torch"] = torch.__version__
        write_manifest(work, {**said, "files": files, "tensors": tensors})
        folders.commit(work, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def _open_whole(
    source: str | Path,
    cls: type[MinimalLlama],
    config: LlamaConfig | None,
    verify: bool,
) -> tuple[StoredWeights, type[MinimalLlama]]:
    stored = open_any(source, config)
    family = class_for(cls, stored.config.model_type)
    problems = key_problems(build_checked(family, stored), stored)
    if problems:
        raise ValueError(describe_problems(family, stored, problems))
    if verify and (stored.path / folders.MANIFEST).is_file():
        manifest = read_manifest(stored.path)
        files = [name for name in manifest["files"] if name.startswith("model-")]
        check_files(stored.path, manifest, files)
    return stored, family


def _planned(stored: StoredWeights, name: str, dtype: torch.dtype) -> Planned:
    key = name if name.startswith("lm_head.") else f"model.{name}"
    shape = stored.tensors[name].shape

    def read() -> Tensor:
        return stored.read_part(name, tuple(slice(0, n) for n in shape)).to(dtype)

    return Planned(key, dtype, shape, read)


def _planned_rows(stored: StoredWeights, name: str, rows: slice) -> Planned:
    whole = stored.tensors[name]
    shape = (rows.stop - rows.start, *whole.shape[1:])
    part = (rows, *(slice(0, n) for n in whole.shape[1:]))
    return Planned(name, whole.dtype, shape, lambda: stored.read_part(name, part))


def _rows(shape: tuple[int, ...], rank: int, world: int) -> slice | None:
    """The rows that FSDP gives to a rank: equal runs, the last ones shorter or none."""
    length = -(-shape[0] // world)
    start, stop = min(rank * length, shape[0]), min((rank + 1) * length, shape[0])
    return slice(start, stop) if start < stop else None


def _cut(plans: list[Planned], shard_bytes: int) -> Iterator[list[Planned]]:
    some: list[Planned] = []
    for planned in plans:
        if some and sum(p.nbytes for p in some) + planned.nbytes > shard_bytes:
            yield some
            some = []
        some.append(planned)
    yield some
