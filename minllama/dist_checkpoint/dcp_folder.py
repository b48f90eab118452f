"""Folders of torch.distributed.checkpoint (DCP), as torchtitan writes them.

    .metadata          a pickle: for each tensor its pieces, for each piece its place
    __0_0.distcp, …    by rank: tensors, each written by torch.save, one after the other

A pickle is a program that runs when it is opened, and PyTorch opens this one without a
guard. Here it may build the ten classes that such an index consists of, and nothing
else. The tensors are opened with `weights_only=True`.

torchtitan's Llama has Meta's names, and pairs neighbouring channels in its rope: its
rows of wq and wk are reordered as those of Meta's own files (hub: weights_meta.py).
"""

import io
import re
from collections.abc import Iterable
from pathlib import Path
from pickle import Unpickler, UnpicklingError

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

from minllama.architecture.weights_meta import LAYER, PARTS, TURNED
from minllama.dist_checkpoint.contents import clean_name
from minllama.dist_checkpoint.pieces import Box, Piece, Tensors

INDEX = ".metadata"
ALLOWED = {
    (c.__module__, c.__name__): c
    for c in (
        metadata.Metadata,
        metadata.TensorStorageMetadata,
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.TensorProperties,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
    )
} | {("torch", "Size"): torch.Size}
NO_WEIGHTS = ("optim", "lr_scheduler", "train_state", "dataloader", "rng")  # or longer
COMPUTED = ("freqs_cis", "rope.freqs", "inv_freq")  # tables that some models keep
ROOT = re.compile(r"^((?:.+?\.)??)layers\.\d+\.")  # what the names of a model lie under


class _IndexReader(Unpickler):
    """Builds what an index consists of, and refuses all else."""

    def find_class(self, module_name: str, global_name: str):
        if (module_name, global_name) in ALLOWED:
            return ALLOWED[module_name, global_name]
        value = getattr(torch, global_name, None) if module_name == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        if (module_name, global_name) == ("torch.serialization", "_get_layout"):
            return {"torch.strided": torch.strided}.__getitem__
        if module_name in ("pathlib", "pathlib._local") and "Path" in global_name:
            return lambda *parts: "/".join(parts)  # where it was written: not used
        raise UnpicklingError(f"it asks for {module_name}.{global_name}")


def open_dcp(folder: Path) -> Tensors:
    """The tensors of a DCP folder under their own names, none read yet.

    Raises:
        ValueError: the index is damaged, would run code, or names what is not there.
    """
    path = folder / INDEX
    try:
        with path.open("rb") as file:
            index = _IndexReader(file).load()
        stored, places = index.state_dict_metadata, index.storage_data
        found = Tensors(folder, _read_blob)
        for name, entry in stored.items():
            if not isinstance(entry, metadata.TensorStorageMetadata):
                continue  # a number or an object, pickled: not read
            pieces = [_piece(folder, name, chunk, places) for chunk in entry.chunks]
            found.add(name, tuple(entry.size), entry.properties.dtype, pieces)
    except ValueError:
        raise
    except Exception as error:  # whatever a broken or hostile file brings up
        raise ValueError(
            f"{path} is no index of torch.distributed.checkpoint "
            f"({type(error).__name__}: {error}). A pickle that asks for more could run "
            "code: it is not opened."
        ) from None
    return found


def _piece(folder: Path, name: str, chunk, places: dict) -> Piece:
    place = places[metadata.MetadataIndex(name, chunk.offsets)]
    file = folder / place.relative_path
    if file.name != place.relative_path:
        raise ValueError(
            f"{folder / INDEX}: {name} lies in {place.relative_path!r}; it must lie "
            "beside the index."
        )
    if getattr(place, "transform_descriptors", None):
        raise ValueError(
            f"{file}: {name} is stored by {place.transform_descriptors}; only plain "
            "bytes are read. Save without extensions."
        )
    if not file.is_file() or file.stat().st_size < place.offset + place.length:
        raise ValueError(f"{file} is missing or cut off; {name} lies in it.")
    key = f"{place.offset}+{place.length} {name}"
    return Piece(file, key, tuple(chunk.offsets), tuple(chunk.sizes))


def _read_blob(piece: Piece, box: Box) -> Tensor:
    place, _, name = piece.key.partition(" ")
    start, length = map(int, place.split("+"))
    with piece.file.open("rb") as file:
        file.seek(start)
        blob = io.BytesIO(file.read(length))
    try:
        tensor = torch.load(blob, map_location="cpu", weights_only=True)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != piece.shape:
            raise ValueError(f"holds {type(tensor).__name__}, no {piece.shape}")
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{piece.file}: {name} cannot be read ({reason}).") from None
    return tensor[box]


def our_names(tensors: Tensors) -> tuple[dict[str, str], set[str]]:
    """Our name -> name in the folder, of the weights; and our names to be turned.

    The model may lie deeper: app.model.layers.0, beside app.optim.state.layers.0.

    Raises:
        ValueError: two models, or two tensors of one name.
    """
    names: dict[str, str] = {}
    turned: set[str] = set()
    weights = {
        theirs: clean_name(theirs)
        for theirs in tensors.stored
        if not any(part.startswith(NO_WEIGHTS) for part in theirs.split("."))
        and not theirs.endswith(COMPUTED)
    }
    root = _root(tensors.path, weights.values())
    around = root.removesuffix("model.")  # where Hugging Face's classes have the head
    for theirs, name in weights.items():
        name = name.removeprefix(root if name.startswith(root) else around)
        layer = LAYER.match(name)
        prefix, part = layer.groups() if layer else ("", name)
        if part in PARTS and PARTS[part][0] != part:
            name = prefix + PARTS[part][0]
            turned |= {name} if part in TURNED else set()
        if name in names:
            raise ValueError(
                f"{tensors.path}: {names[name]} and {theirs} are both {name}; save the "
                "state of one model."
            )
        names[name] = theirs
    return names, turned


def _root(path: Path, names: Iterable[str]) -> str:
    """What precedes `layers.0.` in the names of a folder; the same for all."""
    roots = {match[1] for match in map(ROOT.match, names) if match}
    if len(roots) > 1:
        listed = ", ".join(sorted(root.rstrip(".") or "no prefix" for root in roots))
        raise ValueError(
            f"{path} holds layers under {listed}, and nobody says which is the model; "
            'save one of them alone: dcp.save({"model": …}).'
        )
    return roots.pop() if roots else ""
