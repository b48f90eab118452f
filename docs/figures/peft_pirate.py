"""What each method learned and forgot on the pirate tales, from the CSV."""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
import style
from style import ACCENT, B, D, H, T, V

CSV = Path(__file__).parents[2] / "benchmarks/results/peft_pirate.csv"
with CSV.open() as file:
    rows = [row for row in csv.DictReader(file) if row["part"] in ("final", "half")]
COLORS = {"full": B, "lora": T, "dora": D, "pissa": V, "ia3": H, "norms": ACCENT}
MARKS = "osD^vP*X<>ph"


def nats(row: dict) -> tuple[float, float]:
    """Learned and forgotten."""
    manner, own = (
        float(row[f"{text}_before"]) - float(row[f"{text}_after"])
        for text in ("style", "own")
    )
    return manner, -own


style.use()
fig, ax = plt.subplots(figsize=(7.2, 3.4))
for at, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
    color = COLORS.get(method.split()[0], style.INK)
    for part in ("final", "half"):
        mine = [r for r in rows if (r["method"], r["part"]) == (method, part)]
        if not mine:
            continue
        x, y = zip(*map(nats, mine))
        share = float(mine[0]["share"].rstrip("%"))
        label = f"{method}: {share:.3g} %" if share < 99 else method
        ax.plot(x, y, MARKS[at], ms=6, color=color, alpha=0.85,
                mfc=color if part == "final" else "none",
                label=label if part == "final" else None)  # fmt: skip
ax.plot([], [], "o", mfc="none", color=style.INK, label="hollow: half strength")
ax.set(xlabel="learned, nats a token of pirate tales", ylim=(0, None))
ax.set(ylabel="forgotten, nats a token of own stories")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9.5, handlelength=1)
style.save(fig, "peft_pirate", "Nats learned against nats forgotten, by method")
