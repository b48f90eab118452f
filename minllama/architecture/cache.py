"""What was computed for the past and will be needed again: the key/value cache.

A new token needs the keys and values of all tokens before it, and these never change,
because no token sees its future. So they are kept, and a step costs one token instead
of all. Two objects: a `KVCache` holds one layer's tensors; `Caches` holds all layers'
and counts the tokens.

    Caches        rows advance together, the count is a Python number
    StaticCaches  a count per row, in a tensor: rows may differ in length, shapes and
                  addresses never change, so a compiled or captured step fits for ever
"""

import torch
from torch import Tensor

from minllama.architecture.layout import Layout


class KVCache:
    """Keys and values of one layer, (B, max_seq_len, K, d), allocated once.

    It is written in place, which autograd refuses on a CPU and does not promise
    elsewhere. To train through a cache, use `GrowingKVCache`.
    """

    def __init__(self, batch_size: int, max_seq_len: int) -> None:
        self.batch_size, self.max_seq_len = batch_size, max_seq_len
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def update(
        self, k: Tensor, v: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor, Layout]:
        """Keep the new (B, T, K, d); give all (B, S, K, d), and who sees which.

        The layout is returned because layers may hold different caches (a window
        beside full ones), and each knows what it still holds.

        Raises:
            ValueError: another batch size than the cache was made for.
        """
        if self.k is None or self.v is None:  # the first tokens tell heads and dtype
            _check_batch(k, self.batch_size)
            with torch.inference_mode(False):  # so that any later call may write
                self.k = k.new_zeros(self.batch_size, self.max_seq_len, *k.shape[2:])
                self.v = v.new_zeros(self.batch_size, self.max_seq_len, *v.shape[2:])
        if layout.last is None:  # every row stands at the same place
            end = layout.start + k.size(1)
            _check_room(end, self.max_seq_len)
            self.k[:, layout.start : end] = k
            self.v[:, layout.start : end] = v
            return self.k[:, :end], self.v[:, :end], layout
        row = torch.arange(k.size(0), device=k.device)[:, None]  # (B, 1)
        self.k[row, layout.last] = k
        self.v[row, layout.last] = v
        return self.k, self.v, layout


class GrowingKVCache:
    """Keys and values that grow by concatenation: slower, but gradients flow through.

    The base of caches that forget: such a subclass holds fewer keys than there were
    tokens, so it refuses a layout that addresses keys by their number.
    """

    def __init__(self, batch_size: int, max_seq_len: int) -> None:
        self.batch_size = batch_size
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def update(
        self, k: Tensor, v: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor, Layout]:
        """As `KVCache.update`.

        Raises:
            ValueError: the layout addresses fixed slots (StaticCaches, pages).
        """
        _check_batch(k, self.batch_size)
        if layout.last is not None:
            raise ValueError(
                f"layout.last is given, but {type(self).__name__} has no fixed slots; "
                "use it with kind=Caches, or a KVCache with StaticCaches."
            )
        if self.k is not None and self.v is not None:
            k, v = torch.cat([self.k, k], dim=1), torch.cat([self.v, v], dim=1)
        self.k, self.v = k, v
        return k, v, layout


class Caches:
    """One state per layer, and how many tokens were seen. Rows advance together."""

    def __init__(
        self, layers: list, batch_size: int, max_seq_len: int, device: torch.device
    ) -> None:
        self.layers, self.batch_size = layers, batch_size
        self.max_seq_len, self.device = max_seq_len, device
        self.length = 0

    def reserve(self, T: int) -> Layout:
        """Places for T more tokens in every row.

        Raises:
            ValueError: they do not fit. Without this check a single token past the end
                would vanish in silence: a slice beyond a tensor is empty.
        """
        start, end = self.length, self.length + T
        _check_room(end, self.max_seq_len)
        self.length = end
        positions = torch.arange(start, end, device=self.device)
        return Layout(positions=positions[None], start=start)


class StaticCaches(Caches):
    """Counts per row, in a tensor: rows may differ, compiled code never changes."""

    def __init__(
        self, layers: list, batch_size: int, max_seq_len: int, device: torch.device
    ) -> None:
        super().__init__(layers, batch_size, max_seq_len, device)
        with torch.inference_mode(False):  # so that any later call may count on
            self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)

    def reserve(self, T: int) -> Layout:
        """Places for T more tokens behind each row's own end.

        Raises:
            ValueError: they do not fit. Known only where reading a count is free: on
                a CPU, uncompiled. Elsewhere the write itself fails (an index error, a
                device assert); no token is ever dropped.
        """
        if self.lengths.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_room(int(self.lengths.max()) + T, self.max_seq_len)
        new = torch.arange(T, device=self.lengths.device)
        positions = self.lengths[:, None] + new  # (B, T)
        self.lengths += T
        return Layout(positions=positions, last=positions)


def _check_room(end: int, max_seq_len: int) -> None:
    if end > max_seq_len:
        raise ValueError(
            f"{end} tokens do not fit a cache of max_seq_len={max_seq_len}; make the "
            "caches larger, or start new ones."
        )


def _check_batch(k: Tensor, batch_size: int) -> None:
    if k.size(0) != batch_size:
        raise ValueError(
            f"{k.size(0)} rows do not fit a cache of batch_size={batch_size}; make "
            "new_caches with the batch size of the tokens."
        )
