"""How much of a full fine-tune's change lies in its first directions."""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
import style
from style import ACCENT, B, D, H, T, V

CSV = Path(__file__).parents[2] / "benchmarks/results/peft_spectrum.csv"
with CSV.open() as file:
    rows = list(csv.DictReader(file))
KINDS = {"embed_tokens": V, "q_proj": T, "v_proj": H, "up_proj": D, "down_proj": ACCENT}
RANKS = [1, 2, 4, 8, 16, 32]


def mean(kind: str, what: str, r: int) -> float:
    found = [float(row[f"{what}_{r}"]) for row in rows if row["kind"] == kind]
    return sum(found) / len(found)


style.use()
fig, ax = plt.subplots(figsize=(7.2, 2.7))
for kind, color in KINDS.items():
    shares = [mean(kind, "first", r) for r in RANKS]
    ax.plot(RANKS, shares, "o-", ms=3.5, color=color, label=kind)
noise = [mean("q_proj", "random", r) for r in RANKS]
ax.plot(RANKS, noise, "--", color=B, label="random, 128 x 128")
ax.set(xscale="log", xticks=RANKS, xticklabels=RANKS, ylim=(0, 1))
ax.set(xlabel="first directions, r", ylabel="share of the change")
ax.minorticks_off()
ax.legend(loc="upper left", ncols=2)
style.save(
    fig, "peft_spectrum", "Share of the squared change in the first r directions"
)
