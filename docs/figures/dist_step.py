"""Training Llama 3.1 8B on four GPUs: tokens/s, memory, exposed communication."""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
import style
from style import B, T

from minllama.architecture.accounting import count_parameters
from minllama.architecture.config import LlamaConfig

ROOT = Path(__file__).parents[2]
with open(ROOT / "benchmarks/results/dist_run_cuda_4.csv") as file:
    table = list(csv.DictReader(file))
rows = [row for row in table if row["case"] == "step"]
weights = count_parameters(LlamaConfig.from_name(rows[0]["model"]))
limit = 700e12 / (8 * weights)

style.use()
fig, ax = plt.subplots(figsize=(7.2, 0.8 + 0.62 * len(rows)))
for at, row in enumerate(rows):
    rate = float(row["tokens_per_s_gpu"])
    ax.barh(at, rate, 0.5, color=B if row["who"] == "transformers" else T, alpha=0.85)
    who, _, how = row["who"].partition(", ")
    words = f"{who}{', ' if how else ''}{how} · {row['rows']} rows a GPU"
    ax.text(60, at - 0.42, words, va="center", fontsize=10)
    more = [f"{rate:,.0f}", f"MFU {row['MFU']}", f"{row['peak_GiB']} GiB"]
    if row["predicted_GiB"]:
        more.append(f"predicted {row['predicted_GiB']}")
    if row["exposed"]:
        more.append(f"{row['exposed']} exposed")
    ax.text(60, at, " · ".join(more), va="center", fontsize=10, color="white")
ax.axvline(limit, color=style.INK, ls="--", lw=1)
ax.text(limit - 60, len(rows) - 0.42, "8 FLOPs a weight at 700 TFLOP/s", va="center",
        ha="right")  # fmt: skip
ax.set(yticks=[], xlabel="tokens/s for each of four GPUs", xlim=(0, 1.03 * limit))
ax.set_ylim(len(rows) - 0.2, -0.7)
ax.spines["left"].set_visible(False)
style.save(fig, "dist_step", "Tokens a second for each GPU, and what it held")
