"""Rewrite a model in another format or type, and check one that was downloaded.

    minllama convert SRC DST --dtype bfloat16 --format meta --shards 2
    minllama convert runs/mine DST               the newest checkpoint of a run
    minllama convert SRC DST --format checkpoint --shards 8    for 8 ranks to read
    minllama verify FOLDER

Both end by reading every number of the folder in question: a file that was cut off, a
key too many, a NaN are found here and not after an hour of training.
"""

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from minllama.architecture.families import class_for
from minllama.architecture.model import MinimalLlama
from minllama.architecture.weights import (
    build_checked,
    key_problems,
    open_weights,
    save_pretrained,
)
from minllama.architecture.weights_files import DTYPES, StoredWeights, check_dtype
from minllama.architecture.weights_meta import save_meta
from minllama.dist_checkpoint import consolidate, latest_checkpoint, split
from minllama.dist_checkpoint.manifest import check_files, read_manifest

FORMATS = ("hf", "meta", "checkpoint")
MODEL_FILES = ("config.json", "params.json", "*.safetensors", "consolidated.*.pth")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
CHECKSUMS = {"checklist.chk": "md5", "SHA256SUMS": "sha256"}
LISTED = 10


def convert(
    source: str | Path,
    target: str | Path,
    dtype: str | torch.dtype | None = None,
    format: str = "hf",
    shards: int = 1,
) -> int:
    """Read a model, write it to another folder, verify that. Returns 0 if all is well.

    The tokenizer's files go along. Host memory: one copy of the model in its new type;
    one tensor where either side is a checkpoint.

    Args:
        source: whatever from_pretrained reads; or a training checkpoint, a folder of
            them, or of torch.distributed.checkpoint.
        target: a new or empty folder.
        dtype: of the new weights, as "bfloat16". None: as they are.
        format: "hf" (safetensors, read by transformers), "meta", or "checkpoint".
        shards: files of Meta's format, one for each of its GPUs, or of a checkpoint,
            one for each rank; "hf" cuts by itself, at 5 GB.

    Raises:
        ValueError: an argument is wrong, the target is taken or too small, or the
            source does not load.
    """
    dtype = _as_dtype(dtype)
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is none of {', '.join(FORMATS)}.")
    if format == "hf" and shards != 1:
        raise ValueError(
            f"shards={shards} is for format='meta'; a Hugging Face folder is cut at "
            "5 GB by itself."
        )
    found = find_training(source)
    if format == "checkpoint":
        if dtype is not None:
            raise ValueError(
                f"dtype={dtype} with format='checkpoint'; convert to hf first."
            )
        print(f"writing {split(found or source, target, shards)}")
        return verify(target)
    if found is not None:
        return _convert_training(found, Path(target), dtype, format, shards)
    stored = open_weights(source)
    _check_target(Path(target), stored, dtype)
    print(f"reading {_summary(stored)}")
    model = MinimalLlama.from_pretrained(source, dtype=dtype or stored.dtype)
    print(f"writing {target} ({format})")
    if format == "meta":
        save_meta(model, target, shards)
    else:
        save_pretrained(model, target)
    if stored.path.is_dir():
        for name in TOKENIZER_FILES:
            if (stored.path / name).is_file():
                shutil.copyfile(stored.path / name, Path(target) / name)
    return verify(target)


def find_training(source: str | Path) -> Path | None:
    """The checkpoint that a folder is, or holds; None if it is none."""
    for folder in (Path(source), Path(source) / "checkpoints"):
        if (folder / "manifest.json").is_file() or (folder / ".metadata").is_file():
            return folder
        newest = latest_checkpoint(folder)
        if newest is not None:
            return newest
    return None


def _convert_training(
    source: Path, target: Path, dtype: torch.dtype | None, format: str, shards: int
) -> int:
    _check_free(target)
    print(f"reading {source}")
    if format == "hf":
        consolidate(source, target, dtype)
        for name in TOKENIZER_FILES:  # of the run, two folders up
            file = source.parent.parent / name
            if file.is_file() and not (target / name).exists():
                shutil.copyfile(file, target / name)
        return verify(target)
    with tempfile.TemporaryDirectory(dir=target.absolute().parent) as folder:
        consolidate(source, folder)
        return convert(folder, target, dtype, format, shards)


