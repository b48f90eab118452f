"""What is hidden is free: exposed communication, by interval arithmetic."""

import gzip
import json
import random

import pytest
import torch
import torch.distributed as dist
from torch import nn

from minllama.dist_run.launch import launch
from minllama.dist_run.timeline import (
    COMMUNICATION,
    COMPUTE,
    Span,
    draw_timeline,
    exposed,
    exposed_communication,
    intervals,
    spans_of,
    subtract,
    trace_step,
    union,
)


def span(kind: str, start: float, end: float, lane: str = "0") -> Span:
    return Span(lane, "x", kind, start, end)


def naive(cover: list, point: float) -> bool:
    return any(start <= point < end for start, end in cover)


def test_interval_arithmetic_equals_a_look_at_each_moment():
    own = random.Random(3)
    for _ in range(200):
        a, b = (
            [
                (s := own.randrange(40), s + own.randrange(9))
                for _ in range(own.randrange(8))
            ]
            for _ in range(2)
        )
        left = subtract(union(a), union(b))
        for moment in range(50):
            point = moment + 0.5
            assert naive(union(a), point) == naive(a, point)
            assert naive(left, point) == (naive(a, point) and not naive(b, point))
        assert all(e < s for (_, e), (s, _) in zip(union(a), union(a)[1:]))


C, M = COMPUTE, COMMUNICATION


@pytest.mark.parametrize(
    "spans, share",
    [
        ([span(C, 0, 10), span(M, 2, 5)], 0.0),
        ([span(C, 0, 5), span(M, 4, 10)], 0.5),
        ([span(M, 0, 4), span(M, 2, 6), span(C, 6, 8)], 0.75),
        ([span(C, 0, 2), span(C, 4, 8, "1"), span(M, 1, 5)], 0.25),
        ([span(C, 3, 4)], 0.0),
    ],
)
def test_exposed_communication_of_hand_made_steps(spans, share):
    assert exposed_communication(spans) == pytest.approx(share)


def test_a_short_pause_of_computation_counts_as_computation():
    spans = [span(COMPUTE, 0, 4), span(COMPUTE, 5, 10), span(COMMUNICATION, 0, 10)]
    assert exposed_communication(spans) == pytest.approx(0.1)
    assert exposed_communication(spans, gap=1.0) == 0.0
    assert exposed_communication(spans, gap=0.9) == pytest.approx(0.1)


def test_a_step_without_spans_is_refused():
    with pytest.raises(ValueError, match="no spans"):
        exposed_communication([])


def traced(folder: str) -> dict:
    """One step that waits at once for its message, and one that computes meanwhile."""
    message, square = torch.ones(3_000_000), torch.randn(300, 300)
    copied = torch.empty(2 * message.numel())
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    layer = nn.Linear(300, 300)

    def waiting() -> None:
        gather(copied, message, async_op=True).wait()
        layer(square).sum().backward()

    def overlapping() -> None:
        work = gather(copied, message, async_op=True)
        while not work.is_completed():
            layer(square).sum().backward()
        work.wait()

    waiting()
    path = f"{folder}/{dist.get_rank()}.json.gz"
    spans = {
        "waiting": trace_step(waiting, path),
        "overlapping": trace_step(overlapping),
    }
    busy = [e - s for s, e in exposed(spans["waiting"])]
    return {
        "shares": [exposed_communication(s, 1e-4) for s in spans.values()],
        "names": sorted({s.name for s in spans["waiting"] if s.kind == COMMUNICATION}),
        "compute": sorted({s.name for s in spans["waiting"] if s.kind == COMPUTE}),
        "lanes": len({s.lane for s in spans["waiting"] if s.kind == COMPUTE}),
        "first": min(s.start for s in spans["waiting"]),
        "seconds": [sum(busy), max(s.end for s in spans["waiting"])],
    }


def test_a_message_is_exposed_unless_something_is_computed_meanwhile(tmp_path):
    for rank, found in enumerate(launch(traced, 2, str(tmp_path))):
        waiting, overlapping = found["shares"]
        assert waiting > 3 * overlapping, found
        assert found["names"] == ["all_gather"]
        assert {"linear", "sum", "mm"} <= set(found["compute"])
        assert found["lanes"] == 1  # gloo's threads copy, and do not count
        assert (
            found["first"] == 0.0 and 1e-4 < found["seconds"][0] < found["seconds"][1]
        )
        with gzip.open(tmp_path / f"{rank}.json.gz") as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert "gloo:all_gather" in names
        assert not list(tmp_path.glob("part-*"))


class Event:
    """What the profiler tells of a kernel."""

    def __init__(self, name, stream, start, end, named=False) -> None:
        self.name, self.device_resource_id, self.is_user_annotation = (
            name,
            stream,
            named,
        )
        self.device_type = type("Type", (), {"name": "CUDA"})
        self.time_range = type("Times", (), {"start": start, "end": end})
        self.thread, self.cpu_parent = 0, None


class Profile:
    def __init__(self, *events) -> None:
        self.events = lambda: list(events)


def test_kernels_are_told_apart_by_their_names():
    found = spans_of(
        Profile(
            Event("sm90_gemm", 7, 10.0, 30.0),
            Event("ncclDevKernel_AllGather_RING_LL", 20, 20.0, 50.0),
            Event("nccl:_all_gather_base", 20, 0.0, 60.0),
            Event("forward", 7, 0.0, 60.0, named=True),
        )
    )
    assert [(s.lane, s.kind) for s in found] == [
        ("stream 7", COMPUTE),
        ("stream 20", COMMUNICATION),
    ]
    assert exposed_communication(found) == pytest.approx(0.5)
    assert found[1].end == pytest.approx(40e-6)


def test_the_picture_shows_each_step_on_one_clock():
    import matplotlib

    matplotlib.use("agg")
    hidden = [span(COMPUTE, 0, 2), span(COMMUNICATION, 0, 1)]
    bare = [span(COMPUTE, 0, 2), span(COMMUNICATION, 2, 4)]
    figure = draw_timeline({"prefetch": hidden, "none": bare})
    first, second = figure.axes
    assert first.get_title(loc="left") == "prefetch: 0% of the step exposed"
    assert second.get_title(loc="left") == "none: 50% of the step exposed"
    assert first.get_xlim() == second.get_xlim()
    assert second.get_xlim()[1] >= 4000
    drawn = second.collections[-1].get_paths()  # what is exposed, in ms
    assert [tuple(path.get_extents().intervalx) for path in drawn] == [(2000, 4000)]
    assert intervals(bare, COMPUTE) == [(0, 2)]
