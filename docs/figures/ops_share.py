"""Each operator's share of a copy's bandwidth, ours and the peers', from the CSV."""

import matplotlib.pyplot as plt
import ops_measured as data
import style
from style import ACCENT, B, D, H, T

LOOKS = {"ours": ("o", T), "liger": ("D", D), "compile": ("s", H), "eager": ("|", B)}
OPS = [r for r in data.OPS if r["share_of_copy"] and r["op"] != "decode"]
CASES = list(dict.fromkeys((r["op"], r["shape"]) for r in OPS))


def short(shape: str) -> str:
    return shape.replace("x(32+8)x", "×40×").replace("x", "×")


style.use()
fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.6), sharey=True)
for ax, passes in zip(axes, ("forward", data.BOTH)):
    best: dict[int, tuple[float, str]] = {}
    for who, (mark, color) in LOOKS.items():
        for r in OPS:
            if (r["who"], r["pass"]) != (who, passes):
                continue
            at, share = (
                CASES.index((r["op"], r["shape"])),
                float(r["share_of_copy"][:-1]),
            )
            ax.plot(share, at, mark, color=color, ms=6, alpha=0.9, zorder=3)
            best[at] = max(best.get(at, (0.0, "")), (share, who))
    for at, (share, who) in best.items():
        color = style.INK if who == "ours" else ACCENT
        ax.text(109, at, f"{share:.0f}", color=color, va="center", fontsize=9.5)
    ax.axvline(100, color=style.INK, ls="--", lw=1)
    ax.set(
        title=passes.replace("+", " and "), xlim=(0, 122), xlabel="% of a copy's rate"
    )
    ax.grid(axis="y")
names = [f"{op}  {short(shape)}" for op, shape in CASES]
axes[0].set_yticks(range(len(CASES)), names, fontsize=8.5)
axes[0].invert_yaxis()
for who, (mark, color) in LOOKS.items():
    if any(r["who"] == who for r in OPS):
        axes[0].plot([], [], mark, color=color, label=who)
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
style.save(fig, "ops_share", "Bytes a second as a share of a copy's, by operator")
