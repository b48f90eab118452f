"""What the pictures of chapter 8 read: rows of the benchmarks; what is in a step."""

import csv
from pathlib import Path

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
    """All rows of a CSV; none if it was not measured yet."""
    path = RESULTS / f"{name}.csv"
    return list(csv.DictReader(path.open())) if path.exists() else []


def attention() -> list[dict]:
    """Rows of attention, from whichever benchmark wrote them."""
    found = [*rows("fast_attention_cuda"), *rows("fast_ops_cuda")]
    return [r for r in found if r["op"].startswith(("causal", "window", "decode"))]


OPS = rows("fast_ops_cuda")
MACHINE = OPS[0]["machine"]
COPY = 1e9 * float(OPS[0]["copy_GB_per_s"])  # bytes/s
LINEAR = [r for r in OPS if r["op"] == "linear_cross_entropy"]
HEAD = max(float(r["TFLOP_per_s"]) for r in LINEAR) * 1e12  # FLOP/s: products and loss


def microseconds(op: str, who: str, shape: str, passes: str = BOTH) -> float:
    """Time of one row."""
    key = (op, who, shape, passes)
    names = ("op", "who", "shape", "pass")
    return next(float(r["us"]) for r in OPS if tuple(r[n] for n in names) == key)
