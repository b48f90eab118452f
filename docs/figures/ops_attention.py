"""Attention against PyTorch's backends, from the CSV; without one it says so.

Run benchmarks/fast_attention_cases.py --peers on a GPU, then this again.
"""

import matplotlib.pyplot as plt
import ops_measured as data
import style
from style import B, T

PANELS = [
    ("causal", "forward", "TFLOP_per_s", "causal, forward, TFLOP/s"),
    ("causal", data.BOTH, "TFLOP_per_s", "and backward, TFLOP/s"),
    ("decode", "forward", "GB_per_s", "decode, GB/s"),
]
ROWS = data.attention()

style.use()
if ROWS:
    fig, axes = plt.subplots(1, 3, figsize=(7.2, 3.6))
    for ax, (op, passes, unit, title) in zip(axes, PANELS):
        mine = [r for r in ROWS if (r["op"], r["pass"]) == (op, passes)]
        at, ticks, names = 0.0, [], []
        for shape in dict.fromkeys(r["shape"] for r in mine):
            words = shape.split()
            ax.text(0, at, f"{words[0]} {words[2]} {words[-1]}", fontsize=8.5,
                    va="center", style="italic")  # fmt: skip
            for r in (r for r in mine if r["shape"] == shape):
                at += 1
                ax.barh(at, float(r[unit]), 0.72, color=T if r["who"] == "ours" else B)
                ticks.append(at)
                names.append(r["who"].replace("default of rows", "rows"))
            at += 1
        ax.set_yticks(ticks, names, fontsize=7.5)
        ax.tick_params(axis="y", length=0)
        ax.set_title(title, fontsize=9.5)
        ax.set_ylim(at - 0.3, -1.0)
        if op == "decode":
            ax.axvline(data.COPY / 1e9, color=style.INK, ls="--", lw=1)
else:
    fig, ax = plt.subplots(figsize=(7.2, 0.8))
    ax.set_axis_off()
    ax.text(0.5, 0.5, "not measured yet", ha="center", style="italic")
style.save(fig, "ops_attention", "Attention, ours and PyTorch's backends")
