"""How much of a full fine-tune's change lies in its first directions.

Dashed, in the same color: of random numbers in the same shape.
"""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
import style
from style import ACCENT, D, H, T, V

CSV = Path(__file__).parents[2] / "benchmarks/results/peft_spectrum.csv"
with CSV.open() as file:
    rows = list(csv.DictReader(file))
KINDS = {"embed_tokens": V, "q_proj": T, "v_proj": H, "up_proj": D, "down_proj": ACCENT}
RANKS = [1, 2, 4, 8, 16, 32]


def mean(kind: str, what: str, r: int) -> float:
    found = [float(row[f"{what}_{r}"]) for row in rows if row["kind"] == kind]
    return sum(found) / len(found)


style.use()
fig, ax = plt.subplots(figsize=(7.2, 3.2))
for kind, color in KINDS.items():
    shape = next(row["shape"] for row in rows if row["kind"] == kind)
    shares, noise = (
        [mean(kind, what, r) for r in RANKS] for what in ("first", "random")
    )
    ax.plot(RANKS, shares, "o-", ms=3.5, color=color, label=f"{kind}, {shape}")
    ax.plot(RANKS, noise, "--", lw=1.2, color=color)
ax.set(xscale="log", xticks=RANKS, xticklabels=RANKS, ylim=(0, 1))
ax.set(xlabel="first directions, r", ylabel="share of the change")
ax.minorticks_off()
ax.legend(loc="upper left", fontsize=9.5)
style.save(
    fig, "peft_spectrum", "Share of the squared change in the first r directions"
)
