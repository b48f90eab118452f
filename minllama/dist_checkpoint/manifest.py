"""`manifest.json`: what a checkpoint holds, where, and how to know that it is whole.

Written last, in the folder that is renamed next: without it there is no checkpoint. It
holds all that is no tensor (step, rates, place in the batches), for each file its size
and SHA-256, for each tensor its pieces, and a SHA-256 of itself.

    "tensors": {"model.norm.weight": {"dtype": "F32", "shape": [32], "pieces": [
        {"file": "model-00000-of-00002.safetensors", "offset": [0], "shape": [16], …},
        {"file": "model-00001-of-00002.safetensors", "offset": [16], "shape": [16], …}
    ]}}
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from minllama.dist_checkpoint.folders import MANIFEST, step_folders
from minllama.dist_checkpoint.pieces import Piece, Tensors, read_piece
from minllama.dist_checkpoint.shard_file import NAMES

FORMAT = "minllama checkpoint"
VERSION = 1
THREADS = 4  # that hash files, in each process


def write_manifest(folder: Path, content: dict) -> None:
    """Write `manifest.json`, and ask the disk to keep it."""
    content = {"format": FORMAT, "version": VERSION, **content}
    content = json.loads(json.dumps(content))  # as it will be read: names are strings
    with (folder / MANIFEST).open("w") as file:
        json.dump({**content, "sha256": _digest(content)}, file)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict:
    """The content of `manifest.json`, its own hash checked, not that of the files.

    Raises:
        ValueError: there is none, or it is damaged, of a later version, or names files
            outside of its folder.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        found = content.pop("sha256")
        known = content["format"] == FORMAT
        version, files = content["version"], content["files"]
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no {MANIFEST}, so it is no complete checkpoint."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}); {_other(folder)}"
        ) from None
    if not known or version != VERSION:
        raise ValueError(
            f"{path} is {content['format']!r}, version={version}; this library reads "
            f"{FORMAT!r}, version {VERSION}."
        )
    if found != _digest(content):
        raise ValueError(f"{path} is damaged (its SHA-256 differs); {_other(folder)}")
    for name in files:
        if Path(name).name != name:
            raise ValueError(f"{path} names the file {name!r}; it must lie beside it.")
    return content


def is_complete(folder: Path) -> bool:
    """Whether the manifest is whole and every file is there, of the right size."""
    try:
        return not _sizes(folder, read_manifest(folder)["files"])
    except ValueError:
        return False


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint in a folder of them; None if there is none.

    Example:
        >>> latest_checkpoint("no-such-run") is None
        True
    """
    newest_first = reversed(step_folders(Path(folder)))
    return next((path for path in newest_first if is_complete(path)), None)


def tensors_of(folder: Path, manifest: dict) -> Tensors:
    """The tensors of a checkpoint, none read yet."""
    found = Tensors(folder, read_piece)
    for name, entry in manifest["tensors"].items():
        pieces = [
            Piece(folder / p["file"], p["key"], tuple(p["offset"]), tuple(p["shape"]))
            for p in entry["pieces"]
        ]
        found.add(name, tuple(entry["shape"]), NAMES[entry["dtype"]], pieces)
    return found


def check_files(folder: Path, manifest: dict, names: Iterable[str]) -> None:
    """Compare sizes and hashes of the named files with the manifest.

    Raises:
        ValueError: a file is missing, cut off or damaged, with the tensors concerned.
    """
    files = {name: manifest["files"][name] for name in names}
    problems = _sizes(folder, files)
    if not problems:
        with ThreadPoolExecutor(THREADS) as pool:
            sums = pool.map(lambda name: _file_digest(folder / name), files)
            wrong = [n for n, found in zip(files, sums) if found != files[n]["sha256"]]
        problems = {name: "damaged (its SHA-256 differs)" for name in wrong}
    for name, problem in problems.items():
        keys = _damaged_keys(folder / name, manifest) or ["no tensor"]
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise ValueError(
            f"{folder / name} is {problem}; it concerns {', '.join(keys[:3])}{more}. "
            f"{_other(folder)}"
        )


def _sizes(folder: Path, files: dict) -> dict[str, str]:
    problems = {}
    for name, entry in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            problems[name] = "missing"
            continue
        if size != entry["bytes"]:
            problems[name] = f"cut off: {size:,} bytes, where {entry['bytes']:,} were"
    return problems


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged_keys(path: Path, manifest: dict) -> list[str]:
    """The tensors of a file whose bytes cannot be read, or differ."""
    keys = []
    for key, entry in manifest["tensors"].items():
        for piece in (p for p in entry["pieces"] if p["file"] == path.name):
            if _check_sum(path, piece) != piece["crc32"]:
                keys.append(key)
    return keys


def _check_sum(path: Path, piece: dict) -> int | None:
    start, end = piece["bytes"]
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
    except OSError:
        return None
    return zlib.crc32(data) if len(data) == end - start else None


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _other(folder: Path) -> str:
    """The remedy: the complete checkpoint that comes before, by name."""
    older = [p for p in step_folders(folder.parent) if p != folder and is_complete(p)]
    if not older:
        return "No other checkpoint lies beside it; take a copy from elsewhere."
    return f"Go on from {older[-1]}, or take a copy from elsewhere."
