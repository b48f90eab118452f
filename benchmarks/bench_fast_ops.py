"""Operators, ours against PyTorch's and Liger's: same tensors, same work, same run.

    python benchmarks/bench_fast_ops.py [--smoke] [--no-attention] [--out DIR]

The limit is a 4 GiB copy in the same run. Bytes are those that must move (see
`minllama.fast_ops.bench`), so a share above what is possible would be an error of ours.
Operators are replayed from CUDA graphs after a flush of the cache; the two losses are
timed as they are, because they restore what they overwrite, or are long. The peers are
the reference, eager and through `torch.compile`, and Liger-Kernel where installed.

Prediction. All but the linear loss wait on memory: 90 % of the copy, less where a
kernel of 40 us pays 3 us of start. The linear loss is three matrix products of 4.3
TFLOP at 670 TFLOP/s, 19.3 ms, and a pass over 2 GB of logits and back, 1.7 ms.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import record
from minllama.fast_ops import bench, linear_cross_entropy
from minllama.fast_ops.bench import Case
from minllama.fast_ops.linear_cross_entropy import linear_cross_entropy_reference
from minllama.fast_ops.timing import copy_bandwidth, peak_memory, seconds

FULL = [
    (bench.rms_norm_case, (16384, 2048)),
    (bench.rms_norm_case, (16384, 4096)),
    (bench.add_rms_norm_case, (16384, 2048)),
    (bench.add_rms_norm_case, (16384, 4096)),
    (bench.rope_case, (8, 2048, 32, 8, 64)),
    (bench.rope_case, (2, 4096, 32, 8, 128)),
    (bench.swiglu_case, (16384, 8192)),
    (bench.softmax_case, (16384, 4096)),
    (bench.softmax_case, (8192, 32768)),
    (bench.cross_entropy_case, (8192, 128256)),
]
SMALL = [(make, small) for make, _, small in bench.CASES.values()]
LINEAR = [(8192, 2048, 128256), (8192, 4096, 128256)]


def liger(op: str) -> Callable | None:
    """Liger-Kernel's operator of the same meaning, or None."""
    if find_spec("liger_kernel") is None or not torch.cuda.is_available():
        return None
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.softmax import LigerSoftmaxFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    @functools.cache  # called before what is timed
    def angles(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        sin = torch.cat([sin.chunk(2, dim=-1)[1]] * 2, dim=-1)  # no sign inside
        return cos[:, :, 0].to(dtype), sin[:, :, 0].to(dtype)

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor):
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        return LigerRopeFunction.apply(q, k, *angles(cos, sin, q.dtype))

    def cross_entropy(logits: Tensor, targets: Tensor):
        return LigerCrossEntropyFunction.apply(logits, targets, None)[0]

    return {
        "rms_norm": lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-5),
        "rope": rope,
        "swiglu": LigerSiLUMulFunction.apply,
        "softmax": LigerSoftmaxFunction.apply,
        "cross_entropy": cross_entropy,
    }.get(op)


def contestants(case: Case, device: str, peers: list[str]) -> dict[str, Callable]:
    """Name to implementation, ours first."""
    found = {"ours": case.fast}
    if "eager" in peers:
        found["eager"] = case.reference
    if "compile" in peers and device == "cuda":
        torch.compiler.reset()
        found["compile"] = torch.compile(case.reference, dynamic=False)
    peer = liger(case.op) if "liger" in peers else None
    return found if peer is None else {**found, "liger": peer}


