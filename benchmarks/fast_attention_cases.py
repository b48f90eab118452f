"""Attention, ours against PyTorch's: same tensors, same work, same run.

    python benchmarks/fast_attention_cases.py [--peers] [--smoke] [--out DIR]

Training shapes: forward, and forward with backward, in TFLOP/s. A causal product counts
half, a window what it shows, and backward two and a half times forward (five products
where forward has two), whatever a kernel really does. Decoding: one token against a
cache, in bytes of keys and values per second, from one graph over as many caches as
exceed the GPU's own cache by far. Errors are against float64 on the first row's last
queries, relative to its norm.

Prediction. d = 128: products bound, 60 % of a plain matrix product. d = 64: two
products of 64 per exponential, so the exponentials weigh as much as the products: 45 %.
Decoding at batch 8: 90 % of the copy; at batch 1 start and second kernel are 15 %.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import record
from minllama.fast_ops.flash_attention import (
    flash_attention,
    flash_attention_reference,
)
from minllama.fast_ops.flash_decode import flash_decode
from minllama.fast_ops.timing import copy_bandwidth, seconds

H, K = 32, 8
BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cudnn": SDPBackend.CUDNN_ATTENTION,
}


@dataclass
class Case:
    """Who computes what: `run(q, k, v)` on (B, T, H, d), (B, S, K, d) twice."""

    op: str
    who: str
    shape: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    sizes: tuple[int, int, int, int]  # B, T, S, d
    pairs: int  # of queries and keys that see each other, of all B rows
    window: int | None = None
    heads_first: bool = False  # in memory: what a peer likes best; same shape

    def tensors(self, device: str) -> list[Tensor]:
        B, T, S, d = self.sizes
        shapes = ((B, T, H, d), (B, S, K, d), (B, S, K, d))
        made = [torch.randn(s, device=device, dtype=torch.bfloat16) for s in shapes]
        return [self.laid_out(x) for x in made]

    def laid_out(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2) if self.heads_first else x


def through_sdpa(q, k, v, backend=None, causal=True) -> Tensor:
    """SDPA on our layout, without copies."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    kind = {"is_causal": causal, "enable_gqa": True}
    if backend is None:
        y = F.scaled_dot_product_attention(q, k, v, **kind)
    else:
        with sdpa_kernel(backend):
            y = F.scaled_dot_product_attention(q, k, v, **kind)
    return y.transpose(1, 2)


def through_rows(q, k, v) -> Tensor:
    """As the hub decodes: the heads that share a key head are rows of one query."""
    q = q.unflatten(2, (K, -1))[:, 0]  # (B, K, H / K, d)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).flatten(1, 2)[:, None]


def through_flex(T: int, window: int, device: str) -> Callable:
    """FlexAttention, compiled, with its block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b, h, query, key):
        return (key <= query) & (key > query - window)

    mask = create_block_mask(seen, None, None, T, T, device=device)
    compiled = torch.compile(flex_attention)

    def run(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return run


def windowed(T: int, window: int, device: str) -> Callable:
    """Ours, told who sees whom by an interval a query."""
    last = torch.arange(T, device=device)[None]
    first = (last - window + 1).clamp(min=0)
    return functools.partial(flash_attention, first=first, last=last)


def training_cases(
    device: str, peers: bool, B: int = 4, T: int = 4096, widths=(64, 128)
) -> Iterator[Case]:
    """Causal, and a window of a quarter."""
    for d in widths:
        sizes, shape = (B, T, T, d), f"B{B} {H}/{K} T{T} d{d}"
        runs: dict[str, Callable] = {"ours": flash_attention}
        if device == "cuda":
            for name, backend in BACKENDS.items():
                runs[name] = functools.partial(through_sdpa, backend=backend)
            runs["SDPA default"] = through_sdpa
        if peers:
            runs["flex"] = through_flex(T, T, device)
        for who, run in runs.items():
            yield Case("causal", who, shape, run, sizes, B * T * T // 2)
        window = T // 4
        pairs = B * (window * (window + 1) // 2 + (T - window) * window)
        runs = {"ours": windowed(T, window, device)}
        if peers:
            runs["flex"] = through_flex(T, window, device)
        for who, run in runs.items():
            yield Case(f"window {window}", who, shape, run, sizes, pairs, window)


def decode_cases(
    device: str, S: int = 32768, batches=(1, 8), widths=(64, 128)
) -> Iterator[Case]:
    """One token a row; every row's length is a number on the GPU, all S here."""
    for d in widths:
        for B in batches:
            last = torch.full((B, 1), S - 1, device=device)
            runs = {"ours": functools.partial(flash_decode, last=last)}
            runs["SDPA default"] = functools.partial(through_sdpa, causal=False)
            runs["SDPA default of rows"] = through_rows
            if device == "cuda":
                for name, backend in BACKENDS.items():
                    runs[name] = functools.partial(
                        through_sdpa, backend=backend, causal=False
                    )
            for who, run in runs.items():
                shape = f"B{B} {H}/{K} S{S} d{d}"
                first = who in ("SDPA default", *BACKENDS)
                sizes, pairs = (B, 1, S, d), B * S
                yield Case("decode", who, shape, run, sizes, pairs, heads_first=first)


