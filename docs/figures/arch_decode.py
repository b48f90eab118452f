"""Decoding one text with Llama 3.2 1B on an H200, and the time that memory allows."""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
import style
from style import B, T

from minllama.architecture.accounting import count_parameters
from minllama.architecture.config import LlamaConfig

ROOT = Path(__file__).parents[2]
READ = 4608e9  # bytes/s, the best read kernel measured on an H200
with open(ROOT / "benchmarks/results/architecture_decode_cuda.csv") as file:
    rows = [row for row in csv.DictReader(file) if row["model"] == "llama-3.2-1b"]
limit = 1e3 * 2 * count_parameters(LlamaConfig.from_name("llama-3.2-1b")) / READ

style.use()
fig, ax = plt.subplots(figsize=(7.2, 2.0))
for at, row in enumerate(rows):
    ms = float(row["ms_per_step"])
    ax.barh(at, ms, 0.62, color=B if row["library"] == "transformers" else T)
    ax.text(ms + 0.1, at, f"{ms:.2f} ms · {float(row['tokens_per_s']):.0f} tokens/s",
            va="center")  # fmt: skip
ax.axvline(limit, color=style.INK, ls="--", lw=1)
ax.text(limit + 0.1, -0.68, f"all weights read once: {limit:.2f} ms", va="center")
ax.set(yticks=range(len(rows)), yticklabels=[row["library"] for row in rows])
ax.set(xlabel="ms per token", xlim=(0, 11), ylim=(len(rows) - 0.5, -1.0))
ax.tick_params(axis="y", length=0)
style.save(fig, "arch_decode", "Milliseconds per token, and the limit of memory")
