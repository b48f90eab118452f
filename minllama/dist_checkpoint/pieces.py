"""Tensors that lie in pieces, read in other pieces: all there is to resharding.

    written by 2 ranks, rows      | 0 0 0 0 | 1 1 1 1 |
    read by 4 ranks               | a a | b b | c c | d d |      each one piece
    read by 3 ranks               | a a a | b b b | c c |        b from two pieces

A piece is a box: where it begins along each dimension, and how long it is. What a rank
wants is a box, too, whatever mesh and placement made it. It takes from each piece the
intersection of the two boxes, and no other bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Box = tuple[slice, ...]  # one slice a dimension, each with a start and a stop


class Piece(NamedTuple):
    """A box of a tensor, and where its numbers lie."""

    file: Path
    key: str  # its name in that file
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class Stored(NamedTuple):
    """A tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[Piece]


@dataclass
class Tensors:
    """Tensors on disk by name, whatever the format.

    Args:
        path: the folder.
        read_piece: (piece, box within the piece) -> those numbers, on the CPU.
    """

    path: Path
    read_piece: Callable[[Piece, Box], Tensor]
    stored: dict[str, Stored] = field(default_factory=dict)

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        pieces: list[Piece],
    ) -> None:
        """Tell of a tensor.

        Raises:
            ValueError: its pieces do not fill it.
        """
        size = torch.Size(shape).numel()
        filled = sum(torch.Size(piece.shape).numel() for piece in pieces)
        if filled != size:
            raise ValueError(
                f"{self.path}: the pieces of {name} {shape} hold {filled:,} of its "
                f"{size:,} numbers; the checkpoint is incomplete."
            )
        self.stored[name] = Stored(shape, dtype, pieces)

    def under(self, prefix: str) -> dict[str, Stored]:
        """The tensors whose names begin so, by the rest of their names."""
        return {
            name.removeprefix(prefix): stored
            for name, stored in self.stored.items()
            if name.startswith(prefix)
        }

    def read(self, name: str, box: Box) -> Tensor:
        """A box of a tensor, on the CPU, put together from the pieces it lies in."""
        stored = self.stored[name]
        shape = tuple(part.stop - part.start for part in box)
        out = None
        for piece in stored.pieces:
            common = intersect(box, piece)
            if common is None:
                continue
            found = self.read_piece(piece, within(common, piece.offset))
            if found.shape == shape:
                return found  # the whole box lies in this piece
            if out is None:
                out = torch.empty(shape, dtype=stored.dtype)
            start = tuple(part.start for part in box)
            out[within(common, start)] = found
        return torch.empty(shape, dtype=stored.dtype) if out is None else out


def intersect(box: Box, piece: Piece) -> Box | None:
    """What a box and a piece have in common; None if nothing.

    Example:
        >>> intersect((slice(2, 6),), Piece(Path("f"), "k", offset=(4,), shape=(4,)))
        (slice(4, 6, None),)
    """
    common = []
    for part, start, length in zip(box, piece.offset, piece.shape):
        begin, end = max(part.start, start), min(part.stop, start + length)
        if begin >= end:
            return None
        common.append(slice(begin, end))
    return tuple(common)


def within(box: Box, origin: tuple[int, ...]) -> Box:
    """The box as seen from `origin`."""
    return tuple(slice(b.start - o, b.stop - o) for b, o in zip(box, origin))


def local_box(name: str, tensor: Tensor) -> Box:
    """The box of the whole tensor that this process holds.

    Raises:
        ValueError: a placement that is no box: partial sums.
    """
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"{name} is {tensor.placements}, sums that were not added up; redistribute "
            "it to Shard or Replicate first."
        )
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    if tuple(shape) != tuple(tensor.to_local().shape):
        raise ValueError(
            f"{name} {tuple(tensor.shape)} as {tensor.placements}: this process holds "
            f"{tuple(tensor.to_local().shape)}, where {tuple(shape)} belongs; this "
            "version of torch cuts it unevenly in a way that is no box."
        )
    return tuple(slice(o, o + size) for o, size in zip(offset, shape))


def local_tensor(tensor: Tensor) -> Tensor:
    """The numbers that this process holds, sharing their memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fill(tensors: dict[str, Tensor], read: Callable[[str, Box], Tensor]) -> None:
    """Copy into each tensor the box that this process holds of it.

    Host memory: the largest box. dtype and device are those of the tensors.
    """
    for name, tensor in tensors.items():
        out = local_tensor(tensor)
        if out.numel():
            out.copy_(read(name, local_box(name, tensor)))


def read_piece(piece: Piece, box: Box) -> Tensor:
    """A box of a piece in a safetensors file; no other numbers are copied.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(piece.file, "pt") as file:
            if not box:  # 0-d: nothing to slice
                return file.get_tensor(piece.key).clone()
            return file.get_slice(piece.key)[box]
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{piece.file}: {piece.key} cannot be read ({error})."
        ) from None
