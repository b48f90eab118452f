"""One training step as a picture: what computes, what communicates, what waits.

    computation    ███████ ████████     ███████
    communication      ████████  ██████████
    exposed                         ^^^^          communication that nothing hides

A step takes as long as its computation and its exposed communication together: hidden
communication is free. `trace_step` asks the profiler. On a GPU, spans are kernels on
their streams, and NCCL's are communication; on a CPU they are operators on their
threads, and gloo's messages from their start until they are complete.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

COMPUTE, COMMUNICATION = "compute", "communication"
COLORS = {COMPUTE: "C0", COMMUNICATION: "C1"}


@dataclass(frozen=True)
class Span:
    """Something that ran from `start` to `end`, in seconds since the step began."""

    lane: str  # the stream or the thread
    name: str
    kind: str  # compute or communication
    start: float
    end: float


def trace_step(
    function: Callable[[], object], path: str | Path | None = None
) -> list[Span]:
    """Run one step under the profiler; its spans, in the order of their start.

    The first step of a run allocates and warms up: take a later one. What the profiler
    itself costs is inside, a few microseconds an operator.

    Args:
        function: does the step.
        path: of a trace for chrome://tracing or Perfetto; None: none is written.
    """
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as prof:
        function()
        if on_gpu:
            torch.cuda.synchronize()
    if path is not None:
        save_trace(prof, path)
    return spans_of(prof)


def save_trace(prof: profile, path: str | Path) -> Path:
    """Write a trace for chrome://tracing or ui.perfetto.dev; `.gz` is packed.

    Written to a temporary name and renamed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name("part-" + path.name)  # keeps the suffix, which says how
    prof.export_chrome_trace(str(part))
    os.replace(part, path)
    return path


def spans_of(prof: profile) -> list[Span]:
    """The spans of a finished profile: those of GPUs where there are any."""
    events = [e for e in prof.events() or [] if e.time_range.end > e.time_range.start]
    spans = [_kernel(e) for e in events if _is_kernel(e)] or _operators(events)
    begin = min((span.start for span in spans), default=0.0)
    shifted = [
        replace(s, start=(s.start - begin) / 1e6, end=(s.end - begin) / 1e6)
        for s in spans
    ]
    return sorted(shifted, key=lambda span: (span.start, span.end))


def _is_kernel(event) -> bool:
    """Ran on a GPU, and is no range that somebody named around kernels."""
    named = getattr(event, "is_user_annotation", False)
    named = named or event.name.startswith("nccl:")
    return event.device_type.name == "CUDA" and not named


def _kernel(event) -> Span:
    kind = COMMUNICATION if "nccl" in event.name.lower() else COMPUTE
    stream = getattr(event, "device_resource_id", event.thread)
    times = event.time_range
    return Span(f"stream {stream}", event.name, kind, times.start, times.end)


def _operators(events: list) -> list[Span]:
    """Outermost operators, and gloo's messages; not what gloo's own threads copy."""
    spans = []
    messages = [e for e in events if e.name.startswith("gloo:")]
    direct = ("gloo:send", "gloo:recv")  # these begin on the thread that asks for them
    threads = {e.thread for e in messages if e.name not in direct}
    for event in events:
        where, _, name = event.name.partition(":")
        times = event.time_range
        if where == "gloo":
            spans.append(Span("gloo", name, COMMUNICATION, times.start, times.end))
        elif where == "aten" and event.thread not in threads and not _is_inner(event):
            lane = f"thread {event.thread}"
            spans.append(Span(lane, name[1:], COMPUTE, times.start, times.end))
    return spans


def _is_inner(event) -> bool:
    """Within another operator, or within the call that hands a message over."""
    while (event := event.cpu_parent) is not None:
        if event.name.startswith(("aten::", "c10d::")):
            return True
    return False


Interval = tuple[float, float]


def union(intervals: Iterable[Interval], gap: float = 0.0) -> list[Interval]:
    """Intervals in order, those joined that overlap or lie at most `gap` apart.

    Example:
        >>> union([(5, 6), (0, 2), (1, 3)])
        [(0, 3), (5, 6)]
    """
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1] + gap:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        elif end > start:
            joined.append((start, end))
    return joined


def subtract(these: list[Interval], those: list[Interval]) -> list[Interval]:
    """What these cover and those do not; both as `union` gives them.

    Example:
        >>> subtract([(0, 10)], [(2, 3), (9, 12)])
        [(0, 2), (3, 9)]
    """
    left = []
    for start, end in these:
        for a, b in those:
            if a < end and b > start:
                left.append((start, a))
                start = max(start, b)
        left.append((start, end))
    return [(start, end) for start, end in left if end > start]


def intervals(spans: Iterable[Span], kind: str, gap: float = 0.0) -> list[Interval]:
    """When anything of a kind runs."""
    return union(((s.start, s.end) for s in spans if s.kind == kind), gap)


def exposed(spans: list[Span], gap: float = 0.0) -> list[Interval]:
    """When communication runs and no computation does."""
    return subtract(intervals(spans, COMMUNICATION), intervals(spans, COMPUTE, gap))


def exposed_communication(spans: list[Span], gap: float = 0.0) -> float:
    """Share of a step in which communication runs and no computation does, 0 to 1.

    Args:
        spans: of one step, from the first start to the last end.
        gap: seconds; computation that pauses no longer counts as going on. On a CPU
            there is Python between any two operators: 50e-6 is fair.

    Raises:
        ValueError: no spans.
    """
    if not spans:
        raise ValueError(
            "no spans: the step ran neither an operator nor a kernel; trace one that "
            "computes."
        )
    length = max(s.end for s in spans) - min(s.start for s in spans)
    return sum(end - start for start, end in exposed(spans, gap)) / length


def draw_timeline(steps: dict[str, list[Span]], gap: float = 0.0):
    """A picture of steps, one above the other on the same clock, by name.

    Returns:
        A `matplotlib.figure.Figure`, in the colours of the style in use: communication
        is pale where computation hides it, and solid where it is exposed.

    Raises:
        ValueError: no spans in one of them.
    """
    import matplotlib.pyplot as plt

    shares = {name: exposed_communication(s, gap) for name, s in steps.items()}
    figure, panels = plt.subplots(
        len(steps), sharex=True, squeeze=False, figsize=(7.2, 0.6 + 1.1 * len(steps))
    )
    for axes, (name, spans) in zip(panels[:, 0], steps.items()):
        kinds = (COMPUTE, COMMUNICATION)
        for row, kind in enumerate(kinds):
            alpha = 1.0 if kind == COMPUTE else 0.35
            _bars(axes, intervals(spans, kind), row, COLORS[kind], alpha)
        _bars(axes, exposed(spans, gap), 1, COLORS[COMMUNICATION], 1.0)
        axes.set_yticks(range(len(kinds)), ["computation", "communication"])
        axes.set_ylim(1.6, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_title(f"{name}: {shares[name]:.0%} of the step exposed", loc="left")
    panels[-1, 0].set_xlabel("time, ms")
    panels[-1, 0].set_xlim(left=0)
    return figure


def _bars(axes, found: list[Interval], row: int, color: str, alpha: float) -> None:
    bars = [(1e3 * start, 1e3 * (end - start)) for start, end in found]
    axes.broken_barh(bars, (row - 0.35, 0.7), color=color, alpha=alpha, linewidth=0)
