"""When a run hangs, who holds it up; and when it is told to end, all end together.

Processes that train together wait for each other: if one hangs, all hang, and each
looks as if it were the one. `Watch` is a hook of the training loop. A thread beside it
notes in the store of the process group how far this process is and where it stands, and
after some seconds without a step prints what all the others noted:

    rank 0 stands since 30 s after step 3. Who stands where, those behind first:
      rank 1: after step 3, in next_batch (data.py:139)
      ranks 0, 2, 3: after step 3, in all_reduce (distributed_c10d.py:3089)

A cluster takes a machine back by a signal to some of the processes. All must save after
the same step, so they ask each other: `install_sigterm` and `should_stop`.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from types import TracebackType
from typing import TextIO

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from minllama.architecture.train import Run


class Watch:
    """A hook that tells which process holds up a run, if no step ends for `seconds`.

    Use it as a context, or `close()` it, where the process lives on after the run. It
    looks on and ends nothing: that is for the timeout of the collectives.

    Args:
        seconds: without a step, until it prints; then after twice that, four times, …
            Longer than the longest honest step, checkpoint and compilation.
        out: where to; None: standard error.
        store: for the notes; None: that of the process group, if one runs.

    Raises:
        ValueError: `seconds` is not positive.
    """

    def __init__(
        self, seconds: float, out: TextIO | None = None, store: Store | None = None
    ) -> None:
        if seconds <= 0:
            raise ValueError(f"seconds={seconds} must be greater than 0.")
        self.seconds, self.out = seconds, out or sys.stderr
        self.rank, self.world = 0, 1
        if dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
            store = store or dist.distributed_c10d._get_default_store()
        # a connection of its own: who hangs in the other one would block it
        self.store = None if store is None else store.clone()  # type: ignore[attr-defined]
        self.step, self.since = 0, time.monotonic()
        self.limit = seconds
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self.thread.start()

    def __call__(self, run: Run) -> None:
        self.step, self.since, self.limit = run.step, time.monotonic(), self.seconds
        if run.step == run.steps:
            self.close()

    def close(self) -> None:
        """Look no longer."""
        self.ended.set()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _look(self) -> None:
        while not self.ended.wait(min(1.0, self.seconds / 4)):
            step, stood = self.step, time.monotonic() - self.since
            try:
                self._note(step)
                if stood > self.limit:
                    self.limit *= 2
                    print(self._report(step, stood), file=self.out, flush=True)
            except Exception as error:  # the store is gone: so is rank 0, mostly
                print(f"rank {self.rank}: no notes of other ranks: {error}",
                      file=self.out, flush=True)  # fmt: skip
                self.store = None

    def _note(self, step: int) -> None:
        if self.store is not None:
            stack = main_stack()
            waits = "/torch/distributed/" in stack[-1].filename
            note = {"step": step, "waits": waits, "place": place(stack),
                    "time": time.time()}  # fmt: skip
            self.store.set(f"watch/{self.rank}", json.dumps(note))

    def _report(self, step: int, stood: float) -> str:
        stack = main_stack()
        lines = [f"rank {self.rank} stands since {stood:.0f} s after step {step}."]
        if self.world > 1 and self.store is not None:
            lines[0] += " Who stands where, those behind first:"
            lines += [f"  {line}" for line in self._others()]
        calls = "".join(traceback.format_list(stack)).rstrip()
        return "\n".join([*lines, f"rank {self.rank} is in:", calls])

    def _others(self) -> list[str]:
        """Ranks by step and place; those first that are behind, or wait for nobody."""
        assert self.store is not None
        groups: dict[tuple[int, bool, str], list[int]] = {}
        for rank in range(self.world):
            key = f"watch/{rank}"
            if not self.store.check([key]):
                groups.setdefault((-1, False, "not watching"), []).append(rank)
                continue
            note = json.loads(self.store.get(key))
            silent = time.time() - note["time"]
            where = f"after step {note['step']}, in {note['place']}"
            if silent > 3 + self.seconds / 2:  # killed, or stuck within C
                where += f", silent for {silent:.0f} s"
            groups.setdefault((note["step"], note["waits"], where), []).append(rank)
        order = sorted(groups.items(), key=lambda item: (*item[0][:2], len(item[1])))
        return [f"{_named(ranks)}: {where}" for (*_, where), ranks in order]


def _named(ranks: list[int]) -> str:
    word = "rank" if len(ranks) == 1 else "ranks"
    shown = ", ".join(map(str, ranks[:8]))
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"{word} {shown}{more}"


def main_stack() -> traceback.StackSummary:
    """Where the main thread of this process stands, outermost call first."""
    main = threading.main_thread().ident
    assert main is not None
    return traceback.extract_stack(sys._current_frames()[main])


def place(stack: traceback.StackSummary) -> str:
    """The innermost call, in words: all_reduce (distributed_c10d.py:3089)."""
    frame = stack[-1]
    return f"{frame.name} ({os.path.basename(frame.filename)}:{frame.lineno})"


@dataclass
class Stop:
    """Whether this process was told to end."""

    asked: bool = False


def install_sigterm(
    signals: tuple[int, ...] = (signal.SIGTERM, signal.SIGUSR1),
) -> Stop:
    """From now on these signals end nothing; they are noted in what is returned.

    Example: all processes save after the same step, then leave.

        stop = install_sigterm()

        def leave(run):                                # a hook of the training loop
            if should_stop(stop):
                save(run)
                raise SystemExit("stopped by a signal; saved")

    Raises:
        ValueError: called in another thread than the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ValueError(
            f"install_sigterm in thread={threading.current_thread().name!r}: Python "
            "gives signals to the main thread; call it there."
        )
    stop = Stop()

    def note(number, frame) -> None:
        stop.asked = True

    for number in signals:
        signal.signal(number, note)
    return stop


def should_stop(stop: Stop) -> bool:
    """Whether any process was told to end: the same answer in all of them.

    A collective: call it in every process, after every step.
    """
    if not dist.is_initialized():
        return stop.asked
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    asked = torch.tensor(float(stop.asked), device=device)
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    return asked.item() > 0
