"""Teach a tiny model to talk like a pirate: what is learned, and what is forgotten?

    python benchmarks/bench_peft_pirate.py [--model stories] [--only METHOD …]
        [--device cuda] [--workers 8] [--valid FILE]

Each method trains on pirate.txt at each of its learning rates, for 8, 15, 30 and 60
steps: runs of their own, each with its whole schedule. Every fifth tale is kept out of
training, the *slice*. A run is scored in nats per token on

    slice     the tales kept out: they choose rate and steps, for all methods alike
    style     pirate_heldout.txt: what was to be learned; it has no say in any choice
    stories   stories_en_heldout.txt: plain stories by the hands that wrote the tales
    own       stories that the model itself told before training: what rises here is its
              distance from what it was, KL(before | after) per token
    valid     with --valid, a file of the model's own training kind (TinyStories)

and once more at half strength, if the method has a dial: half of what an adapter adds;
of full fine-tuning, the mean of the models before and after.

One seed tries all rates and steps, and its slice chooses; two more repeat what was
chosen. Writes peft_pirate.csv, a row for each score, and peft_spectrum.csv (the share
of a full fine-tune's change of each weight that lies in its first r directions). Runs
that the table has are not run again; delete the file to begin anew.
"""

import argparse
import csv
import sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import record
from benchmarks.pirate import METHODS, SEEDS, SMOKE, STEPS, Bench, Job, read_texts
from minllama import MinimalLlama


def choose(rows: list[dict], method: str) -> tuple[float, int]:
    """The rate and the steps of a method whose slice lost least, by the first seed."""
    mine = [r for r in at_full_strength(rows, method) if int(r["seed"]) == SEEDS[0]]
    best = min(mine, key=lambda row: float(row["slice"]))
    return float(best["lr"]), int(best["steps"])


def at_full_strength(rows: list[dict], method: str) -> list[dict]:
    return [r for r in rows if r["method"] == method and float(r["strength"]) == 1]


def changes(rows: list[dict], before: dict, text: str) -> np.ndarray:
    """What the loss of a text changed by, for each row."""
    return np.array([float(row[text]) - float(before[text]) for row in rows])


def forgotten_at(rows: list[dict], before: dict, nats: float) -> float:
    """Nats of own stories lost where just so much style was learned, of one seed.

    Between neighbouring rates the line is straight, from the model before on; of the
    numbers of steps, the one that forgets least. Not a number if none learns so much,
    or if none was tried at three rates.
    """
    found = []
    for steps in {int(row["steps"]) for row in rows}:
        curve = [row for row in rows if int(row["steps"]) == steps]
        curve.sort(key=lambda row: float(row["lr"]))
        learned = np.array([0.0, *-changes(curve, before, "style")])
        lost = np.array([0.0, *changes(curve, before, "own")])
        enough = np.flatnonzero(learned >= nats)
        if len(curve) > 2 and len(enough):
            pair = slice(enough[0] - 1, enough[0] + 1)
            found.append(float(np.interp(nats, learned[pair], lost[pair])))
    return min(found, default=float("nan"))


def summary(rows: list[dict], nats: float) -> list[dict]:
    """Means (spreads) over the seeds at the chosen rate and steps; and at equals."""
    before, told = rows[0], []
    for method in dict.fromkeys(row["method"] for row in rows[1:]):
        mine, (lr, steps) = at_full_strength(rows, method), choose(rows, method)
        best = [r for r in mine if (float(r["lr"]), int(r["steps"])) == (lr, steps)]
        line = {"method": method, "share": best[0]["share"], "lr": lr, "steps": steps}
        for text in ("style", "stories", "own", "valid"):
            if text in before:
                change = changes(best, before, text)
                line[text] = f"{change.mean():+.3f} ({np.ptp(change):.3f})"
        first = [row for row in mine if int(row["seed"]) == SEEDS[0]]
        line[f"own at {nats}"] = f"{forgotten_at(first, before, nats):+.3f}"
        told.append(line)
    return told


