"""The loss of the shipped models while they were trained."""

import csv
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
COLORS = {"stories-mini": "#E69F00", "stories": "#0072B2"}


def main() -> None:
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, color in COLORS.items():
        path = ROOT / f"benchmarks/results/training_{name}.csv"
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        tokens = [int(row["tokens"]) / 1e6 for row in rows]
        loss = [float(row["mean_loss_of_25_steps"]) for row in rows]
        axes.plot(tokens, loss, color=color, linewidth=1.6, label=name)
    axes.set_ylim(1, 4)
    axes.set_xlabel("million tokens learned from")
    axes.set_ylabel("training loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    out = ROOT / "minllama/assets/curve.svg"
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main()
