"""Bytes, predicted and measured: `minllama memory` against the GPU's allocator.

    python benchmarks/bench_memory.py [--device cuda] [--smoke]

Three kinds of cases. *saved*: what autograd keeps between forward and backward pass,
each storage once, parameters left out; also on a CPU. *generation*: weights and a full
cache, then the peak while a prompt is read. *training*: the peak of the second step of
the hub's loop. Weights are random: bytes do not depend on them.

The allocator's numbers are less what it held before the model was built: workspaces of
cuBLAS, which stay for good (column workspaces_MiB).

Prediction. Weights and cache to the byte, peaks within 5 %: what is left out are
temporaries inside kernels at the very moment of the peak, and for log_softmax, whose
backward pass that moment is mostly, there are none.
"""

import argparse
import gc
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import record
from minllama.architecture.accounting import Format, cache_bytes, weight_bytes
from minllama.architecture.accounting_peak import prefill_bytes, training_peak
from minllama.architecture.accounting_training import TrainingStep, saved_bytes
from minllama.architecture.config import LlamaConfig
from minllama.architecture.data import Batch
from minllama.architecture.model import MinimalLlama
from minllama.architecture.optim import make_adamw, make_muon
from minllama.architecture.train import next_token_loss, train

GIB = 2**30
TINY = LlamaConfig(
    vocab_size=997, dim=64, n_layers=3, n_heads=8, n_kv_heads=2, ffn_dim=160
)


@dataclass(frozen=True)
class Case:
    """A row of the table; `step` says all of a training step, B and T of others."""

    kind: str  # saved, weights and cache, prompt, training
    model: str
    step: TrainingStep
    layers: int | None = None  # fewer than the model has


def steps(*changes: dict) -> list[TrainingStep]:
    base = {"batch_size": 1, "seq_len": 4096}
    return [TrainingStep(**{**base, **change}) for change in changes]


AUTOCAST = {"dtype": "float32", "autocast": True}
SAVED = steps(
    {},
    {"packed": False},
    AUTOCAST,
    {**AUTOCAST, "packed": False},
    {"checkpointing": True},
)
TRAINING = {
    "llama-3.2-1b": steps(
        {"batch_size": 4},
        {"batch_size": 4, "packed": False},
        {"batch_size": 4, "checkpointing": True},
        {"batch_size": 2, "seq_len": 2048},
        {"batch_size": 2, **AUTOCAST},
        {"batch_size": 2, **AUTOCAST, "checkpointing": True},
        {"seq_len": 256},
        {"seq_len": 256, **AUTOCAST},
        {"seq_len": 512, "optimizer": "muon"},
    ),
    "llama-3.1-8b": steps(
        {"seq_len": 2048}, {}, {"seq_len": 8192, "checkpointing": True}
    ),
}


def cases(device: str, smoke: bool) -> list[Case]:
    if device != "cuda":
        small = {"seq_len": 65, "batch_size": 3, "device": "cpu"}
        seen = [step for step in SAVED if not step.checkpointing]
        return [Case("saved", "tiny", replace(step, **small)) for step in seen]
    names = ["tiny"] if smoke else list(TRAINING)
    found = []
    for name in names:
        full = TrainingStep(batch_size=4, seq_len=512 if smoke else 8192)
        found += [Case("weights and cache", name, full), Case("prompt", name, full)]
        found += [Case("training", name, s) for s in TRAINING.get(name, SAVED)]
    first = names[0]
    return [Case("saved", first, step, layers=2) for step in SAVED] + found


def config_of(case: Case) -> LlamaConfig:
    config = TINY if case.model == "tiny" else LlamaConfig.from_name(case.model)
    return replace(config, n_layers=case.layers or config.n_layers)


def build(config: LlamaConfig, dtype: str, device: str) -> MinimalLlama:
    """Random weights, made where they will be."""
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return MinimalLlama.from_config(config)
    finally:
        torch.set_default_dtype(torch.float32)


