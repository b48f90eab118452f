"""How near an operator is to the limit of this machine: its memory, or its products.

    python -m minllama.fast_ops.bench rms_norm [softmax …] [--dtype float32] [--small]
    python -m minllama.fast_ops.bench rms_norm --tune

Time of forward, and of forward and backward, beside the reference's; bytes per second
and their share of a large copy's, or FLOPs and their share of a large product's;
registers and spilled bytes a thread of each kernel. With --tune, times of other sizes
of its blocks; the best are kept for this GPU (see `minllama.architecture.tuning`).

On a CPU only the reference is timed, because no kernel runs there; give --small, or
wait for minutes. With TRITON_INTERPRET=1 the kernel runs in Python, and its time says
nothing about a GPU.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minllama.architecture.accounting import matmul_rate
from minllama.architecture.kernels import DTYPES, compiled, interpreting
from minllama.architecture.rope import Rope
from minllama.architecture.tuning import gpu_name, keep, tune
from minllama.fast_ops import (
    add_rms_norm,
    add_rms_norm_reference,
    cross_entropy,
    cross_entropy_reference,
    flash_attention,
    flash_attention_reference,
    flash_decode,
    flash_decode_reference,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    rms_norm,
    rms_norm_reference,
    rope,
    rope_reference,
    softmax,
    softmax_reference,
    swiglu,
    swiglu_reference,
)
from minllama.fast_ops.timing import copy_bandwidth, seconds


@dataclass
class Case:
    """An operator at one size: inputs, its work, and who computes it.

    Work is the bytes that must move, or, where a product sets the pace, the FLOPs.
    """

    op: str
    shape: str
    inputs: list[Tensor]  # those of floating dtype get gradients
    others: tuple  # arguments behind them
    fast: Callable
    reference: Callable
    forward_work: int
    both_work: int | None  # forward and backward; None: it has no backward
    unit: Literal["bytes", "FLOPs"] = "bytes"
    in_place: bool = False  # inputs[0] is written over
    captured: bool = True  # in a CUDA graph; not where it is long, or in place

    @property
    def work(self) -> dict[str, int]:
        """By pass; one that there is not, is left out."""
        both = {} if self.both_work is None else {"forward+backward": self.both_work}
        return {"forward": self.forward_work, **both}

    def runs(self, op: Callable) -> dict[str, Callable[[], object]]:
        """Forward, and forward with backward, of an implementation."""

        def forward():
            with torch.no_grad():
                return op(*self.inputs, *self.others)

        if self.both_work is None:
            return {"forward": forward}
        outputs = op(*self.fresh(), *self.others)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [torch.randn_like(y) for y in outputs]
        if outputs[0].dim() == 0:
            grads = [torch.ones_like(outputs[0])]

        def both():
            inputs = self.inputs if not self.in_place else [self.inputs[0].detach()]
            for x in inputs:
                x.requires_grad_()
            out = op(*inputs, *self.others)
            out = out if isinstance(out, tuple) else (out,)
            return torch.autograd.grad(out, inputs, grads)

        return {"forward": forward, "forward+backward": both}

    def fresh(self) -> list[Tensor]:
        """Inputs that may be written over."""
        return [x.detach().clone().requires_grad_() for x in self.inputs]


def normal(*shape: int, device: str, dtype: torch.dtype) -> Tensor:
    """Random numbers: zeros would run faster than data does."""
    return torch.randn(shape, device=device, dtype=dtype)


def _size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def rms_norm_case(rows: int, D: int, **kind) -> Case:
    """x and y; then x, dy and dx. Weights are small."""
    x, w = normal(rows, D, **kind), normal(D, **kind)
    n = _size(x)
    return Case("rms_norm", f"{rows}x{D}", [x, w], (), rms_norm, rms_norm_reference,
                2 * n, 5 * n)  # fmt: skip


def add_rms_norm_case(rows: int, D: int, **kind) -> Case:
    """x, residual, sum and y; then sum, dy, dsum and the one gradient of both."""
    x, r, w = normal(rows, D, **kind), normal(rows, D, **kind), normal(D, **kind)
    n = _size(x)
    return Case("add_rms_norm", f"{rows}x{D}", [x, r, w], (), add_rms_norm,
                add_rms_norm_reference, 4 * n, 8 * n)  # fmt: skip


def rope_case(B: int, T: int, H: int, K: int, d: int, **kind) -> Case:
    """q and k read and written; backward the same. Angles are small."""
    q, k = normal(B, T, H, d, **kind), normal(B, T, K, d, **kind)
    angles = Rope(d, 5e5)(torch.arange(T, device=q.device)[None])
    n = _size(q, k)
    return Case("rope", f"{B}x{T}x({H}+{K})x{d}", [q, k], tuple(angles), rope,
                rope_reference, 2 * n, 4 * n)  # fmt: skip


def swiglu_case(rows: int, F: int, **kind) -> Case:
    """a, b and y; then dy, a, b, da and db."""
    a, b = normal(rows, F, **kind), normal(rows, F, **kind)
    n = _size(a)
    return Case("swiglu", f"{rows}x{F}", [a, b], (), swiglu, swiglu_reference,
                3 * n, 8 * n)  # fmt: skip


def softmax_case(rows: int, N: int, **kind) -> Case:
    """x and y; then y, dy and dx."""
    x = normal(rows, N, **kind)
    n = _size(x)
    return Case("softmax", f"{rows}x{N}", [x], (), softmax, softmax_reference,
                2 * n, 5 * n)  # fmt: skip


def cross_entropy_case(rows: int, V: int, **kind) -> Case:
    """Logits read, read once more, and written over by their gradient."""
    x = 2 * normal(rows, V, **kind)
    targets = torch.randint(0, V, (rows,), device=x.device)
    n = _size(x)
    return Case("cross_entropy", f"{rows}x{V}", [x], (targets,), cross_entropy,
                cross_entropy_reference, n, 3 * n, in_place=True,
                captured=False)  # fmt: skip


def linear_cross_entropy_case(N: int, D: int, V: int, **kind) -> Case:
    """One product forward; with gradients three, of 2 N D V FLOPs each."""
    h, w = normal(N, D, **kind), normal(V, D, **kind) / D**0.5
    targets = torch.randint(0, V, (N,), device=h.device)
    n = 2 * N * D * V
    return Case("linear_cross_entropy", f"{N}x{D}x{V}", [h, w], (targets,),
                linear_cross_entropy, linear_cross_entropy_reference, n, 3 * n,
                unit="FLOPs", captured=False)  # fmt: skip


def flash_attention_case(B: int, T: int, H: int, K: int, d: int, **kind) -> Case:
    """A triangle: two products of the pairs that see each other, and five backward."""
    q, k, v = (normal(B, T, heads, d, **kind) for heads in (H, K, K))
    n = 2 * B * H * d * T * (T + 1) // 2  # FLOPs of one product
    return Case("flash_attention", f"{B}x{T}x({H}+{K})x{d}", [q, k, v], (),
                flash_attention, flash_attention_reference, 2 * n, 7 * n,
                unit="FLOPs")  # fmt: skip


def flash_decode_case(B: int, S: int, H: int, K: int, d: int, **kind) -> Case:
    """One token a row against a cache of S keys and values, each read once."""
    q, k, v = (normal(B, n, h, d, **kind) for n, h in ((1, H), (S, K), (S, K)))
    last = torch.full((B, 1), S - 1, device=q.device)
    return Case("flash_decode", f"{B}x{S}x({H}+{K})x{d}", [q, k, v], (None, last),
                flash_decode, flash_decode_reference, _size(k, v), None)  # fmt: skip


Cases = dict[str, tuple[Callable[..., Case], tuple, tuple]]  # sizes: full, small

CASES: Cases = {  # they wait for memory, and have gradients
    "rms_norm": (rms_norm_case, (16384, 4096), (64, 256)),
    "add_rms_norm": (add_rms_norm_case, (16384, 4096), (64, 256)),
    "rope": (rope_case, (8, 2048, 32, 8, 64), (1, 32, 4, 2, 16)),
    "swiglu": (swiglu_case, (16384, 8192), (64, 256)),
    "softmax": (softmax_case, (16384, 4096), (64, 256)),
    "cross_entropy": (cross_entropy_case, (8192, 128256), (32, 1000)),
}
OTHERS: Cases = {
    "linear_cross_entropy": (
        linear_cross_entropy_case, (8192, 2048, 128256), (64, 16, 200)
    ),
    "flash_attention": (
        flash_attention_case, (1, 4096, 32, 8, 64), (1, 64, 4, 2, 16)
    ),
    "flash_decode": (flash_decode_case, (8, 32768, 32, 8, 64), (2, 128, 4, 2, 16)),
}  # fmt: skip

COLUMNS = {  # by unit: rate, its share of the limit, and units in one of the rate
    "bytes": ("GB_per_s", "share_of_copy", 1e9),
    "FLOPs": ("TFLOP_per_s", "share_of_product", 1e12),
}


def measure(case: Case, op: Callable, limit: float, repeats: int = 20) -> list[dict]:
    """Rows of time, work per second and its share of the limit, of one implementation.

    Args:
        case: what is computed.
        op: who computes it: `case.fast`, `case.reference`, or a peer.
        limit: in the case's unit per second: of a copy, or of a product.
        repeats: of which the median counts.
    """
    device, rows, restore = case.inputs[0].device, [], restorer(case)
    for name, run in case.runs(op).items():
        work = case.work[name]
        time = seconds(run, device, repeats, case.captured, restore)
        rate, share, scale = COLUMNS[case.unit]
        rows.append({
            "op": case.op, "shape": case.shape, "pass": name, "us": time * 1e6,
            rate: work / time / scale, share: work / time / limit,
        })  # fmt: skip
    return rows


def restorer(case: Case) -> Callable[[], None]:
    """What brings back inputs that were written over."""
    source = case.inputs[0].detach().clone() if case.in_place else None

    def restore() -> None:
        if source is not None:
            case.inputs[0].detach().copy_(source)

    return restore


def tune_case(case: Case) -> list[dict]:
    """Times of other sizes of this operator's blocks, as `tune` has them."""
    device, restore = case.inputs[0].device, restorer(case)

    def time(run: Callable[[], object]) -> float:
        return seconds(run, device, 10, case.captured, restore)

    return tune(list(case.runs(case.fast).values()), time)


