"""Saving and loading on GPUs, beside PyTorch's own way, from the committed CSV.

Without the CSV it says so: run benchmarks/bench_dist_checkpoint.py, then this again.
"""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
import style
from style import ACCENT, B, T

CSV = Path(__file__).parents[2] / "benchmarks/results/dist_checkpoint_cuda.csv"
rows = list(csv.DictReader(CSV.open())) if CSV.exists() else []

style.use()
fig, ax = plt.subplots(figsize=(7.2, 0.27 * len(rows) + 0.75))
colors = {"minllama": T, "torch DCP": B}
longest = max((float(row["seconds"]) for row in rows), default=1.0)
for at, row in enumerate(rows):
    seconds, stall = float(row["seconds"]), float(row["stall_seconds"])
    color = colors.get(row["library"], style.INK)
    ax.barh(at, seconds, 0.66, color=color, alpha=0.35 if stall else 1)
    words = f"{seconds:.1f} s · {row['GB_per_s']} GB/s"
    if stall:
        ax.barh(at, stall, 0.66, color=ACCENT)
        words += f" · training waits {stall:.2f} s"
    ax.text(seconds + 0.01 * longest, at, words, va="center")
if rows:
    names = [f"{row['what']}, {row['library']}" for row in rows]
    ax.set(yticks=range(len(rows)), yticklabels=names, xlabel="seconds")
    ax.set(xlim=(0, 1.5 * longest))
    ax.tick_params(axis="y", length=0)
    ax.invert_yaxis()
else:
    ax.set_axis_off()
    ax.text(0.5, 0.5, "not measured yet", ha="center", style="italic")
style.save(fig, "ckpt_full_size", "Seconds to save and to load, ours and PyTorch's")
