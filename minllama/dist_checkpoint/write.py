"""The second half of a save, in the foreground or in a thread: write and commit."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minllama.architecture.config import LlamaConfig
from minllama.architecture.weights_config import (
    ARCHITECTURES,
    config_json,
    generation_json,
)
from minllama.dist_checkpoint import folders
from minllama.dist_checkpoint.manifest import write_manifest
from minllama.dist_checkpoint.ranks import Ranks
from minllama.dist_checkpoint.shard_file import DTYPES, Planned, write_shard

RESERVE = 1.02  # of the disk: headers, manifest, the file system's own


@dataclass
class Job:
    """What this rank writes, and what rank 0 says about it all."""

    folder: Path
    ranks: Ranks
    pieces: list[tuple[str, tuple[int, ...], list[int], Tensor]]
    numbers: dict  # of the manifest: step, world, optimizer, …
    config: LlamaConfig | None
    model_type: str | None
    dtype: torch.dtype
    keep: int | None


def write_and_commit(job: Job) -> Path:
    """Write all files, then put the checkpoint in force. The same in every rank.

    Raises:
        RuntimeError: the disk is full or fails; what was written is removed.
    """
    ranks = job.ranks
    needed = sum(ranks.gather(lambda: sum(t.nbytes for *_, t in job.pieces)))
    work, final = ranks.first(lambda: _begin(job, needed))
    try:
        folders.reached("before writing")
        written = ranks.gather(lambda: _write_files(work, job))
        ranks.first(lambda: _finish(work, final, job, written))
    except Exception:
        if ranks.rank == 0:
            shutil.rmtree(work, ignore_errors=True)
        raise
    return final


def _begin(job: Job, needed: int) -> tuple[Path, Path]:
    work, final = folders.begin(job.folder, job.numbers["step"])
    free = shutil.disk_usage(work).free
    if needed * RESERVE > free:
        work.rmdir()
        raise RuntimeError(
            f"{job.folder}: the checkpoint needs {needed / 1e9:.2f} GB and the disk "
            f"has {free / 1e9:.2f} GB free. Nothing was written, and what was saved "
            "before has not changed; make room, or save elsewhere."
        )
    return work, final


def _write_files(work: Path, job: Job) -> tuple[dict, list]:
    """A file for each part; (files, pieces) as the manifest has them."""
    work.mkdir(exist_ok=True)  # a shared file system may not show rank 0's yet
    files, pieces = {}, []
    for part in dict.fromkeys(name.split(".")[0] for name, *_ in job.pieces):
        file = f"{part}-{job.ranks.rank:05}-of-{job.ranks.world:05}.safetensors"
        mine = [piece for piece in job.pieces if piece[0].startswith(f"{part}.")]
        plan = [
            Planned(name.partition(".")[2], t.dtype, tuple(t.shape), lambda t=t: t)
            for name, _, _, t in mine
        ]
        written = write_shard(work / file, plan)
        files[file] = {"bytes": written.bytes, "sha256": written.sha256}
        for (name, shape, offset, _), planned in zip(mine, plan):
            place = {"file": file, "key": planned.key, "offset": offset}
            place |= {"shape": list(planned.shape), **written.tensors[planned.key]}
            pieces.append((name, DTYPES[planned.dtype], list(shape), place))
        folders.reached("between files")
    folders.sync_folder(work)
    return files, pieces


def _finish(work: Path, final: Path, job: Job, written: list) -> None:
    files: dict = {}
    tensors: dict = {}
    for some_files, pieces in written:
        files |= some_files
        for name, dtype, shape, place in pieces:
            entry = {"dtype": dtype, "shape": shape, "pieces": []}
            tensors.setdefault(name, entry)["pieces"].append(place)
    files |= write_config(work, job.config, job.model_type, job.dtype)
    content = {"torch": torch.__version__, **job.numbers}
    write_manifest(work, {**content, "files": files, "tensors": tensors})
    folders.commit(work, final)
    folders.remove_older(final, job.keep)


def write_config(
    folder: Path, config: LlamaConfig | None, kind: str | None, dtype: torch.dtype
) -> dict:
    """config.json and generation_config.json, if the model has what goes in there."""
    kind = kind if config is None else config.model_type or kind
    if config is None or kind not in ARCHITECTURES:
        return {}
    contents = {
        "config.json": config_json(config, kind, dtype),
        "generation_config.json": generation_json(config),
    }
    return {name: write_json(folder / name, c) for name, c in contents.items()}


def write_json(path: Path, content: dict) -> dict:
    """Write it, ask the disk to keep it; its size and hash."""
    data = json.dumps(content, indent=2).encode() + b"\n"
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
