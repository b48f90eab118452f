"""Memory of a process that loads its share of Llama 3.1 8B, in two ways."""

import matplotlib.pyplot as plt
import style
from style import ACCENT, B, T

from minllama.architecture.accounting import named_shapes
from minllama.architecture.config import LlamaConfig

shapes = named_shapes(LlamaConfig.from_name("llama-3.1-8b")).values()
sizes = [2 * shape.numel() / 1e9 for shape in shapes]
whole, largest = sum(sizes), max(sizes)
worlds = [1, 2, 4, 8, 16, 32, 64]

style.use()
fig, ax = plt.subplots(figsize=(7.2, 2.5))
usual = [whole + whole / n for n in worlds]
slices = [whole / n + largest / n for n in worlds]
ax.plot(worlds, usual, "o-", color=B, ms=4)
ax.plot(worlds, slices, "o-", color=T, ms=4)
ax.axhline(24, color=ACCENT, ls="--", lw=1)
ax.text(64, 30, "a GPU of 24 GB", ha="right", color=ACCENT)
ax.text(64, usual[-1] * 0.55, "read all, then cut", ha="right")
ax.text(64, 3.2, "read slices: a share of the model, and one piece", ha="right")
for n, value in zip(worlds[2::2], slices[2::2]):
    ax.text(n, value * 0.5, f"{value:.1f}", ha="center", color=T)
ax.set(xscale="log", yscale="log", xlabel="processes", ylabel="GB in each at most")
ax.set(xticks=worlds, xticklabels=worlds, yticks=[0.5, 2, 8, 32], ylim=(0.1, 60))
ax.set(yticklabels=["0.5", "2", "8", "32"])
ax.minorticks_off()
style.save(fig, "ckpt_peak", "Peak memory of loading, by the number of processes")
