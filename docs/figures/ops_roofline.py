"""Operators on the roofline of an H200, plain and fused, from the committed CSV."""

import matplotlib.pyplot as plt
import ops_measured as data
import style
from style import B, T

CASES = {  # operator: shape, FLOPs and bytes a number of bfloat16, numbers
    "add_rms_norm": ("16384x4096", 5, 4 * 2, 16384 * 4096),
    "rms_norm": ("16384x4096", 4, 2 * 2, 16384 * 4096),
    "swiglu": ("16384x8192", 6, 3 * 2, 16384 * 8192),
    "cross_entropy": ("8192x128256", 4, 2, 8192 * 128256),
}
N, D, V = 8192, 2048, 128256

style.use()
fig, ax = plt.subplots(figsize=(7.2, 3.3))
reach = [0.03, data.HEAD / data.COPY, 12000]
roof = [min(x * data.COPY, data.HEAD) / 1e12 for x in reach]
ax.loglog(reach, roof, "--", color=style.INK, lw=1.2)
for op, (shape, flops, size, n) in CASES.items():
    for who, color in (("eager", B), ("ours", T)):
        us = data.microseconds(op, who, shape, "forward")
        ax.plot(flops / size, flops * n / us / 1e6, "o", color=color)
places = {"add_rms_norm": (-7, 8, "right"), "rms_norm": (-2, 15, "right"),
          "swiglu": (9, -9, "left"), "cross_entropy": (9, -3, "left")}  # fmt: skip
for op, (dx, dy, side) in places.items():
    shape, flops, size, n = CASES[op]
    at = flops / size, flops * n / data.microseconds(op, "ours", shape, "forward") / 1e6
    ax.annotate(op, at, (dx, dy), textcoords="offset points", ha=side)
big = 6 * N * D * V / (4 * 2 * (N * D + V * D))  # hidden, W and both gradients
for who, color in (("eager", B), ("ours", T)):
    row = next(r for r in data.LINEAR if r["who"] == who)
    ax.plot(big, float(row["TFLOP_per_s"]), "o", color=color)
ax.annotate("linear_cross_entropy", (big, 300), (0, -16), textcoords="offset points",
            ha="center")  # fmt: skip
ax.text(12, 12 * data.COPY / 1e12 * 1.25, f"{data.COPY / 1e9:,.0f} GB/s",
        rotation=31, ha="center", va="bottom")  # fmt: skip
ax.text(900, 1.15 * data.HEAD / 1e12, "matrix products", ha="right", va="bottom")
ax.plot([], [], "o", color=T, label="kernels of this chapter")
ax.plot([], [], "o", color=B, label="plain PyTorch, step by step")
ax.legend(loc="lower right")
ax.set(
    xlabel="FLOPs a byte that must move",
    ylabel="TFLOP/s",
    xlim=(0.03, 15000),
    ylim=(0.1, 2500),
)
style.save(fig, "ops_roofline", "Rate over intensity, and the roof of memory and rate")
