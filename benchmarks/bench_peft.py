"""Adapters on one GPU: training steps against PEFT's, rows mixed against one merged.

    python benchmarks/bench_peft.py [--smoke] [--cases lora dora ia3 rows] [--out DIR]

Training: one text a row, so plain causal attention; no activation checkpointing; base
and adapters in bfloat16; fused AdamW over the adapters; the mean loss of the same
tokens. All contestants share the base's memory and take turns; the peak is that of one
step, less what the others hold. Peers: PEFT over transformers, eager; with Liger's
kernels and its linear loss; either compiled layer by layer.

Mixed rows: 8 rows, each with its own adapter of rank 16 on all linear layers, against
the same model with nothing beside its weights, as after `merge`: the prompt eagerly and
in a captured graph, decoding in a captured graph.

Prediction. A step of an 8B model over 4,096 tokens is 2 x 2 x 7.5e9 x 4,096 = 123
TFLOP of products with frozen weights, 0.17 s at 720 TFLOP/s, whoever runs it. What
differs is the rest, so nobody is far ahead of a compiled peer. A captured step of 1B
gains 11 small kernels a layer of about 2 us, 0.35 ms.
"""

import argparse
import sys
import time
import traceback
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
from minllama.architecture.accounting_training import TrainingStep
from minllama.architecture.cache import StaticCaches
from minllama.architecture.config import LlamaConfig
from minllama.architecture.model import MinimalLlama
from minllama.fast_ops import use_fast_ops
from minllama.peft import (
    Plan,
    adapter_memory,
    add_dora,
    add_ia3,
    add_lora,
    mix_adapters,
    set_rows,
    trainable_parameters,
)

RANK = 16
ADD = {
    "lora": lambda m: add_lora(m, RANK, RANK, "all-linear"),
    "dora": lambda m: add_dora(m, RANK, RANK, "all-linear"),
    "ia3": add_ia3,
}
THEIRS = {  # name: Liger's kernels, compiled layers, Liger's linear loss
    "peft: eager": (False, False, False),
    "peft: Liger": (True, False, True),
    "peft: Liger + compiled": (True, True, True),
    "peft: compiled + Liger's loss": (False, True, True),
}


def our_contestant(name: str, method: str, base: MinimalLlama) -> Contestant:
    fast, compiled = OURS[name]
    model = our_twin(base)
    ADD[method](model)
    if fast:
        use_fast_ops(model)
    if compiled:
        for block in model.layers:
            block.compile()

    loss = our_loss(model, fused=fast or compiled)
    return Contestant(name, model.train(), loss, adamw(model))


def peft_config(method: str):
    import peft

    if method == "ia3":
        return peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        )
    return peft.LoraConfig(
        r=RANK, lora_alpha=RANK, use_dora=method == "dora",
        target_modules="all-linear", task_type="CAUSAL_LM",
    )  # fmt: skip


def their_contestant(name: str, method: str, base: MinimalLlama) -> Contestant:
    import peft

    kernels, compiled, linear = THEIRS[name]
    twin = transformers_twin(base)
    rotate = with_liger(twin, kernels) if linear else plain_rotation()
    with torch.device(base.embed_tokens.weight.device):
        model = peft.get_peft_model(
            twin, peft_config(method), autocast_adapter_dtype=False
        )
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(base.embed_tokens.weight.dtype)
    if compiled:
        for layer in twin.model.layers:
            layer.compile()
    loss = transformers_loss(model, rotate)
    return Contestant(name, model.train(), loss, adamw(model))


def contestants(method: str, base: MinimalLlama, cuda: bool) -> Iterator[Contestant]:
    """Those that run here; a peer that does not says why."""
    for name in OURS:
        if OURS[name][1] and not cuda:
            continue  # compiling takes a minute there
        if method == "lora" or name != "ours: fast_ops + compiled":
            yield our_contestant(name, method, base)
    for name, (_, compiled, linear) in THEIRS.items():
        if (compiled or linear) and not cuda:
            continue  # Liger's kernels need a GPU
        if method != "lora" and name.startswith("peft: compiled"):
            continue
        try:
            yield their_contestant(name, method, base)
        except Exception as error:
            print(f"{name} {method}: {type(error).__name__}: {error}", file=sys.stderr)