def spectrum(before: MinimalLlama, after: MinimalLlama) -> list[dict]:
    """Share of |dW|^2 in the first r directions, per weight; and of a random matrix."""
    rows, old = [], dict(before.named_parameters())
    for name, weight in after.named_parameters():
        if weight.dim() < 2:
            continue
        change = (weight - old[name]).detach().double().cpu()
        random = torch.randn(
            change.shape, dtype=torch.double, generator=torch.Generator().manual_seed(0)
        )
        energy, noise = (energy_shares(x) for x in (change, random))
        rank = int((energy < 0.9).sum()) + 1
        row = {
            "weight": name,
            "kind": name.split(".")[-2],
            "shape": "x".join(map(str, change.shape)),
            "change": f"{change.norm() / old[name].double().norm().item():.4f}",
            "rank_of_90_percent": rank,
        }
        for r in (1, 2, 4, 8, 16, 32):
            at = min(r, len(energy)) - 1
            row[f"first_{r}"] = f"{energy[at]:.4f}"
            row[f"random_{r}"] = f"{noise[at]:.4f}"
        rows.append(row)
    return rows


def energy_shares(matrix: torch.Tensor) -> torch.Tensor:
    """Cumulative share of the squared singular values. (m, n) -> (min(m, n),)"""
    squares = torch.linalg.svdvals(matrix).square()
    return squares.cumsum(0) / squares.sum()


# ------------------------------------------------------------------ the whole of it

BENCH: Bench  # of this process


def prepare(*arguments) -> None:
    """Every process has a base and texts of its own."""
    global BENCH
    torch.set_num_threads(1)
    BENCH = Bench(*arguments)


def work(job: Job) -> list[dict]:
    return BENCH.run(job)


def read_table(path: Path) -> list[dict]:
    """The rows that were written before, if any."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, rows: list[dict]) -> None:
    """Whole or not at all; each row names the machine that made it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


def run_all(pool, jobs: list[Job], rows: list[dict], path: Path | None) -> list[dict]:
    """The rows, and those of the jobs that are not among them."""
    done = {
        (r["method"], float(r["lr"]), int(r["steps"]), int(r["seed"])) for r in rows
    }
    for found in pool.imap_unordered(work, [job for job in jobs if job not in done]):
        rows = [*rows, *found]
        if path:
            write_table(path, rows)
    return rows


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="stories-mini")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--workers", type=int, default=1, help="processes at a time")
    add("--valid", help="a TinyStories file: its first 60 are scored")
    add("--only", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    add("--rates", nargs="+", type=float, help="instead of each method's own")
    add("--steps", nargs="+", type=int, default=STEPS)
    add("--sweep-seeds", type=int, default=1, help="seeds that try all rates and steps")
    add("--out", type=Path, default=record.RESULTS, help="folder")
    add("--smoke", action="store_true", help="seconds, writes nothing")
    return parser.parse_args()


def main() -> None:
    asked = options()
    tail = "" if asked.model == "stories-mini" else f"_{asked.model}"
    path = None if asked.smoke else asked.out / f"peft_pirate{tail}.csv"
    grid = (
        SMOKE if asked.smoke else {m: asked.rates or METHODS[m][1] for m in asked.only}
    )
    steps, seeds = ([3], SEEDS[:1]) if asked.smoke else (asked.steps, SEEDS)
    arguments = asked.model, asked.device, read_texts(asked.model, asked.valid)
    prepare(*arguments)
    rows = read_table(path) if path else []
    rows = rows or [BENCH.row(BENCH.base, ("before", 0.0, 0, 0), 0.0)]
    sweep = [
        (method, lr, count, seed)
        for method in grid
        for seed in SEEDS[: asked.sweep_seeds]
        for lr in grid[method]
        for count in steps
    ]
    with get_context("spawn").Pool(asked.workers, prepare, arguments) as pool:
        rows = run_all(pool, sweep, rows, path)
        best = [(m, *choose(rows, m), seed) for m in grid for seed in seeds]
        rows = run_all(pool, best, rows, path)
    print("change of the loss, nats a token: mean over the seeds (spread)")
    print(record.table(summary(rows, 0.4)))
    if "full" in asked.only and not asked.smoke:
        full, _ = BENCH.learn(("full", *choose(rows, "full"), SEEDS[0]))
        shares = spectrum(BENCH.base, full)
        record.write(f"peft_spectrum{tail}", shares, asked.device, asked.out)


if __name__ == "__main__":
    main()
