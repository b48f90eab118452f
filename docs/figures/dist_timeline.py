"""One training step of Llama 3.1 8B on four GPUs, from the profiler of the first."""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
import style
from style import D, T

from minllama.dist_run.timeline import (
    COMMUNICATION,
    COMPUTE,
    Span,
    exposed,
    exposed_communication,
    intervals,
)

ROOT = Path(__file__).parents[2]
NAMES = {"eager": "eager, 2 rows a GPU", "fast": "compiled, without logits, 4 rows"}


def read(name: str) -> list[Span]:
    with open(ROOT / f"benchmarks/results/dist_run_timeline_{name}.csv") as file:
        return [
            Span("", "", row["kind"], float(row["start_ms"]), float(row["end_ms"]))
            for row in csv.DictReader(file)
        ]


def bars(ax, found, y, color, alpha) -> None:
    times = [(start, end - start) for start, end in found]
    ax.broken_barh(times, (y - 0.34, 0.68), color=color, alpha=alpha, lw=0)


style.use()
fig, panels = plt.subplots(len(NAMES), figsize=(7.2, 3.1))
for ax, (name, words) in zip(panels, NAMES.items()):
    spans = read(name)
    bars(ax, intervals(spans, COMPUTE), 0, T, 0.85)
    bars(ax, intervals(spans, COMMUNICATION), 1, D, 0.4)
    bars(ax, exposed(spans), 1, style.ACCENT, 1.0)
    share = exposed_communication(spans)
    ax.set_title(f"{words}: {share:.1%} of the step exposed", loc="left")
    ax.set(yticks=[0, 1], yticklabels=["computation", "communication"])
    ax.set(ylim=(1.6, -0.6), xlim=(0, None))
    ax.tick_params(axis="y", length=0)
panels[-1].set_xlabel("ms")
style.save(fig, "dist_timeline", "A step's computation and communication on one clock")
