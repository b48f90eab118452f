"""Block sizes of chapter 8's kernels: those written, and their neighbours, in time.

    python benchmarks/bench_fast_tune.py [--smoke] [--out DIR]

What `python -m minllama.fast_ops.bench <operator> --tune` does, for all operators with
kernels of their own, and without keeping what it finds. Prediction: the sizes written
beside the kernels were found on an H200, so there no neighbour is 2 % faster.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import record
from minllama.architecture.kernels import HAS_TRITON, interpreting
from minllama.fast_ops import bench

CASES = {**bench.CASES, **bench.OTHERS}
del CASES["linear_cross_entropy"]  # products of PyTorch, and the kernel of another


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--smoke", action="store_true", help="one small, writes nothing"
    )
    parser.add_argument("--out", default=str(record.RESULTS))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not HAS_TRITON or (device == "cpu" and not interpreting()):
        print("no kernel runs here: nothing to tune")
        return
    rows = []
    for op, (make, full, small) in list(CASES.items())[: 1 if options.smoke else None]:
        kind = {"device": device, "dtype": torch.bfloat16}
        case = make(*(small if options.smoke else full), **kind)
        found = bench.tune_case(case)
        rows += [{"op": op, "shape": case.shape, **bench.tried(row)} for row in found]
    print(record.table(rows))
    if not options.smoke:
        path = record.write(f"fast_tune_{device}", rows, device, Path(options.out))
        print(f"written to {path.name}")


if __name__ == "__main__":
    main()
