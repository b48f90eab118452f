"""Attention against PyTorch's backends and FlexAttention, from the committed CSV."""

import matplotlib.pyplot as plt
import ops_measured as data
import style
from style import B, D, H, T, V

LOOKS = {  # who: marker, color, size, name
    "SDPA default": ("|", B, 11, "SDPA's choice"),
    "SDPA default of rows": ("x", B, 6, "SDPA, heads as rows"),
    "flex": ("^", V, 6, "FlexAttention"),
    "SDPA flash": ("s", H, 5, "SDPA flash"),
    "SDPA cudnn": ("D", D, 6, "SDPA cuDNN"),
    "ours": ("o", T, 6, "ours"),
}
PANELS = [  # operators, rate, title, limit
    (("causal", "window"), "TFLOP_per_s", "training, TFLOP/s", None),
    (("decode",), "GB_per_s", "decode, GB/s", data.COPY / 1e9),
]


def name_of(row: dict) -> str:
    """What is measured, in few words."""
    shape = dict(zip("BHTd", row["shape"].split()))
    if row["op"] == "decode":
        return f"batch {shape['B'][1:]}, d {shape['d'][1:]}"
    passes = "forward" if row["pass"] == "forward" else "and backward"
    return f"{row['op']}, d {shape['d'][1:]}, {passes}"


style.use()
fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.4), width_ratios=[1.15, 1])
for ax, (ops, rate, title, limit) in zip(axes, PANELS):
    mine = [r for r in data.OPS if r["op"].startswith(ops)]
    names = list(dict.fromkeys(map(name_of, mine)))
    for who, (mark, color, size, label) in LOOKS.items():
        found = [r for r in mine if r["who"] == who]
        at = [names.index(name_of(r)) for r in found]
        ax.plot([float(r[rate]) for r in found], at, mark, color=color, ms=size,
                label=label)  # fmt: skip
    if limit:
        ax.axvline(limit, color=style.INK, ls="--", lw=1)
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.set(title=title, xlim=(0, None), ylim=(len(names) - 0.5, -0.5))
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y")
handles, labels = axes[1].get_legend_handles_labels()
fig.legend(handles, labels, loc="outside upper center", ncols=6, fontsize=9,
           columnspacing=1.0, handletextpad=0.2)  # fmt: skip
style.save(fig, "ops_attention", "Attention, ours and PyTorch's backends")
