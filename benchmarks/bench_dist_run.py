"""Training on several GPUs: tokens/s, memory and what communication costs.

    torchrun --nproc-per-node 4 benchmarks/bench_dist_run.py --device cuda
    python benchmarks/bench_dist_run.py --smoke        # two processes, on a CPU

*step*: the hub's loop over a sharded model, against transformers under plain
`fully_shard` with the same units, precisions, checkpointing and batch. float32 slices
and AdamW states, bfloat16 products, gradients reduced in float32; rows are one text
each; weights random, one fixed batch.

*scaling*: 1B, the same rows per GPU, on all GPUs and on one of them (a shard group of
one rank, all GPUs at it at the same time, so that heat is equal), three times in turn.

*fast*: the same step with chapter 8's kernels and twice the rows, against transformers
with all of Liger's kernels, first with full checkpointing and then with none, which
fits: 16,384 tokens a GPU keep 139 kB a token and block, 73 GB.

*exposed*: the part of a step in which communication runs and nothing is computed, from
the profiler's kernels of rank 0.

*generate*: tensor parallel, the greedy tokens of a single process.

Predictions. A step of 8B on 2 x 4096 tokens is 8 N t FLOPs with checkpointing and the
attention's: at 700 TFLOP/s, what GEMMs reach here, 0.8 s or 10,000 tokens/s/GPU; norms,
SwiGLU, loss and AdamW take what is missing. Communication: two all-gathers of 16 GB and
a reduce-scatter of 32 GB at 320 GB/s: 0.15 s, beside computation that takes five times
as long, so nearly all of it can hide. Memory: `dist_run.accounting`.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import record
from minllama.architecture.accounting import count_parameters, peak_flops
from minllama.architecture.accounting_training import TrainingStep
from minllama.architecture.config import LlamaConfig
from minllama.architecture.data import Batch
from minllama.architecture.generate import generate
from minllama.architecture.model import MinimalLlama
from minllama.architecture.optim import make_adamw
from minllama.architecture.train import train
from minllama.dist_run import (
    MeshTeam,
    checkpoint_activations,
    init_mesh,
    launch,
    shard,
    tensor_parallel,
)
from minllama.dist_run.accounting import Sharding, sharded_peak
from minllama.dist_run.timeline import (
    COMMUNICATION,
    COMPUTE,
    exposed_communication,
    intervals,
    trace_step,
)
from minllama.fast_ops import head_loss, use_fast_ops

GIB = 2**30
TINY = LlamaConfig(vocab_size=997, dim=64, n_layers=3, n_heads=8, n_kv_heads=4)


def config_of(name: str) -> LlamaConfig:
    return TINY if name == "tiny" else LlamaConfig.from_name(name)


class OneBatch:
    """The same random rows again and again, each of them one text."""

    def __init__(self, config: LlamaConfig, B: int, T: int, device) -> None:
        own = torch.Generator().manual_seed(dist.get_rank())
        tokens = torch.randint(0, config.vocab_size, (B, T + 1), generator=own)
        positions = torch.arange(T).expand(B, T)
        self.batch = Batch(tokens[:, :-1], tokens[:, 1:], positions).to(device)

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        return self.batch


def plain_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The hub's loss where each row is one text: no mask."""
    logits = model(batch.tokens).flatten(0, 1).float()
    return F.cross_entropy(logits, batch.targets.flatten(), reduction="sum")


def hf_loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch.tokens, use_cache=False).logits
    logits = logits.flatten(0, 1).float()
    return F.cross_entropy(logits, batch.targets.flatten(), reduction="sum")


def liger_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Summed, as the others; transformers hands num_items_in_batch to Liger's loss."""
    count = batch.targets.numel()
    tokens, targets = batch.tokens, batch.targets
    return count * model(
        input_ids=tokens, labels=tokens, shift_labels=targets, use_cache=False
    ).loss  # fmt: skip


