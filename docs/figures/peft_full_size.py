"""Adapters on a GPU: tokens/s of a training step, and rows mixed, from the CSV.

Without the CSV it says so: run benchmarks/bench_peft.py, then this again.
"""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
import style
from style import B, T

CSV = Path(__file__).parents[2] / "benchmarks/results/peft_cuda.csv"
rows = list(csv.DictReader(CSV.open())) if CSV.exists() else []
training = [row for row in rows if row["case"] in ("lora", "dora", "ia3")]
NAMES = {"lora": "LoRA", "dora": "DoRA", "ia3": "IA3"}

style.use()
fig, ax = plt.subplots(figsize=(7.2, min(3.7, 0.24 * len(training) + 0.8)))
longest = max((float(row["tokens_per_s"]) for row in training), default=1.0)
names, at = [], []
for number, row in enumerate(training):
    first = number == 0 or row["case"] != training[number - 1]["case"]
    at.append((at[-1] if at else 0.0) + (1.5 if first and at else 1))
    speed = float(row["tokens_per_s"])
    ax.barh(at[-1], speed, 0.8, color=T if row["who"].startswith("ours") else B)
    words = f"{speed:,.0f} · {float(row['peak_GiB']):.1f} GiB"
    ax.text(speed + 0.01 * longest, at[-1], words, va="center", fontsize=9.5)
    head = f"{NAMES[row['case']]}   " if first else ""
    names.append(head + row["who"])
if training:
    ax.set(xlabel="tokens/s, and peak memory", xlim=(0, 1.25 * longest))
    ax.set_yticks(at, names, fontsize=9.5)
    ax.tick_params(axis="y", length=0)
    ax.invert_yaxis()
else:
    ax.set_axis_off()
    ax.text(0.5, 0.5, "not measured yet", ha="center", style="italic")
style.save(fig, "peft_full_size", "Tokens per second and peak memory, ours and PEFT's")
