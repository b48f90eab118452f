"""How long an operator takes, and what the machine could do: the method of all tables.

On a GPU each run is captured in a CUDA graph (no launches are timed), the cache is
flushed by writing half a gigabyte before each replay, and events around the replay give
the time; the median of the repeats counts. What cannot be captured is timed as it is.
Replays of a twentieth of a second go before: while a kernel compiles the GPU idles, and
an H200 then ran the next few kernels up to a tenth slower.
On a CPU it is the wall clock, and the numbers say little about a GPU.
"""

import statistics
import time
from collections.abc import Callable

import torch

WARM_UP = 0.05  # seconds


def seconds(
    run: Callable[[], object],
    device: torch.device | str,
    repeats: int = 20,
    capture: bool = True,
    prepare: Callable[[], object] | None = None,
) -> float:
    """Median time of `run()`, in seconds, after a warm-up.

    Args:
        run: what is timed; twice run, it must do the same work.
        device: where it runs.
        repeats: of the timed run.
        capture: replay it from a CUDA graph.
        prepare: called before each run, and not timed (restore what `run` overwrote).
    """
    prepare = prepare or (lambda: None)
    if torch.device(device).type != "cuda":
        prepare()
        run()
        return statistics.median(_wall(run, prepare) for _ in range(repeats))
    go = _captured(run, prepare) if capture else run
    flush = torch.empty(2**29, dtype=torch.int8, device=device)

    def once() -> float:
        prepare()
        flush.fill_(1)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        go()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    once()
    awake = time.perf_counter() + WARM_UP
    while time.perf_counter() < awake:
        once()
    return statistics.median(once() for _ in range(repeats))


def _wall(run: Callable[[], object], prepare: Callable[[], object]) -> float:
    prepare()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _captured(
    run: Callable[[], object], prepare: Callable[[], object]
) -> Callable[[], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile and warm up where capture will happen
        for _ in range(2):
            prepare()
            run()
    torch.cuda.current_stream().wait_stream(side)
    prepare()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_bandwidth(device: torch.device | str, repeats: int = 10) -> float:
    """Bytes per second of a large copy, read and written: the limit of all operators.

    4 GiB on a GPU, 256 MiB on a CPU. Not captured: in a graph a copy becomes a node of
    its own kind, which reached two thirds of this on an H200.
    """
    n = 2**32 if torch.device(device).type == "cuda" else 2**28
    x = torch.ones(n // 4, device=device)
    y = torch.empty_like(x)
    return 2 * n / seconds(lambda: y.copy_(x), device, repeats, capture=False)


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes that `run()` takes on the GPU beyond what is there, at its highest."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
