"""How near an operator is to the limit of this machine's memory.

    python -m minllama.fast_ops.bench rms_norm [softmax …] [--dtype float32] [--small]

Time of forward, and of forward and backward, beside the reference's; bytes per second
and their share of a large copy's; registers and spilled bytes a thread of each kernel.
On a CPU without TRITON_INTERPRET=1 operators are their references.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minllama.architecture.kernels import compiled
from minllama.architecture.rope import Rope
from minllama.fast_ops import (
    add_rms_norm,
    add_rms_norm_reference,
    cross_entropy,
    cross_entropy_reference,
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
    """An operator at one size: inputs, what must move, and who computes it."""

    op: str
    shape: str
    inputs: list[Tensor]  # those of floating dtype get gradients
    others: tuple  # arguments behind them
    fast: Callable
    reference: Callable
    forward_bytes: int
    both_bytes: int  # forward and backward
    in_place: bool = False  # inputs[0] is written over

    def runs(self, op: Callable) -> dict[str, Callable[[], object]]:
        """Forward, and forward with backward, of an implementation."""

        def forward():
            with torch.no_grad():
                return op(*self.inputs, *self.others)

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
                cross_entropy_reference, n, 3 * n, in_place=True)  # fmt: skip


CASES: dict[str, tuple[Callable[..., Case], tuple, tuple]] = {  # sizes: full, small
    "rms_norm": (rms_norm_case, (16384, 4096), (64, 256)),
    "add_rms_norm": (add_rms_norm_case, (16384, 4096), (64, 256)),
    "rope": (rope_case, (8, 2048, 32, 8, 64), (1, 32, 4, 2, 16)),
    "swiglu": (swiglu_case, (16384, 8192), (64, 256)),
    "softmax": (softmax_case, (16384, 4096), (64, 256)),
    "cross_entropy": (cross_entropy_case, (8192, 128256), (32, 1000)),
}


def measure(case: Case, op: Callable, limit: float, repeats: int = 20) -> list[dict]:
    """Rows of time, bytes per second and share of the limit, of one implementation."""
    device, rows = case.inputs[0].device, []
    source = case.inputs[0].detach().clone() if case.in_place else None

    def restore() -> None:
        if source is not None:
            case.inputs[0].detach().copy_(source)

    for name, run in case.runs(op).items():
        moved = case.forward_bytes if name == "forward" else case.both_bytes
        time = seconds(run, device, repeats, not case.in_place, restore)
        rows.append({
            "op": case.op, "shape": case.shape, "pass": name, "us": time * 1e6,
            "GB_per_s": moved / time / 1e9, "share_of_copy": moved / time / limit,
        })  # fmt: skip
    return rows


def main() -> None:
    """Measure the operators named on the command line."""
    parser = argparse.ArgumentParser(
        description="Operators against the limit of memory."
    )
    parser.add_argument("ops", nargs="+", choices=CASES)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = {"device": device, "dtype": getattr(torch, options.dtype)}
    limit = copy_bandwidth(device)
    print(f"copy on {device}: {limit / 1e9:,.0f} GB/s read and written")
    for name in options.ops:
        make, full, small = CASES[name]
        case = make(*(small if options.small else full), **kind)
        for who, op in (("kernel", case.fast), ("reference", case.reference)):
            for row in measure(case, op, limit):
                print(
                    f"{name} {case.shape} {who:9} {row['pass']:16} {row['us']:9.1f} us "
                    f"{row['GB_per_s']:7,.0f} GB/s {row['share_of_copy']:6.1%} of copy"
                )
    for name, kernel in compiled.items():
        if kernel is not None:  # None: interpreted
            print(f"{name}: {kernel.n_regs} registers, {kernel.n_spills} bytes spilled")


if __name__ == "__main__":
    main()