def tried(row: dict) -> dict[str, str]:
    """A row of `tune_case`, in words."""
    us = row["seconds"] * 1e6
    return {
        "kernel": " ".join(map(str, row["name"])),
        "sizes": " ".join(f"{name}={size}" for name, size in row["sizes"].items()),
        "us": f"{us:.1f}" if us < float("inf") else "does not run",
        "notes": ", ".join(note for note in ("written", "best") if row[note]),
    }


def find_limit(unit: str, device: str, dtype: torch.dtype) -> float:
    """What this machine can do, in units per second; printed."""
    if unit == "bytes":
        limit = copy_bandwidth(device)
        print(f"copy on {device}: {limit / 1e9:,.0f} GB/s read and written")
    else:
        limit = matmul_rate(device, dtype, size=8192 if device == "cuda" else 1024)
        print(f"product on {device}: {limit / 1e12:,.4g} TFLOP/s")
    return limit


def contestants(case: Case, device: str) -> dict[str, Callable]:
    """The kernel where one runs, and the reference."""
    if device == "cuda" or interpreting():
        who = "kernel" if device == "cuda" else "interpreted"
        return {who: case.fast, "reference": case.reference}
    return {"reference": case.reference}


def line(case: Case, who: str, row: dict) -> str:
    """A row of `measure`, to read."""
    rate, share, _ = COLUMNS[case.unit]
    unit, limit = rate.replace("_per_", "/"), share.replace("share_", "")
    return (
        f"{case.op} {case.shape} {who:11} {row['pass']:16} {row['us']:9.1f} us "
        f"{row[rate]:7,.4g} {unit} {row[share]:6.1%} {limit.replace('_', ' a ')}"
    )


