"""Everything about flash attention that only a GPU shows, in one call of a minute.

    python -m tests.fast_ops.gpu_check_flash [decoding captured …]

Widths and dtypes against float64, both ways of reading tiles, intervals, offsets beyond
2^31, the same bits twice, compiled, checkpointed, and decoding from a captured graph
while rows grow. Prints a line each, and fails at the end if any failed.
"""

import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minllama.architecture.layout import packed
from minllama.fast_ops import flash_attention_tiles
from minllama.fast_ops.flash_attention import (
    flash_attention,
    flash_attention_reference,
)
from minllama.fast_ops.flash_attention_1 import flash_attention_1
from minllama.fast_ops.flash_decode import flash_decode, flash_decode_reference

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def draw(B: int, T: int, S: int, H: int, K: int, d: int, dtype) -> list[Tensor]:
    shapes = ((B, T, H, d), (B, S, K, d), (B, S, K, d))
    return [torch.randn(s, device="cuda", dtype=dtype).requires_grad_() for s in shapes]


def compare(inputs: list[Tensor], first=None, last=None) -> float:
    """Largest relative error of the output and the three gradients."""
    o = flash_attention(*inputs, first, last)
    do = torch.randn_like(o)
    got = (o, *torch.autograd.grad(o, inputs, do))
    wide = [x.detach().double().requires_grad_() for x in inputs]
    want = flash_attention_reference(*wide, first, last)
    want = (want, *torch.autograd.grad(want, wide, do.double()))
    return max(relative(a, b) for a, b in zip(got, want))


def widths(d: int, dtype: torch.dtype) -> str:
    error = compare(draw(2, 300, 411, 8, 2, d, dtype))
    assert error < LIMITS[dtype], error
    return f"{error:.1e}"


def intervals(d: int) -> str:
    positions = torch.cat([torch.arange(n) for n in (37, 200, 1, 300, 62)])[None]
    layout = packed(positions.cuda())
    window = layout.within(50, 600)
    last = torch.tensor([[100], [399]], device="cuda") + torch.arange(200).cuda()
    inputs = draw(2, 600, 600, 8, 2, d, torch.bfloat16)
    errors = [compare(inputs, x.first, x.last) for x in (layout, window)]
    errors.append(compare(draw(2, 200, 600, 8, 2, d, torch.bfloat16), None, last))
    assert max(errors) < LIMITS[torch.bfloat16], errors
    return f"{max(errors):.1e}"


def without_the_engine() -> str:
    flash_attention_tiles.has_engine.cache_clear()
    kept = flash_attention_tiles.has_engine
    flash_attention_tiles.has_engine = lambda device: False
    try:
        errors = [
            compare(draw(2, 300, 411, 8, 2, d, torch.bfloat16)) for d in (64, 80, 128)
        ]
    finally:
        flash_attention_tiles.has_engine = kept
    assert max(errors) < LIMITS[torch.bfloat16], errors
    return f"{max(errors):.1e}"


def odd_strides() -> str:
    q, k, v = draw(2, 300, 300, 8, 2, 64, torch.bfloat16)
    fused = torch.randn(2, 300, 12, 64, device="cuda", dtype=torch.bfloat16)
    inputs = [x.detach().requires_grad_() for x in fused.split([8, 2, 2], dim=2)]
    errors = [compare(inputs)]
    turned = [x.detach().permute(0, 2, 3, 1).contiguous() for x in (q, k, v)]
    turned = [x.permute(0, 3, 1, 2).requires_grad_() for x in turned]
    errors.append(compare(turned))
    assert max(errors) < LIMITS[torch.bfloat16], errors
    return f"{max(errors):.1e}"


def far_offsets() -> str:
    """2^31 numbers a tensor and more; a window keeps the work small."""
    T, d, window = 2**19 + 64, 128, 100
    q, k, v = draw(1, T, T, 32, 32, d, torch.bfloat16)
    last = torch.arange(T, device="cuda")[None]
    first = (last - window + 1).clamp(min=0)
    o = flash_attention(q, k, v, first, last)
    do = torch.randn_like(o)
    got = torch.autograd.grad(o, (q, k, v), do)
    n = 400  # queries that see the last 500 keys only
    tail = [x.detach()[:, -500:].double().requires_grad_() for x in (q, k, v)]
    y = flash_attention_reference(*tail, (first - (T - 500))[:, -500:].clamp(min=0),
                                  (last - (T - 500))[:, -500:])  # fmt: skip
    want = torch.autograd.grad(y, tail, do[:, -500:].double())
    errors = [relative(o[:, -n:], y[:, -n:])]
    errors += [relative(a[:, -n:], b[:, -n:]) for a, b in zip(got, want)]
    assert max(errors) < LIMITS[torch.bfloat16], errors
    y = flash_decode(
        q[:, -1:].detach(), k.detach(), v.detach(), first[:, -1:], last[:, -1:]
    )
    errors.append(relative(y, o[:, -1:]))
    assert errors[-1] < LIMITS[torch.bfloat16], errors
    return f"{q.numel() / 2**31:.2f} x 2^31 numbers, {max(errors):.1e}"


def same_bits() -> str:
    inputs = draw(2, 1024, 1024, 32, 8, 128, torch.bfloat16)
    do = torch.randn_like(inputs[0])
    runs = [torch.autograd.grad(flash_attention(*inputs), inputs, do) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0]))
    return "5 runs"