@torch.no_grad()
def error(case: Case, q: Tensor, k: Tensor, v: Tensor, rows: int = 64) -> float:
    """Of the last queries of the first text, relative, against float64."""
    T, S = q.size(1), k.size(1)
    rows = min(rows, T)
    y = case.run(q, k, v)[:1, -rows:].double()
    last = torch.arange(S - rows, S, device=q.device)[None]
    first = (last - (case.window or S) + 1).clamp(min=0)
    tail = (q[:1, -rows:].double(), k[:1].double(), v[:1].double())
    want = flash_attention_reference(*tail, first, last)
    return float((y - want).norm() / want.norm())


def measure_training(case: Case, device: str, repeats: int) -> list[dict]:
    """Rows of forward, and forward with backward."""
    q, k, v = (x.requires_grad_() for x in case.tensors(device))
    dy = torch.randn_like(q)

    def forward():
        with torch.no_grad():
            return case.run(q, k, v)

    def both():
        return torch.autograd.grad(case.run(q, k, v), (q, k, v), dy)

    rows, flops = [], 4 * case.pairs * H * case.sizes[-1]
    wrong = error(case, q, k, v)
    for name, run, times in (("forward", forward, 1), ("forward+backward", both, 3.5)):
        time = seconds(run, device, repeats)
        rows.append({
            "op": case.op, "who": case.who, "shape": case.shape, "pass": name,
            "us": f"{time * 1e6:.1f}",
            "TFLOP_per_s": f"{times * flops / time / 1e12:.1f}",
            "GB_per_s": "", "share_of_copy": "", "error": f"{wrong:.1e}",
        })  # fmt: skip
    return rows


@torch.no_grad()
def measure_decode(case: Case, device: str, repeats: int, limit: float) -> list[dict]:
    """One row. Enough caches that none is read from the GPU's own cache."""
    q, k, v = case.tensors(device)
    size = k.numel() * k.element_size() * 2
    copies = max(2, -(-600_000_000 // size)) if device == "cuda" else 1
    sets = [(q, k, v)] + [
        (q, torch.randn_like(k), torch.randn_like(v)) for _ in range(copies - 1)
    ]
    wrong = error(case, q, k, v)

    def run():
        for inputs in sets:
            case.run(*inputs)

    time = seconds(run, device, repeats) / copies
    return [{
        "op": case.op, "who": case.who, "shape": case.shape, "pass": "forward",
        "us": f"{time * 1e6:.1f}", "TFLOP_per_s": "",
        "GB_per_s": f"{size / time / 1e9:.0f}",
        "share_of_copy": f"{size / time / limit:.1%}", "error": f"{wrong:.1e}",
    }]  # fmt: skip


def attention_rows(device: str, peers: bool, smoke: bool, repeats: int) -> list[dict]:
    """All cases, as rows of a table."""
    limit = copy_bandwidth(device)
    rows = []
    training = {"B": 1, "T": 64, "widths": (32,)} if smoke else {}
    decoding = {"S": 256, "batches": (1,), "widths": (32,)} if smoke else {}
    for case in training_cases(device, peers, **training):
        rows += measure_training(case, device, repeats)
    for case in decode_cases(device, **decoding):
        rows += measure_decode(case, device, repeats, limit)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="FlexAttention too: slow")
    parser.add_argument("--smoke", action="store_true", help="seconds, writes nothing")
    parser.add_argument("--out", default=str(record.RESULTS))
    options = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = attention_rows(
        device, options.peers, options.smoke, 2 if options.smoke else 20
    )
    print(record.table(rows))
    if not options.smoke:
        path = record.write(f"fast_attention_{device}", rows, device, Path(options.out))
        print(f"written to {path.name}")


if __name__ == "__main__":
    main()