class RandomBatches:
    """Rows of random tokens, two documents each."""

    def __init__(self, vocab_size: int, step: TrainingStep) -> None:
        B, T = step.batch_size, step.seq_len
        tokens = torch.randint(0, vocab_size, (B, T + 1))
        positions = torch.arange(T).expand(B, T) % (T // 2 + 1)
        self.batch = Batch(tokens[:, :-1], tokens[:, 1:], positions)

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        return Batch(*(part.clone() for part in vars(self.batch).values()))


def plain_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The hub's loss where each row is one text: no mask."""
    logits = model(batch.tokens).flatten(0, 1).float()
    return F.cross_entropy(logits, batch.targets.flatten(), reduction="sum")


def prepare(case: Case, device: str) -> tuple[MinimalLlama, Callable, RandomBatches]:
    config = config_of(case)
    model = build(config, case.step.dtype, device)
    if case.step.checkpointing:
        for layer in model.layers:
            layer.forward = again_later(layer.forward)
    loss = next_token_loss if case.step.packed else plain_loss
    return model, loss, RandomBatches(config.vocab_size, case.step)


def again_later(forward: Callable) -> Callable:
    def run(x, layout, cache=None):
        return checkpoint(forward, x, layout, cache, use_reentrant=False)

    return run


def measure_saved(case: Case, device: str, base: int) -> tuple[int, int]:
    """Predicted and counted bytes between forward and backward pass."""
    model, loss, batches = prepare(case, device)
    predicted = saved_bytes(config_of(case), case.step)
    batch = next(batches).to(device)
    if case.step.checkpointing:  # its own hooks hide what it keeps: ask the allocator
        before = torch.cuda.memory_allocated()
        kept = loss(model, batch)
        counted = torch.cuda.memory_allocated() - before
        del kept
        return predicted, counted + sum(part.nbytes for part in vars(batch).values())
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {batch.positions.data_ptr(): batch.positions}  # the loop holds them

    def pack(tensor: Tensor) -> Tensor:
        at = tensor.untyped_storage().data_ptr()
        if at not in parameters:
            saved.setdefault(at, tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast(device, torch.bfloat16, enabled=case.step.autocast),
    ):
        loss(model, batch)
    counted = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    if abs(counted / predicted - 1) > 0.001:
        explain(saved)
    return predicted, counted


def explain(saved: dict) -> None:
    """What was kept, for whoever wants to know where a difference comes from."""
    shapes = Counter(
        (t.untyped_storage().nbytes(), str(t.dtype), tuple(t.shape))
        for t in saved.values()
    )
    for (size, dtype, shape), count in sorted(shapes.items(), reverse=True):
        print(f"    {count:3} x {size:>13,} bytes  {dtype[6:]:<9} {shape}")


@torch.no_grad()
def measure_cache(case: Case, device: str, base: int) -> tuple[int, int]:
    """Weights and a full cache, predicted and allocated; or the peak on the way."""
    config, step = config_of(case), case.step
    B, T = step.batch_size, step.seq_len
    model = build(config, step.dtype, device).eval()
    caches = model.new_caches(B, T)
    tokens = torch.randint(0, config.vocab_size, (B, T), device=device)
    given = tokens.nbytes + base
    model(tokens, caches=caches, at=-1)
    caches.length = 0
    predicted = sum(weight_bytes(config, Format(dtype=step.dtype)).values())
    predicted += cache_bytes(config, B, T, Format(dtype=step.dtype))
    if case.kind == "weights and cache":
        return predicted, torch.cuda.memory_allocated() - given
    torch.cuda.reset_peak_memory_stats()
    model(tokens, caches=caches, at=-1)
    predicted += prefill_bytes(config, B, T)
    return predicted, torch.cuda.max_memory_allocated() - given


def measure_training(case: Case, device: str, base: int) -> tuple[int, int]:
    """The peak of the second step: the first one makes the optimizer's states."""
    model, loss, batches = prepare(case, device)
    make = {"adamw": make_adamw, "muon": make_muon}[case.step.optimizer]
    optimizer = make(model, 1e-6)
    how = torch.bfloat16 if case.step.autocast else None
    train(model, optimizer, batches, 1, loss=loss, autocast=how)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    train(model, optimizer, batches, 1, loss=loss, autocast=how)
    torch.cuda.synchronize()
    _, parts = training_peak(config_of(case), case.step)
    return sum(parts.values()), torch.cuda.max_memory_allocated() - base


def measure(case: Case, device: str, base: int) -> dict:
    start = time.perf_counter()
    how = {"saved": measure_saved, "training": measure_training}
    predicted, measured = how.get(case.kind, measure_cache)(case, device, base)
    config, step = config_of(case), case.step
    training = case.kind == "training"
    return {
        "case": case.kind,
        "model": case.model + (f" ({case.layers} layers)" if case.layers else ""),
        "dtype": "float32 autocast" if step.autocast else step.dtype,
        "rows": step.batch_size,
        "tokens": step.seq_len,
        "packed": step.packed if case.kind in ("saved", "training") else "",
        "checkpointing": step.checkpointing,
        "optimizer": step.optimizer if training else "",
        "fullest": training_peak(config, step)[0] if training else "",
        "attention": attention_kernel(config, case, device),
        "predicted_GiB": f"{predicted / GIB:.4f}",
        "measured_GiB": f"{measured / GIB:.4f}",
        "difference": f"{predicted / measured - 1:+.2%}",
        "workspaces_MiB": f"{base / 2**20:.1f}",
        "seconds": f"{time.perf_counter() - start:.1f}",
    }


def attention_kernel(config: LlamaConfig, case: Case, device: str) -> str:
    """The name of the kernel that PyTorch chooses for that attention."""
    step, masked = case.step, case.step.packed and case.kind in ("saved", "training")
    dtype = torch.bfloat16 if step.autocast else getattr(torch, step.dtype)
    B, T, d = step.batch_size, min(step.seq_len, 256), config.head_dim
    H = config.n_heads
    K = H if masked else config.n_kv_heads
    grad = case.kind in ("saved", "training")
    q, k = (
        torch.zeros(B, T, n, d, dtype=dtype, device=device, requires_grad=grad)
        for n in (H, K)
    )
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    mask = torch.ones(B, 1, T, T, dtype=torch.bool, device=device) if masked else None
    try:
        choice = torch._fused_sdp_choice(
            q, k, k, mask, 0.0, not masked, enable_gqa=H != K
        )
        return torch.nn.attention.SDPBackend(choice).name.lower()
    except Exception as error:  # a private name: it may go
        return type(error).__name__


def workspaces(device: str) -> int:
    """Bytes that stay allocated once matrices were multiplied, forward and backward."""
    if device != "cuda":
        return 0
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(1024, 1024, device=device, dtype=dtype, requires_grad=True)
        F.linear(a @ a, a, a[0]).sum().backward()
        with torch.autocast(device, torch.bfloat16):
            (a @ a).sum().backward()
    del a
    free()
    return torch.cuda.memory_allocated()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="seconds, writes nothing")
    parser.add_argument("--out", default=str(record.RESULTS))
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    base = workspaces(options.device)
    for case in cases(options.device, options.smoke):
        try:
            row = measure(case, options.device, base)
            rows.append(row)
            words = (row[key] for key in ("case", "model", "dtype", "difference"))
            print(*words, f"{row['seconds']} s", sep=" · ", flush=True)
        except Exception as error:
            words = str(error).splitlines()[0] if str(error) else ""
            print(f"{case}: {type(error).__name__}: {words}", flush=True)
        free()
        if options.device == "cuda":
            base = torch.cuda.memory_allocated()
    if not rows:
        sys.exit("no case could be measured")
    print(record.table(rows))
    if options.device == "cuda" and not options.smoke:
        path = record.write("memory_cuda", rows, options.device, Path(options.out))
        print(f"written to {path.name}")


if __name__ == "__main__":
    main()