def verify(folder: str | Path) -> int:
    """Compare files, names, shapes, values and checksums; print a line on each.

    Returns:
        The exit status: 0 if the model would load and all of its numbers are finite.
    """
    found = find_training(folder)
    if found is not None and (found / "manifest.json").is_file():
        return _verify_training(found)
    try:
        stored = open_weights(folder)
        family = class_for(MinimalLlama, stored.config.model_type)
        problems = key_problems(build_checked(family, stored), stored)
    except ValueError as error:
        print(f"broken     {error}")
        return 1
    print(f"model      {family.__name__}: {_summary(stored)}")
    print(f"rope       theta {stored.config.rope_theta:g}, {_scaling(stored)}")
    lines = [f"{kind} {line}" for kind, found in problems.items() for line in found]
    _print_check("keys", lines, f"{len(stored.tensors)}, each in its place")
    bad = [] if lines else _bad_values(stored)
    _print_check("values", bad, "not read" if lines else "no NaN, no infinity")
    wrong, matched = _check_sums(stored.path)
    _print_check("checksums", wrong, f"{matched} match" if matched else "none to check")
    return 1 if lines or bad or wrong else 0


def _verify_training(folder: Path) -> int:
    """Every file of a checkpoint against the hash in its manifest."""
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest, manifest["files"])
    except ValueError as error:
        print(f"broken     {error}")
        return 1
    step, world = manifest["step"], manifest["world"]
    print(f"checkpoint {folder}: step {step}, saved by {world}")
    _print_check("checksums", [], f"{len(manifest['files'])} match")
    return 0


def _as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        names = {str(known).removeprefix("torch."): known for known in DTYPES.values()}
        if dtype not in names:
            raise ValueError(f"dtype={dtype!r} is none of {', '.join(names)}.")
        return names[dtype]
    check_dtype(dtype)
    return dtype


def _check_free(target: Path) -> None:
    taken = [path.name for pattern in MODEL_FILES for path in target.glob(pattern)]
    if taken or target.is_file():
        raise ValueError(
            f"{target} holds {', '.join(sorted(taken)) or 'a file'} already; nothing "
            "is overwritten. Name a new folder."
        )


def _check_target(target: Path, stored: StoredWeights, dtype) -> None:
    _check_free(target)
    numbers = _count(stored)
    need = numbers * (dtype or stored.dtype).itemsize
    place = next(path for path in (target, *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if need > free:
        raise ValueError(
            f"{target} needs {need / 1e9:.1f} GB and {place} has {free / 1e9:.1f} GB "
            "free; make room, or name a folder on another disk."
        )


def _count(stored: StoredWeights) -> int:
    return sum(torch.Size(tensor.shape).numel() for tensor in stored.tensors.values())


def _summary(stored: StoredWeights) -> str:
    dtypes = sorted({str(t.dtype) for t in stored.tensors.values()})
    types = " and ".join(dtypes).replace("torch.", "")
    return f"{stored.path}, {_count(stored):,} numbers in {types}"


def _scaling(stored: StoredWeights) -> str:
    scaling = stored.config.rope_scaling
    return f"scaled by {scaling['factor']:g} (llama3)" if scaling else "not scaled"


def _bad_values(stored: StoredWeights) -> list[str]:
    lines = []
    for name in _progress(list(stored.tensors), "values"):
        tensor = stored.read(name)
        nans = int(tensor.isnan().sum())
        infs = int(tensor.isinf().sum())
        if nans or infs:
            lines.append(f"{name}: {nans} NaN and {infs} infinite of {tensor.numel()}")
    return lines


def _check_sums(folder: Path) -> tuple[list[str], int]:
    """What does not match the lists of checksums in the folder, and how many do."""
    wrong, matched = [], 0
    for list_name, algorithm in CHECKSUMS.items():
        if not (folder / list_name).is_file():
            continue
        for line in (folder / list_name).read_text(errors="replace").splitlines():
            expected, _, name = line.strip().partition(" ")
            name = name.strip().removeprefix("*").removeprefix("./")
            if not name:
                continue
            problem = _check_sum(folder, name, expected.lower(), algorithm)
            wrong += [f"{name}: {problem} ({list_name})"] if problem else []
            matched += not problem
    return wrong, matched


def _check_sum(folder: Path, name: str, expected: str, algorithm: str) -> str:
    if Path(name).name != name:
        return "lies outside of the folder, so it is not read"
    if not (folder / name).is_file():
        return "is missing"
    with (folder / name).open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    return (
        "" if found == expected else f"{algorithm} {found}, where {expected} is listed"
    )


def _print_check(label: str, problems: list[str], fine: str) -> None:
    if not problems:
        print(f"{label:10} {fine}")
        return
    print(f"{label:10} {len(problems)} wrong:")
    for line in problems[:LISTED]:
        print(f"           {line}")
    if len(problems) > LISTED:
        print(f"           … and {len(problems) - LISTED} more")


def _progress(items: list, label: str) -> Iterator:
    """The items, with a counter on a terminal and none in a file."""
    shown = sys.stderr.isatty()
    for number, item in enumerate(items, start=1):
        if shown:
            end = "\r" if number < len(items) else "\r\033[K"
            print(f"{label:10} {number} of {len(items)}", end=end, file=sys.stderr)
        yield item