def fill(model: nn.Module, device: str) -> None:
    """Random numbers straight into the slices: which ones does not matter here."""
    model.to_empty(device=device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            local = p.to_local() if isinstance(p, DTensor) else p
            local.fill_(1.0) if "norm" in name else local.normal_(std=0.02)
        for name, buffer in model.named_buffers():  # transformers' angles
            if name.endswith("inv_freq"):
                even = torch.arange(0, 2 * buffer.numel(), 2, device=device)
                buffer.copy_(500000.0 ** (-even / (2 * buffer.numel())))


def ours(config: LlamaConfig, mesh: DeviceMesh, device: str, how: dict) -> MinimalLlama:
    with torch.device("meta"):
        model = MinimalLlama.from_config(config)
    if how.get("fast"):
        use_fast_ops(model)
    if "checkpointing" in how:
        checkpoint_activations(model, how["checkpointing"])
    shard(model, mesh, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fill(model, device)
    model.tie_weights()
    if how.get("compile"):
        for block in model.layers:
            block.forward = torch.compile(block.forward)
    return model


def transformers_model(
    config: LlamaConfig, mesh: DeviceMesh, device: str, how: dict
) -> nn.Module:
    """The peer: the same shapes, units and precisions; eager, or Liger's kernels."""
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    theirs = TheirConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(theirs)
    if how.get("liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model)
    if "checkpointing" in how:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    fill(model, device)
    model.tie_weights()
    return model


def timed(model, loss, batches, team, steps: int, warm: int, device: str) -> float:
    """Seconds of a step: the median, after `warm` that do not count."""
    seconds: list[float] = []
    optimizer = make_adamw(model, 1e-5)
    for count in (warm, steps):
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        seconds.clear()
        hook = lambda run: seconds.append(run.seconds)
        train(model, optimizer, batches, count, loss=loss, team=team, hooks=(hook,))
    return statistics.median(seconds)


def mfu_flops(config: LlamaConfig, T: int) -> float:
    """FLOPs a token as gpu_baselines counts them: 6 N and full attention."""
    return (
        6 * count_parameters(config)
        + 12 * config.n_layers * config.n_heads * config.head_dim * T
    )


def measure_step(options, mesh, name: str, B: int, T: int, who: str, how: dict) -> dict:
    """One row: a model, made by `who`, trained for some steps."""
    config, device = config_of(name), options.device
    base = torch.cuda.memory_allocated() if device == "cuda" else 0
    data = mesh["shard"]
    if who == "transformers":
        model = transformers_model(config, data, device, how)
        loss = liger_loss if how.get("liger") else hf_loss
    else:
        model = ours(config, data, device, how)
        loss = how.get("loss", plain_loss)
    team = MeshTeam(mesh)
    batches = OneBatch(config, B, T, device)
    steps = 2 if options.smoke else options.steps
    seconds = timed(
        model, loss, batches, team, steps, 2 if options.smoke else 4, device
    )
    peak = torch.cuda.max_memory_allocated() - base if device == "cuda" else 0
    _, parts = sharded_peak(
        config,
        TrainingStep(
            batch_size=B, seq_len=T, checkpointing="checkpointing" in how, packed=False
        ),
        Sharding(ranks=data.size()),
    )
    predicted = sum(parts.values())
    plain = who == "minllama" and not how.get("compile") and "loss" not in how
    peak_rate = peak_flops(device) if device == "cuda" else None
    rate = B * T / seconds
    row = {
        "case": how.get("case", "step"),
        "who": who + how.get("words", ""),
        "model": name,
        "gpus": data.size(),
        "rows": B,
        "tokens": T,
        "checkpointing": how.get("checkpointing", "none"),
        "seconds": f"{seconds:.4f}",
        "tokens_per_s_gpu": f"{rate:.0f}",
        "MFU": f"{rate * mfu_flops(config, T) / peak_rate:.1%}" if peak_rate else "",
        "peak_GiB": f"{peak / GIB:.2f}",
        "predicted_GiB": f"{predicted / GIB:.2f}" if plain else "",
        "difference": f"{predicted / peak - 1:+.1%}" if plain and peak else "",
        "exposed": "",
    }
    if how.get("trace"):
        row["exposed"] = trace(options, model, loss, batches, team, how["trace"])
    del model, batches
    free(device)
    return row


def trace(options, model, loss, batches, team, name: str) -> str:
    """Profile one step; the share of it in which communication is all that happens."""
    optimizer = make_adamw(model, 1e-5)

    def step() -> None:
        train(model, optimizer, batches, 1, loss=loss, team=team)

    step()
    dist.barrier()
    spans = trace_step(step)
    if dist.get_rank() == 0 and not options.smoke:
        rows = [
            {"kind": kind, "start_ms": f"{1e3 * a:.3f}", "end_ms": f"{1e3 * b:.3f}"}
            for kind in (COMPUTE, COMMUNICATION)
            for a, b in intervals(spans, kind, gap=20e-6)
        ]
        record.write(f"dist_run_timeline_{name}", rows, options.device, options.folder)
    return f"{exposed_communication(spans):.2%}"


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def steps_8b(options) -> list[dict]:
    mesh = init_mesh(device=options.device)
    name, B, T = ("tiny", 2, 64) if options.smoke else (options.model, 2, 4096)
    full = {"checkpointing": "full"}
    jobs: list[tuple[str, int, dict]] = [("minllama", B, {**full, "trace": "eager"})]
    if not options.smoke:
        fused = {**full, "loss": fused_loss}
        compiled = {"compile": True, "words": ", compiled blocks, linear_cross_entropy"}
        fast = {"fast": True, "words": ", use_fast_ops, linear_cross_entropy"}
        jobs = [
            ("transformers", B, full),
            *jobs,
            ("minllama", 2 * B, {**fused, **fast}),
            ("minllama", 2 * B, {**fused, **compiled, "trace": "fast"}),
        ]
    return [
        guarded(partial(measure_step, options, mesh, name, rows, T, who, how))
        for who, rows, how in jobs
    ]


def fused_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The same loss without logits, by the chapter fast_ops."""
    hidden = model.hidden_states(batch.tokens)
    return head_loss(model.lm_head, hidden, batch.targets)


def steps_fast(options) -> list[dict]:
    """Ours and the peer with kernels and linear loss, in turn."""
    mesh = init_mesh(device=options.device)
    name, B, T = ("tiny", 2, 64) if options.smoke else (options.model, 4, 4096)
    ours = {"fast": True, "words": ", use_fast_ops, linear_cross_entropy"}
    theirs = {"liger": True, "words": " + Liger"}
    rows = []
    for policy in ({"checkpointing": "full"}, {}):
        for who, how in (("minllama", ours), ("transformers", theirs)):
            if how is theirs and options.device != "cuda":
                continue  # Liger's kernels need a GPU
            how = {"case": "fast", "loss": fused_loss, **how, **policy}
            job = partial(measure_step, options, mesh, name, B, T, who, how)
            rows.append(guarded(job))
    return rows


def scaling(options) -> list[dict]:
    """Weak scaling of 1B, on one GPU and on all, in turn."""
    world = dist.get_world_size()
    name, B, T = ("tiny", 2, 64) if options.smoke else ("llama-3.2-1b", 4, 4096)
    alone = init_device_mesh(
        options.device, (world, 1, 1), mesh_dim_names=("alone", "shard", "tensor")
    )
    together = init_mesh(device=options.device)
    rows: list[dict] = []
    for _ in range(1 if options.smoke else 3):
        for mesh in (alone, together):
            how = {"case": "scaling", "compile": not options.smoke}
            job = partial(measure_step, options, mesh, name, B, T, "minllama", how)
            rows.append(guarded(job))
    median = lambda gpus: statistics.median(
        float(r["tokens_per_s_gpu"]) for r in rows if r.get("gpus") == gpus
    )
    if world > 1 and all("seconds" in row for row in rows):
        say(f"scaling 1 -> {world}: {median(world) / median(1):.1%} of one GPU's rate")
    return rows


def generation(options) -> list[dict]:
    """Greedy tokens of the shipped model, whole and cut over the ranks, float32."""
    mesh = init_mesh(shard=1, tensor=dist.get_world_size(), device=options.device)
    tokens = torch.arange(1, 9, device=options.device)[None]
    how = {"max_new_tokens": 64, "stop_ids": ()}
    whole = MinimalLlama.from_pretrained("stories", device=options.device)
    expected = generate(whole, tokens, **how)
    tensor_parallel(whole, mesh, sequence=False)
    same = bool((generate(whole, tokens, **how) == expected).all())
    say(f"tensor parallel on {dist.get_world_size()}: 64 greedy tokens equal: {same}")
    return []


def guarded(job: Callable[[], dict]) -> dict:
    """A case that fails (a peer that is not installed) does not stop the others."""
    try:
        row = job()
        say(" · ".join(str(value) for value in row.values() if value != ""))
        return row
    except (ImportError, AttributeError, torch.OutOfMemoryError) as error:
        say(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        gc.collect()
        return {}


def say(words: str) -> None:
    if dist.get_rank() == 0:
        print(words, flush=True)


CASES = {
    "step": steps_8b,
    "fast": steps_fast,
    "scaling": scaling,
    "generate": generation,
}


def run(options: argparse.Namespace) -> None:
    """The body of each process."""
    torch.manual_seed(0)
    init_mesh(device=options.device)
    rows: list[dict] = []
    start = time.perf_counter()
    for case in options.cases.split(","):
        rows += [row for row in CASES[case](options) if row]
        say(f"  [{case}: {time.perf_counter() - start:.0f} s]")
    if dist.get_rank() == 0 and rows:
        print(record.table(rows))
        if options.device == "cuda" and not options.smoke:
            name = f"{options.name}_cuda_{dist.get_world_size()}"
            record.write(name, rows, options.device, options.folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="llama-3.1-8b", help="of the case step")
    parser.add_argument("--cases", default="step,scaling,generate")
    parser.add_argument("--steps", type=int, default=8, help="timed, of each row")
    parser.add_argument("--name", default="dist_run", help="of the table written")
    parser.add_argument("--smoke", action="store_true", help="seconds, writes nothing")
    parser.add_argument("--out", default=str(record.RESULTS))
    options = parser.parse_args()
    options.folder = Path(options.out)
    if "RANK" not in os.environ:
        launch(run, 2, options)
        return
    run(options)
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