def case_rows(
    case: Case, device: str, limit: float, repeats: int, peers: list[str]
) -> Iterator[dict]:
    """A row per implementation and pass."""
    for who, op in contestants(case, device, peers).items():
        try:
            rows = bench.measure(case, op, limit, repeats)
        except Exception as error:  # a peer that fails is a row that says so
            if who == "ours":
                raise
            print(f"{who} {case.op}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        for row in rows:
            yield {
                "op": case.op, "who": who, "shape": case.shape, "pass": row["pass"],
                "us": f"{row['us']:.1f}", "GB_per_s": f"{row['GB_per_s']:.0f}",
                "share_of_copy": f"{row['share_of_copy']:.1%}",
            }  # fmt: skip


def exact_gradients(h: Tensor, w: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the mean loss, in float64, without a graph."""
    p = (h.double() @ w.double().T).softmax(-1)
    p[torch.arange(len(p), device=p.device), targets] -= 1
    p /= len(p)
    return p @ w.double(), p.T @ h.double()


def linear_losses(device: str, peers: list[str]) -> dict[str, Callable]:
    """The linear loss in our settings, and the peers'."""
    losses: dict[str, Callable] = {
        "ours": linear_cross_entropy,
        "ours: float32 sums": lambda *x: linear_cross_entropy(
            *x, accumulate=torch.float32
        ),
        "ours: 80 MiB chunks": lambda *x: linear_cross_entropy(
            *x, chunk_bytes=80 * 2**20
        ),
    }
    if "eager" in peers:
        losses["eager"] = linear_cross_entropy_reference
    if "compile" in peers and device == "cuda":
        torch.compiler.reset()
        losses["compile"] = torch.compile(linear_cross_entropy_reference)
    if "liger" in peers and device == "cuda" and find_spec("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction as Liger,
        )

        losses["liger"] = lambda h, w, t: Liger.apply(h, w, t)[0]
    return losses


def linear_rows(
    N: int, D: int, V: int, device: str, dtype: torch.dtype, repeats: int,
    peers: list[str],
) -> Iterator[dict]:  # fmt: skip
    """The head and its loss, forward and backward: time, memory, error of gradients."""
    h = torch.randn(N, D, device=device, dtype=dtype).requires_grad_()
    w = (torch.randn(V, D, device=device) / D**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), device=device)
    exact = exact_gradients(h.detach(), w.detach(), targets)
    losses = linear_losses(device, peers)
    for who, loss in losses.items():

        def run(loss=loss):
            return torch.autograd.grad(loss(h, w, targets), (h, w))

        time = seconds(run, device, repeats, capture=False)
        memory = f"{peak_memory(run) / 2**30:.3f}" if device == "cuda" else ""
        wrong = [
            float((x.double() - y).norm() / y.norm()) for x, y in zip(run(), exact)
        ]
        yield {
            "op": "linear_cross_entropy", "who": who, "shape": f"{N}x{D}x{V}",
            "pass": "forward+backward", "us": f"{time * 1e6:.1f}",
            "TFLOP_per_s": f"{6 * N * D * V / time / 1e12:.1f}", "peak_GiB": memory,
            "error": "/".join(f"{x:.1e}" for x in wrong),
        }  # fmt: skip


def attention(device: str, smoke: bool, repeats: int) -> list[dict]:
    """Rows of flash attention and flash decoding, from their own file."""
    from benchmarks.fast_attention_cases import attention_rows

    return attention_rows(device, peers=not smoke, smoke=smoke, repeats=repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="seconds, writes nothing")
    parser.add_argument("--no-attention", action="store_true")
    parser.add_argument("--peers", nargs="*", default=["eager", "compile", "liger"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", default=str(record.RESULTS))
    options = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = options.smoke or device == "cpu"
    repeats = 2 if small else options.repeats
    dtype = torch.float32 if small else torch.bfloat16
    limit = copy_bandwidth(device, 3 if small else 10)
    print(f"copy: {limit / 1e9:,.0f} GB/s read and written")
    rows: list[dict] = []
    for make, sizes in SMALL if small else FULL:
        case = make(*sizes, device=device, dtype=dtype)
        rows += case_rows(case, device, limit, repeats, options.peers)
        del case
    for sizes in [(64, 16, 200)] if small else LINEAR:
        rows += linear_rows(*sizes, device, dtype, min(repeats, 7), options.peers)
    if not options.no_attention:
        rows += attention(device, small, repeats)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    name = str(dtype).removeprefix("torch.")
    common = {"dtype": name, "copy_GB_per_s": f"{limit / 1e9:.0f}"}
    rows = [{key: row.get(key, "") for key in keys} | common for row in rows]
    print(record.table(rows))
    if not options.smoke:
        path = record.write(f"fast_ops_{device}", rows, device, Path(options.out))
        print(f"written to {path.name}")


if __name__ == "__main__":
    main()
