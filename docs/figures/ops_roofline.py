"""Operators on the roofline of an H200, plain and fused, from the committed CSV."""

import matplotlib.pyplot as plt
import ops_measured as data
import style
from style import B, T

CASES = {  # operator: shape, FLOPs and bytes a number of bfloat16, numbers
    "add_rms_norm": ("16384x4096", 5, 4 * 2, 16384 * 4096),
    "rope": ("8x2048x(32+8)x64", 3, 2 * 2, 16384 * 40 * 64),
    "rms_norm": ("16384x4096", 4, 2 * 2, 16384 * 4096),
    "swiglu": ("16384x8192", 6, 3 * 2, 16384 * 8192),
    "softmax": ("16384x4096", 5, 2 * 2, 16384 * 4096),
    "cross_entropy": ("8192x128256", 4, 2, 8192 * 128256),
}
N, D, V = 8192, 2048, 128256
PLACES = {  # of the names, from the gray dot
    "add_rms_norm": (0, 9, "center"),
    "rope": (0, -15, "center"),
    "rms_norm": (0, -15, "center"),
    "swiglu": (7, -4, "left"),
    "softmax": (0, 9, "center"),
    "cross_entropy": (0, 9, "center"),
}


def rates(op: str) -> tuple[float, float, float]:
    """FLOPs a byte; TFLOP/s plain and fused."""
    shape, flops, size, n = CASES[op]
    times = [data.microseconds(op, who, shape, "forward") for who in ("eager", "ours")]
    return flops / size, *(flops * n / us / 1e6 for us in times)


style.use()
fig, (wide, near) = plt.subplots(1, 2, figsize=(7.2, 3.3), width_ratios=[1, 1.5])
for ax, reach in (
    (wide, [0.2, data.SHEET / data.COPY, 20000]),
    (near, [0.45, 3]),
):
    roof = [min(x * data.COPY, data.SHEET) / 1e12 for x in reach]
    ax.loglog(reach, roof, "--", color=style.INK, lw=1.2)
    for op in CASES:
        x, plain, fused = rates(op)
        ax.plot([x, x], [plain, fused], ":", color=B, lw=1)
        ax.plot(x, plain, "o", color=B)
        ax.plot(x, fused, "o", color=T)
    ax.set_xlabel("FLOPs a byte that must move")
for op, (dx, dy, side) in PLACES.items():
    x, plain, _ = rates(op)
    near.annotate(op, (x, plain), (dx, dy), textcoords="offset points", ha=side,
                  fontsize=9.5)  # fmt: skip
big = 6 * N * D * V / (4 * 2 * (N * D + V * D))  # hidden, W and both gradients
shape = f"{N}x{D}x{V}"
for who, color in (("eager", B), ("ours", T)):
    row = next(r for r in data.LINEAR if (r["who"], r["shape"]) == (who, shape))
    wide.plot(big, float(row["TFLOP_per_s"]), "o", color=color)
wide.annotate("linear loss", (big, 300), (4, -16), textcoords="offset points",
              ha="center", fontsize=9.5)  # fmt: skip
wide.text(20000, 1.2 * data.SHEET / 1e12, f"data sheet: {data.SHEET / 1e12:.0f}",
          ha="right", va="bottom", fontsize=9.5)  # fmt: skip
near.text(0.47, 0.47 * data.COPY / 1e12 * 2.2, f"a copy: {data.COPY / 1e9:,.0f} GB/s",
          va="bottom", fontsize=9.5)  # fmt: skip
near.plot([], [], "o", color=T, label="kernels of this chapter")
near.plot([], [], "o", color=B, label="plain PyTorch, step by step")
fig.legend(*near.get_legend_handles_labels(), loc="outside upper center", ncols=2)
wide.set(ylabel="TFLOP/s", xlim=(0.2, 20000), ylim=(0.1, 4000))
near.set(xlim=(0.45, 3), ylim=(0.08, 20))
near.set_xticks([0.5, 1, 2], ["0.5", "1", "2"])
near.minorticks_off()
style.save(fig, "ops_roofline", "Rate over intensity, and the roof of memory and rate")
