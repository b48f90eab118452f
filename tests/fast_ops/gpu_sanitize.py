"""Each kernel once or twice at odd shapes, for a checker of memory accesses.

    python -m tests.fast_ops.gpu_sanitize                      # compiles the kernels
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 \\
        compute-sanitizer --error-exitcode 9 python -m tests.fast_ops.gpu_sanitize

Without PyTorch's cache of memory each tensor is an allocation of its own, so a read or
write beside it is an error. (No `--tool racecheck`: it takes minutes a kernel.)
"""

from collections import Counter

import torch
from torch import Tensor

from minllama.architecture.kernels import launches
from minllama.architecture.rope import Rope
from minllama.fast_ops import (
    add_rms_norm,
    cross_entropy,
    flash_attention,
    flash_decode,
    linear_cross_entropy,
    rms_norm,
    rope,
    softmax,
    swiglu,
)
from minllama.fast_ops.flash_attention_1 import flash_attention_1
from minllama.peft.rows_kernel import rows_down, rows_up


def randn(*shape: int) -> Tensor:
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    return x.requires_grad_()


def backward(*outputs: Tensor) -> None:
    sum(y.float().square().sum() for y in outputs).backward()


def elementwise() -> None:
    for shape in ((3, 1025), (7, 80)):
        backward(rms_norm(randn(*shape), randn(shape[1])))
        backward(*add_rms_norm(randn(*shape), randn(*shape), randn(shape[1])))
        backward(swiglu(randn(*shape), randn(*shape)))
        backward(softmax(randn(*shape)))
    backward(softmax(randn(2, 33001)))
    positions = torch.arange(7, device="cuda").expand(2, 7)
    for H, K, d in ((3, 1, 80), (4, 2, 64)):
        backward(*rope(randn(2, 7, H, d), randn(2, 7, K, d), *Rope(d, 1e4)(positions)))


def losses() -> None:
    targets = torch.randint(0, 1003, (7,), device="cuda")
    targets[2] = -100
    backward(cross_entropy(2 * randn(7, 1003), targets))
    backward(linear_cross_entropy(randn(7, 80), randn(1003, 80), targets))


def attention() -> None:
    for d, T, S in ((64, 75, 75), (80, 33, 101), (128, 130, 130)):
        q, k, v = randn(2, T, 4, d), randn(2, S, 2, d), randn(2, S, 2, d)
        backward(flash_attention(q, k, v))
        last = torch.arange(S - T, S, device="cuda")[None]
        backward(flash_attention(q, k, v, (last - 20).clamp(min=0), last))
    with torch.no_grad():
        flash_attention_1(randn(1, 75, 2, 64), randn(1, 75, 2, 64), randn(1, 75, 2, 64))
        q, k, v = randn(2, 1, 8, 64), randn(2, 1000, 2, 64), randn(2, 1000, 2, 64)
        last = torch.tensor([[999], [17]], device="cuda")
        flash_decode(q, k, v, last=last)
        pages = torch.randperm(40, device="cuda").view(2, 20)
        paged = randn(40, 16, 2, 64), randn(40, 16, 2, 64)
        flash_decode(q, *paged, last=last.clamp(max=300), pages=pages)


@torch.no_grad()
def rows() -> None:
    low = rows_down(randn(3, 1, 1025), randn(3, 12, 1025))
    ys = [randn(3, 1, 300), randn(3, 1, 77)]
    rows_up(ys, low, [randn(3, 5, 300), randn(3, 7, 77)])


def main() -> None:
    torch.manual_seed(0)
    for check in (elementwise, losses, attention, rows):
        before = Counter(launches)
        check()
        torch.cuda.synchronize()
        print(f"{check.__name__}: {', '.join(sorted(launches - before))}", flush=True)


if __name__ == "__main__":
    main()
