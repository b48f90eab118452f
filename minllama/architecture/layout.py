"""Who sits where, and who sees whom: the one thing that attention is told.

T new tokens look at S keys. In every use of this book but one (a bias), what a token
may see is an interval of those keys, `first..last`: causal text, packed documents,
caches of any kind, pages, windows, rows of different length. So a layout is O(T)
numbers; the (T, S) mask is made only where a plain attention wants one.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minllama.architecture.rope import Rotation


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the T new tokens sit, and which keys each of them may see.

    `last` is the index of a token's own key. With `first` and `last` both None the
    tokens are the newest T of S keys and see everything up to themselves: a triangle,
    which fast kernels know by name.
    """

    positions: Tensor  # (B or 1, T), for the angles of rope
    first: Tensor | None = None  # (B or 1, T)
    last: Tensor | None = None  # (B or 1, T)
    start: int = 0  # of a triangle: keys that came before these tokens
    rotation: Rotation | None = None  # filled in by the model, once per forward

    def __post_init__(self) -> None:
        # Layers share a layout, so a mask is made once. No field: a layout that is made
        # of this one (`replace`) sees other keys, and FSDP copies fields to cast them.
        object.__setattr__(self, "_masks", [])

    @property
    def is_triangle(self) -> bool:
        """True if no interval was given. A Python fact, never a tensor's value."""
        return self.first is None and self.last is None

    def interval(self, S: int) -> tuple[Tensor, Tensor]:
        """First and last of S keys that each token sees, (B or 1, T) each."""
        last = self.last
        if last is None:
            T = self.positions.size(-1)
            last = torch.arange(S - T, S, device=self.positions.device)[None]
        first = torch.zeros_like(last) if self.first is None else self.first
        return first, last

    def mask(self, S: int) -> Tensor:
        """(B or 1, 1, T, S), True where a token sees a key."""
        masks: list[Tensor] = self._masks  # type: ignore[attr-defined]
        for made in masks:  # no dict: its key would make a compiled S a constant
            if made.size(-1) == S:
                return made
        first, last = self.interval(S)
        key = torch.arange(S, device=last.device)
        seen = (key >= first[..., None]) & (key <= last[..., None])  # (B, T, S)
        masks.append(seen[:, None])
        return masks[-1]

    def within(self, window: int, S: int) -> "Layout":
        """The same tokens, each seeing only its newest `window` keys."""
        if self.is_triangle and window >= S:
            return self
        first, last = self.interval(S)
        first = torch.maximum(first, last - window + 1)
        return replace(self, first=first, last=last)


def packed(positions: Tensor) -> Layout:
    """Documents one after the other; positions (B or 1, T) restart at each border.

    A token at position p of its document sees the p tokens before it and itself, and
    nothing of its neighbours: no gradient crosses a border.

    Example:
        >>> layout = packed(torch.tensor([[0, 1, 2, 0, 1]]))
        >>> layout.first.tolist(), layout.last.tolist()
        ([[0, 0, 0, 3, 3]], [[0, 1, 2, 3, 4]])
    """
    last = torch.arange(positions.size(-1), device=positions.device)
    return Layout(
        positions=positions, first=last - positions, last=last.expand_as(positions)
    )