def warmed_up(
    method: str, base: MinimalLlama, tokens: Tensor
) -> Iterator[tuple[Contestant, float]]:
    """Those that run, each after two steps, with the loss of the first."""
    torch.compiler.reset()
    for one in contestants(method, base, tokens.is_cuda):
        start = time.perf_counter()
        try:
            first = float(one.step(tokens))
            float(one.step(tokens))
        except Exception as error:  # one that fails does not lose the others
            print(f"{one.name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        print(f"{method}, {one.name}: ready in {time.perf_counter() - start:.1f} s")
        yield one, first


def predicted(config: LlamaConfig, method: str, tokens: Tensor, dtype: str) -> int:
    """Bytes of weights, optimizer and activations, held after the forward pass.

    Of what an eager step without checkpointing keeps, up to the loss; what its
    operators need beside that while they run is not predicted.
    """
    B, T = len(tokens), tokens.size(1) - 1
    step = TrainingStep(
        batch_size=B, seq_len=T, packed=False, device=tokens.device.type, dtype=dtype
    )
    parts = adapter_memory(config, step, Plan(method=method, rank=RANK))
    return sum(parts.values()) - parts["gradients"]


def training_case(method: str, options: argparse.Namespace) -> list[dict]:
    """A row a contestant: medians of steps that take turns, bytes of one step."""
    config = TINY if options.smoke else LlamaConfig.from_name(options.model)
    dtype = torch.float32 if options.smoke else torch.bfloat16
    name = str(dtype).removeprefix("torch.")
    base = build(config, options.device, dtype)
    B, T = (2, 17) if options.smoke else (options.batch_size, options.seq_len)
    tokens = torch.randint(0, config.vocab_size, (B, T + 1), device=options.device)
    ready = list(warmed_up(method, base, tokens))
    runs = {one.name: lambda one=one: one.step(tokens) for one, _ in ready}
    times = take_turns(runs, options.repeats)
    middle = medians(times)
    peers = [t for who, t in middle.items() if who.startswith("peft")]
    rows = []
    for one, first in ready:
        peak, held = peak_of(one, tokens)
        s, turns, eager = middle[one.name], times[one.name], one.name == "ours: eager"
        foreseen = f"{predicted(config, method, tokens, name) / GIB:.3f}"
        rows.append({
            "case": method, "who": one.name, "batch": B, "tokens": T, "dtype": name,
            "ms": f"{s * 1e3:.2f}", "tokens_per_s": f"{B * T / s:.0f}",
            "spread": f"{(max(turns) - min(turns)) / s:.1%}",
            "times_best_peer": f"{min(peers) / s:.3f}" if peers else "",
            "peak_GiB": f"{peak / GIB:.2f}", "after_forward_GiB": f"{held / GIB:.3f}",
            "predicted_after_forward_GiB": foreseen if eager else "",
            "trained": trainable_parameters(one.model), "first_loss": f"{first:.4f}",
        })  # fmt: skip
    return rows


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """The step's kernels in a graph, which is replayed; on a CPU the step itself."""
    if not torch.cuda.is_available():
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(), step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(kept: Callable[[], None] = step) -> None:  # with the memory it works on
        graph.replay()

    return replay


def generation(model: MinimalLlama, prompt: Tensor) -> dict[str, Callable]:
    """Reading a prompt, eager and captured, and a step behind it, captured."""
    B, T = prompt.shape
    caches = model.new_caches(B, T + 1, kind=StaticCaches)
    token = model(prompt, caches=caches, at=-1).argmax(-1)

    def prefill() -> None:
        model(prompt, caches=model.new_caches(B, T), at=-1).argmax(-1)

    def step() -> None:
        token.copy_(model(token, caches=caches).argmax(-1))
        caches.lengths.fill_(T)  # so that every step is the same

    return {
        "prefill": prefill, "prefill captured": capture(prefill),
        "decode": capture(step),
    }  # fmt: skip


def mixed_model(model: MinimalLlama, rows: int) -> MinimalLlama:
    """As many adapters as rows, each row its own; B is random, so that it counts."""
    for n in range(rows):
        add_lora(model, RANK, RANK, "all-linear", name=f"n{n}")
    mix_adapters(model)
    for layer in model.modules():
        if hasattr(layer, "row_b"):
            layer.b.normal_(std=0.01)
    return set_rows(model, list(range(rows)))


@torch.no_grad()
def rows_case(options: argparse.Namespace) -> list[dict]:
    """8 rows with 8 adapters, as a share of one merged model's speed."""
    config = TINY if options.smoke else LlamaConfig.from_name("llama-3.2-1b")
    dtype = torch.float32 if options.smoke else torch.bfloat16
    B, T = 8, 16 if options.smoke else 512
    prompt = torch.randint(0, config.vocab_size, (B, T), device=options.device)
    rows = []
    for fast in (False, True):
        runs = {}
        for who in ("merged", "mixed"):
            model = build(config, options.device, dtype).eval()
            model = mixed_model(model, B) if who == "mixed" else model
            model = use_fast_ops(model) if fast else model
            runs[who] = generation(model, prompt)
        for what, many in (("prefill", 3), ("prefill captured", 3), ("decode", 20)):
            doing = {who: run[what] for who, run in runs.items()}
            take_turns(doing, 2, many)  # warm-up
            times = take_turns(doing, options.repeats, many)
            middle = medians(times)
            for who, s in middle.items():
                rows.append({
                    "case": f"rows {what}", "who": f"{who}{': fast_ops' * fast}",
                    "batch": B, "tokens": T, "dtype": str(dtype).removeprefix("torch."),
                    "ms": f"{s * 1e3:.3f}",
                    "share_of_merged": f"{middle['merged'] / s:.1%}",
                })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="seconds, writes nothing")
    parser.add_argument("--cases", nargs="+", default=["lora", "rows", "dora", "ia3"])
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", default=str(record.RESULTS))
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    rows: list[dict] = []
    for case in options.cases:
        try:
            rows += (
                rows_case(options) if case == "rows" else training_case(case, options)
            )
        except Exception:  # one case that fails does not lose the others
            traceback.print_exc()
            continue
        keys = list(dict.fromkeys(key for row in rows for key in row))
        full = [{key: row.get(key, "") for key in keys} for row in rows]
        print(record.table([row for row in full if row["case"].startswith(case)]))
        if not options.smoke:
            record.write(
                f"peft_{options.device}", full, options.device, Path(options.out)
            )


if __name__ == "__main__":
    main()
