"""Weights on disk, opened without trust: a checkpoint is a stranger's file.

Two containers hold nearly all weights in the world. safetensors is eight bytes (the
length of a header), a JSON header (name -> dtype, shape, byte range), and the bytes:
nothing in it runs. A `.pth` or `.bin` of PyTorch is a pickle, a small program that may
do anything when it is opened; `weights_only=True` lets it build tensors and no more.

Both are mapped into memory rather than read: bytes come from the disk when touched.
Pages once touched count as ours until the file is closed, so files are closed again and
again, and the peak is one copy of the model and one tensor (of pickles: some GB).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minllama.architecture.config import LlamaConfig

MAX_JSON_BYTES = 16_000_000  # a config.json has 1 kB, the index of a 405B model 200 kB
MAPPED_BYTES = 2_000_000_000  # of a pickle, before it is closed and opened again
DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class StoredTensor(NamedTuple):
    """Where one tensor lies, and what it will be when read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    key: str  # its name in that file


@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """The weights of a model on disk, under this library's names; none is read yet.

    Args:
        path: the folder or file that they come from.
        config: what the model is.
        tensors: name -> where it lies.
        copy_into: `copy_into(name, out)` fills `out`, of any dtype and device.
        stated_dtype: what the config says; it decides only where tensors disagree.
        cut: `cut(name, part)` reads a part alone, where the format lets it.
    """

    path: Path
    config: LlamaConfig
    tensors: dict[str, StoredTensor]
    copy_into: Callable[[str, Tensor], object]
    stated_dtype: torch.dtype | None = None
    cut: Callable[[str, tuple[slice, ...]], Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that all tensors share, else the stated one, else the widest."""
        dtypes = {tensor.dtype for tensor in self.tensors.values()}
        if len(dtypes) > 1 and self.stated_dtype is not None:
            return self.stated_dtype
        widest = torch.float16 if torch.float16 in dtypes else torch.bfloat16
        for dtype in dtypes:
            widest = torch.promote_types(widest, dtype)
        return widest

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored, on the CPU."""
        stored = self.tensors[name]
        out = torch.empty(stored.shape, dtype=stored.dtype)
        self.copy_into(name, out)
        return out

    def read_part(self, name: str, part: tuple[slice, ...]) -> Tensor:
        """A part of one tensor as it is stored, on the CPU: copy it, do not keep it.

        Args:
            name: of the tensor.
            part: one slice a dimension, each with a start and a stop.
        """
        if self.cut is not None:
            return self.cut(name, part)
        return self.read(name)[part]


def check_dtype(dtype: torch.dtype | None) -> None:
    """Refuse a dtype that no weight can have.

    Raises:
        ValueError: `dtype` is no floating-point type of 16 bits or more.
    """
    if dtype is not None and dtype not in DTYPES.values():
        known = ", ".join(str(known) for known in DTYPES.values())
        raise ValueError(
            f"dtype={dtype!r} is none of {known}; fewer bits come with quantize(model)."
        )


def read_json(path: Path) -> dict:
    """A JSON object from a file of modest size.

    Raises:
        ValueError: the file is huge, no JSON, or no object.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(
            f"{path} has {size:,} bytes; more than {MAX_JSON_BYTES:,} is no "
            "configuration, so it is not read. Download it again."
        )
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}). {_remedy(path)}") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{path} holds a JSON {kind}; it must be an object, {{…}}.")
    return content


def list_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, from its header alone.

    Raises:
        ValueError: the file is cut off or damaged, or a tensor is not of DTYPES.
    """
    try:
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            found = {
                k: (tuple(s.get_shape()), s.get_dtype()) for k, s in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}). {_remedy(path)}"
        ) from None
    for key, (_, dtype) in found.items():
        if dtype not in DTYPES:
            raise _wrong_dtype(path, key, dtype)
    return {k: StoredTensor(s, DTYPES[d], path, k) for k, (s, d) in found.items()}


def list_pickle(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a `.pth` or `.bin` written by torch.save.

    Raises:
        ValueError: the file is cut off or damaged, would run code, or holds other than
            tensors of DTYPES.
    """
    found, size, claimed = {}, path.stat().st_size, 0
    for key, value in open_pickle(path).items():
        plain = isinstance(key, str) and type(value) is Tensor
        if not plain or value.layout is not torch.strided:
            raise ValueError(
                f"{path} holds a {type(value).__name__} at {key!r}; a state dict holds "
                "tensors by name. Save model.state_dict() alone."
            )
        if value.dtype not in DTYPES.values():
            raise _wrong_dtype(path, key, value.dtype)
        claimed += value.nbytes
        if claimed > 2 * size:  # a tied head may count twice, a bomb counts often
            raise ValueError(
                f"{path} has {size:,} bytes, and its tensors up to {key} {value.shape} "
                "claim more than twice as many; it is damaged or hostile."
            )
        found[key] = StoredTensor(tuple(value.shape), value.dtype, path, key)
    return found


def open_pickle(path: Path) -> dict:
    """The state dict of a `.pth` or `.bin`, mapped; nothing of it runs.

    Raises:
        ValueError: as `list_pickle`.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a broken or hostile file brings up
        said = str(error).splitlines()
        reason = next(
            (s for s in said if "Unsupported" in s), said[0] if said else error
        )
        raise ValueError(
            f"{path} is no whole PyTorch file of tensors only ({reason}). A pickle "
            f"that asks for more could run code: it is not opened. {_remedy(path)}"
        ) from None
    if not isinstance(state, dict):
        kind = type(state).__name__
        raise ValueError(f"{path} holds a {kind}; save model.state_dict() alone.")
    return state


class TensorReader:
    """Reads tensors of files that were listed before, and lets go of their pages.

    safetensors opens in a millisecond, so it is opened for each tensor. A pickle of 700
    tensors takes a tenth of a second, so it stays open for MAPPED_BYTES.
    """

    def __init__(self) -> None:
        self._pickles: dict[Path, dict] = {}
        self._mapped = 0  # bytes touched since the pickles were opened

    def read(self, stored: StoredTensor) -> Tensor:
        """One tensor: a window on its file, so copy it and do not keep it."""
        if stored.file.suffix == ".safetensors":
            with safe_open(stored.file, "pt") as file:
                return file.get_tensor(stored.key)
        if self._mapped > MAPPED_BYTES:
            self._pickles, self._mapped = {}, 0
        if stored.file not in self._pickles:
            self._pickles[stored.file] = open_pickle(stored.file)
        tensor = self._pickles[stored.file][stored.key]
        self._mapped += tensor.nbytes
        return tensor

    def read_part(self, stored: StoredTensor, part: tuple[slice, ...]) -> Tensor:
        """A part of one tensor; of safetensors no other bytes are copied."""
        if stored.file.suffix == ".safetensors":
            with safe_open(stored.file, "pt") as file:
                return file.get_slice(stored.key)[part]
        return self.read(stored)[part]


def _wrong_dtype(path: Path, key: str, dtype) -> ValueError:
    known = ", ".join(DTYPES)
    return ValueError(
        f"{path} holds {key} as {dtype}; weights are {known}. Quantized weights are "
        "read by the chapter quantize."
    )


def _remedy(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        return "It is a Git LFS pointer and not the file: run `git lfs pull`."
    return "Download it again."
