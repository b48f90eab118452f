"""A hang names the rank and the step; a signal to one process stops all at one step."""

import io
import os
import re
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from minllama.architecture.hooks import Run
from minllama.dist_run.launch import launch
from minllama.dist_run.watch import Stop, Watch, install_sigterm, should_stop


def make_run(steps: int = 10) -> Run:
    return Run(None, None, None, steps)  # type: ignore[arg-type]


def overslept() -> None:
    time.sleep(2.2)


def hang(behind: bool) -> str:
    """Rank 1 sleeps before it computes step 3, or within its hooks after step 2."""
    out = io.StringIO()
    run = make_run()
    with Watch(0.8, out) as watch:
        for step in (1, 2, 3):
            if step == 3 and dist.get_rank() == 1:
                overslept()
            dist.all_reduce(torch.ones(1))
            run.step = step
            if behind and step == 2 and dist.get_rank() == 1:
                overslept()
            watch(run)
    return out.getvalue()


def signalled() -> list[bool]:
    """Only the last rank is told, after step 3; all must know after the same step."""
    stop = install_sigterm()
    last = dist.get_world_size() - 1
    found = []
    for step in range(6):
        if step == 3 and dist.get_rank() == last:
            os.kill(os.getpid(), signal.SIGUSR1)
        found.append(should_stop(stop))
    return [*found, stop.asked]


def lost() -> str:
    """Rank 1 never began to watch."""
    out = io.StringIO()
    if dist.get_rank() == 0:
        with Watch(0.4, out):
            time.sleep(1.0)
    dist.barrier()
    return out.getvalue()


def two() -> dict:
    return {
        "lost": lost(),
        "before": hang(behind=False),
        "within": hang(behind=True),
        "stop": signalled(),
    }


@pytest.fixture(scope="module")
def pair() -> list[dict]:
    return launch(two, 2)


def report(text: str, step: int) -> list[str]:
    """The lines of the first report after a step: a slow machine makes others."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if f"s after step {step}." in line)
    return lines[at:]


def test_a_hang_names_the_rank_and_the_step(pair):
    for rank, text in enumerate(pair[r]["before"] for r in (0, 1)):
        first, second, third, fourth, *_ = report(text, 2)
        assert re.match(rf"rank {rank} stands since \d s after step 2\. Who", first)
        assert second.startswith("  rank 1: after step 2, in overslept (test_watch.py:")
        assert third.startswith("  rank 0: after step 2, in all_reduce (distributed")
        assert fourth == f"rank {rank} is in:"
        assert text.count("after step 2. Who") >= 2  # again after twice as long
    assert "overslept()" in pair[1]["before"] and "dist.all_reduce" in pair[0]["before"]


def test_who_is_a_step_behind_comes_first(pair):
    _, second, third, *_ = report(pair[0]["within"], 2)
    assert second.startswith("  rank 1: after step 1, in overslept")
    assert third.startswith("  rank 0: after step 2, in all_reduce")


def test_who_gives_no_sign_is_named(pair):
    assert "  rank 1: not watching" in pair[0]["lost"]
    assert pair[1]["lost"] == ""


def test_a_signal_to_one_process_stops_all_after_the_same_step(pair):
    assert pair[0]["stop"] == [False] * 3 + [True] * 3 + [False]
    assert pair[1]["stop"] == [False] * 3 + [True] * 3 + [True]


def test_alone_it_watches_too_and_a_run_that_moves_on_is_left_in_peace():
    out, run = io.StringIO(), make_run(steps=6)
    watch = Watch(1.0, out)
    for run.step in range(1, 7):
        time.sleep(0.2)
        watch(run)
    watch.thread.join(timeout=1.0)
    assert out.getvalue() == "" and not watch.thread.is_alive()  # the run is over
    with Watch(0.2, out):
        time.sleep(0.4)
    text = out.getvalue()
    assert re.match(r"rank 0 stands since \d s after step 0\.\nrank 0 is in:", text)
    assert "time.sleep(0.4)" in text


def test_a_store_that_is_gone_is_told_once():
    class Gone:
        def clone(self):
            return self

        def set(self, key, value):
            raise RuntimeError("connection reset")

    out = io.StringIO()
    with Watch(0.2, out, Gone()):  # type: ignore[arg-type]
        time.sleep(0.4)
    assert out.getvalue().count("no notes of other ranks: connection reset") == 1
    assert "stands since" in out.getvalue()


def test_wrong_seconds_and_wrong_threads_are_refused():
    with pytest.raises(ValueError, match="seconds=0"):
        Watch(0)
    said = []

    def wrong() -> None:
        with pytest.raises(ValueError) as error:
            install_sigterm()
        said.append(str(error.value))

    thread = threading.Thread(target=wrong, name="other")
    thread.start()
    thread.join()
    assert "thread='other'" in said[0]


def test_alone_a_signal_is_noted():
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        stop = install_sigterm()
        assert not should_stop(stop)
        os.kill(os.getpid(), signal.SIGTERM)
        assert should_stop(stop) and not should_stop(Stop())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