def compiled() -> str:
    inputs = draw(2, 256, 256, 8, 2, 64, torch.bfloat16)
    do = torch.randn_like(inputs[0])
    plain = torch.autograd.grad(flash_attention(*inputs), inputs, do)
    fast = torch.compile(lambda q, k, v: flash_attention(q + 0, k, v), fullgraph=True)
    checked = checkpoint(flash_attention, *inputs, use_reentrant=False)
    for y in (fast(*inputs), checked):
        for a, b in zip(torch.autograd.grad(y, inputs, do), plain):
            assert torch.equal(a, b)
    return "inductor and checkpoint: equal"


def opcheck() -> str:
    q, k, v = (x.detach() for x in draw(2, 64, 64, 4, 2, 64, torch.bfloat16))
    ops, last = torch.ops.minllama, torch.arange(64, device="cuda")[None]
    for interval in ((None, None), (last - 5, last)):
        o, lse = ops.flash_attention_forward(q, k, v, *interval, 0.1)
        for op, inputs in (
            (ops.flash_attention_forward, (q, k, v, *interval, 0.1)),
            (ops.flash_attention_backward, (q, k, v, o, lse, o, *interval, 0.1)),
            (ops.flash_decode_forward, (q[:, :2], k, v, None, last[:, :2], None, 0.1)),
        ):
            torch.library.opcheck(op.default, inputs)
    return "3 operators"


def version_1() -> str:
    q, k, v = (x.detach() for x in draw(2, 300, 411, 8, 2, 64, torch.bfloat16))
    error = relative(flash_attention_1(q, k, v), flash_attention_reference(q, k, v))
    assert error < LIMITS[torch.bfloat16], error
    return f"{error:.1e}"


@torch.no_grad()
def decoding(d: int, dtype: torch.dtype) -> str:
    errors = []
    for B, T in ((1, 1), (3, 1), (2, 5), (1, 16)):
        q, k, v = draw(B, T, 3000, 32, 8, d, dtype)
        last = torch.randint(T, 2990, (B, 1), device="cuda") + torch.arange(T).cuda()
        cases = [(None, None, None), (None, last, None), (last - 700, last, None)]
        pages = torch.randperm(B * 47).cuda().view(B, 47)
        for first, end, _ in cases:
            got = flash_decode(q, k, v, first, end)
            wide = [x.double() for x in (q, k, v)]
            errors.append(relative(got, flash_decode_reference(*wide, first, end)))
        pool = [torch.randn(B * 47, 64, 8, d, device="cuda", dtype=dtype) for _ in "kv"]
        got = flash_decode(q, *pool, None, last, pages)
        wide = [x.double() for x in (q, *pool)]
        errors.append(relative(got, flash_decode_reference(*wide, None, last, pages)))
    assert max(errors) < LIMITS[dtype], errors
    return f"{max(errors):.1e}"


@torch.no_grad()
def captured() -> str:
    """A step captured once serves rows that grow, to the end of the cache."""
    q, k, v = draw(4, 1, 2048, 32, 8, 128, torch.bfloat16)
    last = torch.tensor([[0], [5], [63], [64]], device="cuda")
    flash_decode(q, k, v, None, last)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = flash_decode(q, k, v, None, last)
    errors = []
    for step in (0, 1, 64, 900, 1018):
        last += step
        graph.replay()
        errors.append(relative(y, flash_decode_reference(q, k, v, None, last)))
    assert max(errors) < LIMITS[torch.bfloat16], errors
    return f"{max(errors):.1e}"


CHECKS: list[tuple[Callable, tuple]] = [
    *((widths, (d, torch.bfloat16)) for d in (16, 32, 64, 80, 96, 128, 192, 256)),
    *((widths, (d, torch.float16)) for d in (64, 128)),
    *((widths, (d, torch.float32)) for d in (64, 80, 128, 256)),
    *((widths, (d, torch.bfloat16)) for d in (12, 50)),
    *((intervals, (d,)) for d in (64, 128)),
    (without_the_engine, ()), (odd_strides, ()), (far_offsets, ()), (same_bits, ()),
    (compiled, ()), (opcheck, ()), (version_1, ()),
    *((decoding, (d, torch.bfloat16)) for d in (64, 80, 128, 256)),
    (decoding, (128, torch.float32)), (captured, ()),
]  # fmt: skip


def main() -> None:
    names, failed = sys.argv[1:], 0
    wanted = [n for n, (f, _) in enumerate(CHECKS) if not names or f.__name__ in names]
    with multiprocessing.get_context("spawn").Pool(12) as pool:  # to compile at once
        for good, line in pool.imap_unordered(_attempt, wanted, 1):
            failed += not good
            print(line, flush=True)
    print(f"{len(wanted) - failed} good, {failed} failed")
    sys.exit(failed > 0)


def _attempt(n: int) -> tuple[bool, str]:
    check, args = CHECKS[n]
    torch.manual_seed(n)
    start, good = time.perf_counter(), True
    try:
        word = check(*args)
    except Exception as error:
        lines = traceback.format_exc().splitlines()
        good, word = False, f"FAILED {error!r:.300} {lines[-3]}"
    torch.cuda.empty_cache()
    names = " ".join(str(x).removeprefix("torch.") for x in args)
    seconds = time.perf_counter() - start
    return good, f"{check.__name__} {names}: {word} ({seconds:.1f} s)"


if __name__ == "__main__":
    main()
