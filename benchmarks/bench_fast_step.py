"""A training step of 1B on one GPU: ours against transformers with Liger's kernels.

    python benchmarks/bench_fast_step.py [--smoke] [--profile] [--out DIR]

4 rows of 4,096 tokens, each row one text, so plain causal attention; no activation
checkpointing; weights, gradients and AdamW's means in bfloat16, fused AdamW; the mean
loss of the same tokens. All models share the base's memory and take turns, three steps
a turn; medians count. The peak is that of one step, less what the others hold. MFU
counts 6 N and the whole square of attention, as `../shared/gpu_baselines.md` does.

Peers: transformers eager; with Liger's kernels and its linear loss; with Liger's loss
and layers compiled one by one, the fastest of its combinations there.

Prediction. Products 155 ms, attention 43, AdamW 6 (bytes: 7 x 2.5 GB), the elementwise
rest 13 (bytes of norms, rotation, gate and sums at 4.3 TB/s), loss 3: 220 ms, or 74,000
tokens/s, if each product runs alone as fast as in its own benchmark.
"""

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import record
from benchmarks.contestants import (
    GIB,
    OURS,
    TINY,
    Contestant,
    adamw,
    build,
    medians,
    our_loss,
    our_twin,
    peak_of,
    plain_rotation,
    take_turns,
    transformers_loss,
    transformers_twin,
    with_liger,
)
from minllama.architecture.accounting import count_parameters, peak_flops
from minllama.architecture.config import LlamaConfig
from minllama.architecture.model import MinimalLlama
from minllama.fast_ops import use_fast_ops

RATE = 1e-8  # too small to change a weight: all contestants see the same ones
THEIRS = {  # name: Liger's kernels, compiled layers, Liger's linear loss
    "transformers: eager": (False, False, False),
    "transformers: Liger": (True, False, True),
    "transformers: compiled + Liger's loss": (False, True, True),
}
KINDS = {  # of kernels, by their names; the first that fits
    "attention": r"cudnn|flash|fmha",
    "loss": r"cross_entropy|_liger_cross|nll_loss|log_softmax",
    "products": r"gemm|nvjet|cutlass|xmma",
    "AdamW": r"adam|multi_tensor",
    "copies": r"memcpy|memset|copy",
}


def our_contestant(name: str, base: MinimalLlama) -> Contestant:
    fast, compiled = OURS[name]
    model = our_twin(base)
    if fast:
        use_fast_ops(model)
    if compiled:
        for block in model.layers:
            block.compile()

    loss = our_loss(model, fused=fast or compiled)
    return Contestant(name, model.train(), loss, adamw(model, RATE))


def their_contestant(name: str, base: MinimalLlama) -> Contestant:
    kernels, compiled, linear = THEIRS[name]
    model = transformers_twin(base)
    rotate = with_liger(model, kernels) if linear else plain_rotation()
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    loss = transformers_loss(model, rotate)
    return Contestant(name, model.train(), loss, adamw(model, RATE))


def contestants(base: MinimalLlama, only: list[str]) -> Iterator[Contestant]:
    """Those that run here, each after two steps; one that does not says why."""
    cuda = base.embed_tokens.weight.is_cuda
    for name in only:
        needs_gpu = OURS[name][1] if name in OURS else any(THEIRS[name][1:])
        if needs_gpu and not cuda:
            continue  # compiling takes a minute there; Liger has no kernels
        make = our_contestant if name in OURS else their_contestant
        try:
            yield make(name, base)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)


def kind_of(kernel: str) -> str:
    fits = (kind for kind, words in KINDS.items() if re.search(words, kernel.lower()))
    return next(fits, "elementwise")


def profile(one: Contestant, tokens: Tensor, largest: int = 40) -> list[dict]:
    """Where the milliseconds of a step go, by kind; prints the largest kernels, too."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        start = time.perf_counter()
        float(one.step(tokens))
        wall = time.perf_counter() - start
    spent: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            if getattr(event, "is_user_annotation", False):
                continue
            spent[event.name] += event.device_time
            count[event.name] += 1
    kinds: Counter[str] = Counter()
    for name, us in spent.items():
        kinds[kind_of(name)] += us
    print(f"{one.name}: {wall * 1e3:.1f} ms, kernels {sum(spent.values()) / 1e3:.1f}")
    for name, us in spent.most_common(largest):
        print(f"  {us / 1e3:8.2f} ms {count[name]:5} {kind_of(name):11} {name[:110]}")
    return [
        {"who": one.name, "kind": kind, "ms": f"{us / 1e3:.1f}"}
        for kind, us in kinds.most_common()
    ]


def mfu_flops(config: LlamaConfig, T: int) -> float:
    """FLOPs a token: 6 N, and attention counted as a whole square."""
    whole = 12 * config.n_layers * config.n_heads * config.head_dim * T
    return 6 * count_parameters(config) + whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="seconds, writes nothing")
    parser.add_argument("--profile", nargs="*", default=[], help="contestants")
    names = [*OURS, *THEIRS]
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", default=str(record.RESULTS))
    options = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = options.smoke or device == "cpu"
    config = TINY if small else LlamaConfig.from_name("llama-3.2-1b")
    B, T = (2, 17) if small else (options.rows, options.seq_len)
    base = build(config, device, torch.float32 if small else torch.bfloat16)
    tokens = torch.randint(0, config.vocab_size, (B, T + 1), device=device)
    ready: list[tuple[Contestant, float]] = []
    for one in contestants(base, options.only):
        start = time.perf_counter()
        first = float(one.step(tokens))
        float(one.step(tokens))
        print(f"{one.name}: ready in {time.perf_counter() - start:.1f} s", flush=True)
        ready.append((one, first))
    runs: dict[str, Callable] = {
        one.name: lambda one=one: one.step(tokens) for one, _ in ready
    }
    times = take_turns(runs, 2 if small else options.repeats, many=3)
    middle = medians(times)
    rows = []
    for one, first in ready:
        s, turns = middle[one.name], times[one.name]
        peak = peak_of(one, tokens)[0]
        limit = peak_flops(device) if device == "cuda" else None
        mfu = f"{B * T / s * mfu_flops(config, T) / limit:.1%}" if limit else ""
        rows.append({
            "who": one.name, "rows": B, "tokens": T, "ms": f"{s * 1e3:.2f}",
            "tokens_per_s": f"{B * T / s:.0f}", "MFU": mfu,
            "spread": f"{(max(turns) - min(turns)) / s:.1%}",
            "peak_GiB": f"{peak / GIB:.2f}", "first_loss": f"{first:.4f}",
        })  # fmt: skip
    print(record.table(rows), flush=True)
    if not small:
        record.write(f"fast_step_{device}", rows, device, Path(options.out))
    chosen = [one for one, _ in ready if one.name in options.profile]
    rows = [row for one in chosen for row in profile(one, tokens)]
    if rows:
        print(record.table(rows))
    if rows and not small:
        record.write(f"fast_profile_{device}", rows, device, Path(options.out))


if __name__ == "__main__":
    main()
