"""Where numbers come from: one CSV a benchmark, each row with machine and versions."""

import csv
import os
import platform
import subprocess
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def machine(device: str) -> str:
    """The processor that did the work."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cores = f"{torch.get_num_threads()} threads"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            line.split(":")[1] for line in lines if line.startswith("model name")
        )
        return f"{name.strip()}, {cores}"
    except (OSError, StopIteration):
        return f"{platform.processor() or platform.machine()}, {cores}"


def commit() -> str:
    """The commit that was measured (COMMIT says it where there is no git)."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent)
    return done.stdout.strip() or "unknown"


def write(name: str, rows: list[dict], device: str, folder: Path = RESULTS) -> Path:
    """Write `name`.csv: the rows, with machine, torch and commit in each."""
    tail = {"machine": machine(device), "torch": torch.__version__, "commit": commit()}
    rows = [{**row, **tail} for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)
    return path


def table(rows: list[dict]) -> str:
    """Rows as aligned columns, for a person to read."""
    keys = list(rows[0])
    cells = [keys, *([str(row[key]) for key in keys] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths))
        for line in cells
    )
