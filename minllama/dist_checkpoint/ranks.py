"""The processes that save or load together: if one fails, all do.

Checkpoints have a process group of their own, over gloo: it speaks for tensors of any
device, and a save that goes on in the background never mixes its messages with those
of the training step.
"""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")
_groups: list = []  # (the default group, ours beside it): made once, for all saves


class Ranks:
    """A process among its peers. Without a process group: alone.

    Where a group runs, making the first one is collective: call it in every process.
    """

    def __init__(self) -> None:
        self.rank, self.world, self.group = 0, 1, None
        if dist.is_available() and dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
            self.group = _group()

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Call `work` in every process; its results by rank, in every process.

        Raises:
            ValueError: `work` raised one in some process; so does every process.
            RuntimeError: it raised another error.
        """
        if self.world == 1:
            return [work()]
        mine: tuple = (None, None)
        try:
            mine = (work(), None)
        except Exception as error:
            kind = ValueError if isinstance(error, ValueError) else RuntimeError
            mine = (None, (kind, str(error)))
            if kind is not type(error):
                mine = (None, (kind, f"{type(error).__name__}: {error}"))
        found: list = [None] * self.world
        dist.all_gather_object(found, mine, group=self.group)
        for rank, (_, error) in enumerate(found):
            if error is not None:
                raise error[0](f"rank {rank}: {error[1]}")
        return [result for result, _ in found]

    def together(self, work: Callable[[], T]) -> T:
        """Call `work` in every process; its own result, which need not be sent.

        Raises:
            ValueError: as `gather`.
            RuntimeError: as `gather`.
        """
        mine = []
        self.gather(lambda: mine.append(work()))
        return mine[0]

    def first(self, work: Callable[[], T]) -> T:
        """Call `work` in rank 0 alone; its result in every process.

        Raises:
            ValueError: as `gather`.
            RuntimeError: as `gather`.
        """
        return self.gather(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]


def _group() -> dist.ProcessGroup:
    default = dist.group.WORLD
    if not _groups or _groups[0] is not default:
        _groups[:] = [default, dist.new_group(backend="gloo")]
    return _groups[1]
