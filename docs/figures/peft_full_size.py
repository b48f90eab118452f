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
names, at, at_of = [], [], {}
for number, row in enumerate(training):
    first = number > 0 and row["case"] != training[number - 1]["case"]
    at.append((at[-1] if at else 0.0) + (1.6 if first else 1))
    at_of.setdefault(row["case"], []).append(at[-1])
    names.append(row["who"])
    mine, speed = row["who"].startswith("ours"), float(row["tokens_per_s"])
    rivals = [one for one in training if one["case"] == row["case"]]
    rivals = [one for one in rivals if one["who"].startswith("ours") == mine]
    best = speed == max(float(one["tokens_per_s"]) for one in rivals)
    ax.barh(at[-1], speed, 0.8, color=T if mine else B, alpha=1 if best else 0.45)
    words = f"{speed:,.0f} · {row['peak_GiB']} GiB"
    weight = "bold" if best else "normal"
    ax.text(
        speed + 0.01 * longest, at[-1], words, va="center", fontsize=9, weight=weight
    )
for case, rows_at in at_of.items():
    middle = sum(rows_at) / len(rows_at)
    ax.text(1.47 * longest, middle, NAMES[case], va="center", ha="right", fontsize=12)
if training:
    ax.set(xlabel="tokens/s, and peak memory", xlim=(0, 1.47 * longest))
    ax.set_yticks(at, names, fontsize=9.5)
    ax.set_xticks(range(0, 15_001, 5000), [f"{n:,}" for n in range(0, 15_001, 5000)])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(at[-1] + 0.7, at[0] - 0.7)
else:
    ax.set_axis_off()
    ax.text(0.5, 0.5, "not measured yet", ha="center", style="italic")
style.save(fig, "peft_full_size", "Tokens per second and peak memory, ours and PEFT's")
