"""The head and its loss: time and memory, ours and the peers', from the CSV."""

import matplotlib.pyplot as plt
import ops_measured as data
import style
from style import B, D, H, T

COLORS = {"eager": B, "liger": D, "compile": H}
PLACES = {  # of the names, from the dot; the others above it
    "compile": (-7, -3, "right"),
    "float32 sums": (7, -3, "left"),
    "ours": (0, -14, "center"),
    "liger": (0, -14, "center"),
}
SHAPES = list(dict.fromkeys(r["shape"] for r in data.LINEAR))

style.use()
fig, axes = plt.subplots(1, len(SHAPES), figsize=(7.2, 2.6), sharey=True)
for ax, shape in zip(axes, SHAPES):
    mine = [r for r in data.LINEAR if r["shape"] == shape]
    n, width, v = (int(x) for x in shape.split("x"))
    limit = 1e3 * 6 * n * width * v / data.SHEET
    ax.axvline(limit, color=style.INK, ls="--", lw=1)
    for r in sorted(mine, key=lambda r: float(r["us"])):
        ms, gib = float(r["us"]) / 1e3, float(r["peak_GiB"])
        ax.semilogy(ms, gib, "o", color=COLORS.get(r["who"], T))
        name = r["who"].removeprefix("ours: ")
        dx, dy, side = PLACES.get(name, (0, 7, "center"))
        ax.annotate(name, (ms, gib), (dx, dy), ha=side, textcoords="offset points",
                    fontsize=9.5)  # fmt: skip
    most = max(float(r["us"]) / 1e3 for r in mine)
    ax.set(title=f"D = {width:,}", xlabel="ms, gradients included", ylim=(0.25, 30))
    ax.set(xlim=(0.9 * limit, 1.12 * most))
    ax.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    ax.minorticks_off()
axes[0].set_ylabel("GiB at the peak")
style.save(fig, "ops_loss", "Milliseconds and gibibytes of the linear loss")
