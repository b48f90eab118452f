"""What the pictures of chapter 8 read: rows of the benchmarks; what is in a step."""

import csv
from pathlib import Path

from minllama.architecture.accounting import PEAK_FLOPS

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
BOTH = "forward+backward"
STEP = [  # operator, its shape for 16,384 tokens of Llama 3.2 1B, how often in a step
    ("rms_norm", "16384x2048", 17),
    ("add_rms_norm", "16384x2048", 16),
    ("rope", "8x2048x(32+8)x64", 16),
    ("swiglu", "16384x8192", 16),
    ("cross_entropy", "8192x128256", 2),
]


def rows(name: str) -> list[dict]:
    """All rows of a CSV."""
    with (RESULTS / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


OPS = rows("fast_ops_cuda")
MACHINE = OPS[0]["machine"]
COPY = 1e9 * float(OPS[0]["copy_GB_per_s"])  # bytes/s
LINEAR = [r for r in OPS if r["op"] == "linear_cross_entropy"]
HEAD = 1e12 * max(  # FLOP/s: products of the head of 1B, with its loss
    float(r["TFLOP_per_s"]) for r in LINEAR if r["shape"] == "8192x2048x128256"
)
SHEET = next(rate for key, rate in PEAK_FLOPS.items() if key in MACHINE)  # FLOP/s


def microseconds(op: str, who: str, shape: str, passes: str = BOTH) -> float:
    """Time of one row."""
    key = (op, who, shape, passes)
    names = ("op", "who", "shape", "pass")
    return next(float(r["us"]) for r in OPS if tuple(r[n] for n in names) == key)
