"""The save that goes on in the background: at most one, in a thread.

Hashing, writing and fsync let go of Python's lock, so training is not held up by them.
"""

import threading
import traceback
from pathlib import Path

import torch

from minllama.dist_checkpoint import folders
from minllama.dist_checkpoint.write import Job, write_and_commit


class PendingSave:
    """A save that goes on in the background.

    Args:
        job: with staged pieces.
        stall: seconds that training stood still.
    """

    def __init__(self, job: Job, stall: float) -> None:
        self.stall = stall
        self._path: Path | None = None
        self._error: BaseException | None = None
        self._unseen: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(job,), name="saving")
        self._thread.start()

    def _work(self, job: Job) -> None:
        try:
            self._path = write_and_commit(job)
        except BaseException as error:
            self._error = self._unseen = error
            if not threading.main_thread().is_alive():  # nobody will ask any more
                traceback.print_exc()

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def result(self) -> Path:
        """Wait until the checkpoint is in force; its folder.

        Raises:
            ValueError: as `save_checkpoint`.
            RuntimeError: as `save_checkpoint`.
        """
        self.settle()
        if self._path is None:
            assert self._error is not None
            raise self._error
        return self._path

    def settle(self) -> None:
        """Wait until it has ended; raise its error if nobody has seen it yet."""
        self._thread.join()
        error, self._unseen = self._unseen, None
        if error is not None:
            raise error


_pending: list[PendingSave] = []  # the one save that may be under way


def start(job: Job, stall: float) -> PendingSave:
    """Begin to write staged pieces."""
    _pending[:] = [PendingSave(job, stall)]
    return _pending[0]


def settle_pending() -> None:
    """Wait for the save under way, if any; raise its error if nobody has seen it."""
    while _pending:
        _pending.pop().settle()


def stage(job: Job) -> None:
    """Copy the pieces to host memory; from a GPU into pinned memory, all at once."""
    on_gpu = False
    for index, (name, shape, offset, tensor) in enumerate(job.pieces):
        folders.reached("while staging")
        on_gpu |= tensor.is_cuda
        copy = torch.empty(
            tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
        ).copy_(tensor, non_blocking=True)
        job.pieces[index] = (name, shape, offset, copy)
    if on_gpu:
        torch.cuda.synchronize()