def main() -> None:
    """Measure the operators named on the command line."""
    parser = argparse.ArgumentParser(
        description="Operators against the limit of this machine."
    )
    cases = CASES | OTHERS
    parser.add_argument("ops", nargs="+", choices=cases)
    kinds = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    parser.add_argument("--dtype", default="bfloat16", choices=kinds)
    parser.add_argument("--small", action="store_true", help="sizes for a CPU: seconds")
    parser.add_argument("--tune", action="store_true", help="try other block sizes")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    if device == "cpu" and not interpreting():
        if options.tune:
            parser.error("--tune: no kernel runs on a CPU; use a machine with a GPU")
        print("no kernel runs on a CPU: the references alone (--small takes seconds)")
    limits: dict[str, float] = {}
    for name in options.ops:
        make, full, small = cases[name]
        case = make(*(small if options.small else full), device=device, dtype=dtype)
        if options.tune:
            rows = tune_case(case)
            for row in map(tried, rows):
                print("{kernel}: {sizes:50} {us:>9} us {notes}".format(**row).rstrip())
            if gpu_name(case.inputs[0].device):
                print(f"kept in {keep(rows, gpu_name(case.inputs[0].device))}")
            continue
        if case.unit not in limits:
            limits[case.unit] = find_limit(case.unit, device, dtype)
        for who, op in contestants(case, device).items():
            for row in measure(case, op, limits[case.unit]):
                print(line(case, who, row))
    for name, kernel in compiled.items():
        if kernel is not None:  # None: interpreted
            print(f"{name}: {kernel.n_regs} registers, {kernel.n_spills} bytes spilled")


if __name__ == "__main__":
    main()
