"""What is learned and forgotten on the pirate tales, on two models, from the CSVs."""

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import style
from style import ACCENT, B, D, H, T, V

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.bench_peft_pirate import at_full_strength, changes, choose

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
MODELS = {"peft_pirate_stories": "stories, 6.8M", "peft_pirate": "stories-mini, 0.95M"}
LOOKS = {
    "full": ("o", B), "lora, upper half": ("s", T), "lora, all-linear": ("D", T),
    "lora, attention": ("^", T), "lora, mlp": ("v", T), "lora, q v": ("<", T),
    "lora, dropout 0.1": (">", T), "lora, r = 1": ("1", T), "lora, r = 32": ("p", V),
    "dora": ("P", D), "pissa": ("X", D), "ia3": ("h", H), "norms": ("*", ACCENT),
    "prefix": ("d", H), "prompt": ("8", H), "llama-adapter": ("x", H),
}  # fmt: skip
CURVES = ("full", "lora, upper half")  # all their rates and steps, not the best alone


def nats(rows: list[dict], before: dict) -> tuple[list, list]:
    """Learned and forgotten, a number a row."""
    return list(-changes(rows, before, "style")), list(changes(rows, before, "own"))


style.use()
fig, panels = plt.subplots(1, 2, figsize=(7.2, 3.7), sharey=True)
for ax, (name, title) in zip(panels, MODELS.items()):
    with (RESULTS / f"{name}.csv").open() as file:
        before, *rows = csv.DictReader(file)
    for method, (mark, color) in LOOKS.items():
        mine = at_full_strength(rows, method)
        if not mine:
            continue
        if method in CURVES:
            ax.plot(*nats(mine, before), ".", ms=3.5, color=color, alpha=0.6)
        best = [
            r for r in mine if (float(r["lr"]), int(r["steps"])) == choose(rows, method)
        ]
        ax.plot(*nats(best, before), mark, ms=6, color=color, alpha=0.85, label=method)
    ax.set(title=title, xlim=(0, None), ylim=(0, 1.05), xlabel="learned, nats a token")
panels[0].set(ylabel="forgotten, nats a token")
handles, labels = panels[1].get_legend_handles_labels()
fig.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9,
           handletextpad=0.2, columnspacing=1.0)  # fmt: skip
style.save(fig, "peft_pirate", "Nats learned against nats forgotten, by method")
