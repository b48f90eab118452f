"""Operators on tensors of more than 2^31 numbers: an offset in 32 bits would wrap.

    python -m tests.fast_ops.gpu_check_ops

A GPU with 60 GB. Outputs and gradients of the last rows are compared with the
reference's on these rows alone. Prints a line each, and fails at the end if any failed.
"""

import sys
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

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

TAIL, LIMIT = 64, 2**-7
N = 2**31


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def compare(op: Callable, reference: Callable, big: list[Tensor], small=()) -> float:
    """Largest relative error of the last rows: outputs, and gradients of `big`."""
    tail = [x[-TAIL:].clone().requires_grad_() for x in big]  # cross_entropy overwrites
    big = [x.requires_grad_() for x in big]
    found = op(*big, *small)
    found = found if isinstance(found, tuple) else (found,)
    dy = [torch.randn_like(y) for y in found]
    got = torch.autograd.grad(found, big, dy)
    want = reference(*tail, *small)
    want = want if isinstance(want, tuple) else (want,)
    exact = torch.autograd.grad(want, tail, [d[-TAIL:] for d in dy])
    pairs = [*zip(found, want), *zip(got, exact)]
    return max(relative(a[-TAIL:], b) for a, b in pairs)


def norm() -> float:
    w = randn(4096)
    rows = N // 4096 + 100
    return compare(rms_norm, rms_norm_reference, [randn(rows, 4096)], (w,))


def add_norm() -> float:
    w, rows = randn(4096), N // 4096 + 100
    big = [randn(rows, 4096), randn(rows, 4096)]
    return compare(add_rms_norm, add_rms_norm_reference, big, (w,))


def gate() -> float:
    rows = N // 8192 + 100
    return compare(swiglu, swiglu_reference, [randn(rows, 8192), randn(rows, 8192)])


def short_rows() -> float:
    return compare(softmax, softmax_reference, [randn(N // 4096 + 100, 4096)])


def long_rows() -> float:
    return compare(softmax, softmax_reference, [randn(N // 40000 + 100, 40000)])


def turn() -> float:
    """The batch is long and the rows short, so that the last ones are their own."""
    T, H, K, d = 64, 32, 8, 64
    B = N // (T * H * d) + 100
    angles = Rope(d, 5e5)(torch.arange(T, device="cuda")[None])
    big = [randn(B, T, H, d), randn(B, T, K, d)]
    return compare(rope, rope_reference, big, tuple(angles))


def losses() -> float:
    """Of a sum, so that a row's gradient is its own."""
    V = 128256
    rows = N // V + 100
    x, targets = randn(rows, V), torch.randint(0, V, (rows,), device="cuda")
    tail = x[-TAIL:].clone().requires_grad_()
    loss = cross_entropy(x.requires_grad_(), targets, reduction="sum")
    (got,) = torch.autograd.grad(loss, x)
    want = cross_entropy_reference(tail, targets[-TAIL:], reduction="sum")
    (exact,) = torch.autograd.grad(want, tail)
    return relative(got[-TAIL:], exact)


def main() -> None:
    failed = 0
    for check in (norm, add_norm, gate, short_rows, long_rows, turn, losses):
        torch.manual_seed(0)
        try:
            error = check()
            good = error < LIMIT
            print(f"{check.__name__}: {error:.1e}{'' if good else '  TOO LARGE'}")
        except Exception:
            traceback.print_exc()
            good = False
        failed += not good
        torch.cuda.empty_cache()
    sys.exit(failed)


if __name__ == "__main__":
    main()
