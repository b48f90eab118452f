"""One safetensors file, written as a stream: no second copy in memory.

    8 bytes       length of the header
    JSON          {"name": {"dtype": "BF16", "shape": […], "data_offsets": […]}, …}
    the bytes of one tensor after the other

While a block of 16 MB goes to the file a second thread hashes it (hashlib lets go of
Python's lock), so that the SHA-256 of the file costs no second reading. Each tensor has
a CRC-32 besides: where the hash says that a file is damaged, it says which tensor is.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minllama.dist_checkpoint import folders

BLOCK_BYTES = 1 << 24
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
NAMES = {name: dtype for dtype, name in DTYPES.items()}


class Planned(NamedTuple):
    """A tensor that will be written: known before its bytes are."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]  # of that dtype and shape, from any device

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Written(NamedTuple):
    """What a file holds, as the manifest lists it."""

    bytes: int
    sha256: str
    tensors: dict[str, dict]  # the place of each tensor's bytes, and their CRC-32


def write_shard(path: Path, tensors: Iterable[Planned]) -> Written:
    """Write the tensors in their order, and ask the disk to keep them.

    Host memory: one tensor that is not on the CPU yet.

    Raises:
        ValueError: a dtype that safetensors does not know.
        RuntimeError: the disk is full or fails, with the file and the tensor.
    """
    tensors = list(tensors)
    header, digest = _header(path, tensors), hashlib.sha256()
    places, start, key = {}, len(header), "the header"
    with ThreadPoolExecutor(1) as hasher:
        try:
            with path.open("wb") as file:
                file.write(header)
                digest.update(header)
                for tensor in tensors:
                    key, check = tensor.key, 0
                    for block in _blocks(tensor.read()):
                        hashed = _beside(hasher, digest, block, check)
                        file.write(block)
                        check = hashed()
                        folders.reached("within a file")
                    end = start + tensor.nbytes
                    places[key] = {"bytes": [start, end], "crc32": check}
                    start = end
                key = "the last bytes"
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RuntimeError(
                f"{path}: {key} could not be written ({error.strerror}). What was "
                "saved before has not changed; make room, or save elsewhere."
            ) from error
    return Written(start, digest.hexdigest(), places)


def _header(path: Path, tensors: list[Planned]) -> bytes:
    entries: dict = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{path.name}: {tensor.key} has dtype={tensor.dtype}, none of "
                f"safetensors': {', '.join(map(str, DTYPES))}."
            )
        entries[tensor.key] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _blocks(tensor: Tensor) -> Iterable[memoryview]:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    data = memoryview(flat.numpy())  # type: ignore[arg-type]
    for start in range(0, len(data), BLOCK_BYTES):
        yield data[start : start + BLOCK_BYTES]


def _beside(hasher: ThreadPoolExecutor, *work) -> Callable[[], int]:
    """Hash while the caller writes; or at once, if the program has ended meanwhile.

    A save in the background outlives the main thread, after which no executor takes
    work any more.
    """
    try:
        return hasher.submit(_hash, *work).result
    except RuntimeError:
        check = _hash(*work)
        return lambda: check


def _hash(digest, block: memoryview, check: int) -> int:
    digest.update(block)
    return zlib.crc32(block, check)
