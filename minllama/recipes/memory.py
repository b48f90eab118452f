"""What a model needs before it is bought, downloaded or built: from its config alone.

Generation: weights, cache, and what reading the prompt takes for a moment. Training:
the fullest moment of a step. Predicted and measured side by side: bench_memory.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from minllama.architecture.accounting import (
    BITS,
    GROUPS,
    Format,
    cache_bytes,
    decode_bytes,
    forward_flops_by_part,
    parameters_by_part,
    weight_bytes,
)
from minllama.architecture.accounting_peak import (
    moments,
    prefill_bytes,
    training_peak,
)
from minllama.architecture.accounting_training import TrainingStep, saved_by_block
from minllama.architecture.config import LlamaConfig
from minllama.recipes.info import find_config

GIB, MIB = 2**30, 2**20
GPUS = {  # GiB of memory, as torch.cuda.get_device_properties tells
    "24 GB, RTX 4090": 23.5,
    "48 GB, L40S": 44.4,
    "80 GB, H100": 79.1,
    "141 GB, H200": 139.8,
}
RESERVE = 1.0  # GiB: CUDA's context, workspaces of matrix products, gaps between blocks

Row = tuple[int, str, str]  # bytes, of what, how they come about


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """What `minllama memory NAME` takes; each other field is a flag of that name.

    Args:
        name: registered name, shipped name, or folder
        dtype: of the weights: float32, bfloat16, float16, fp8, int8, int4, nf4
        group_size: weights that share a scale; else a row, 128 in int4, 64 in nf4
        zero_bits: bits of a group's zero point; 4 in GPTQ and AWQ, 16 in torchao
        head_dtype: of embedding and head; else dtype, or 16 bits where that has scales
        cache_dtype: of keys and values: float32, bfloat16, float16, fp8, int8, int4
        batch_size: rows
        seq_len: tokens of a row; else the model's context, but at most 8192
        bandwidth: of the GPU's memory in GB/s, for the shortest decoding step
        training: a training step in place of generation
        autocast: training: matrix products in bfloat16 over float32 weights
        optimizer: training: adamw or muon
        state_dtype: training: of the optimizer's numbers; else that of the weights
        checkpointing: training: blocks keep their input only and run twice
        accumulate: training: earlier batches of the step left their gradients
        unpacked: training: each row is one text, so attention needs no mask
        tensors: training: list what one block keeps, tensor by tensor
    """

    name: str
    dtype: str = "bfloat16"
    group_size: int | None = None
    zero_bits: int = 0
    head_dtype: str | None = None
    cache_dtype: str = "bfloat16"
    batch_size: int = 1
    seq_len: int | None = None
    bandwidth: float | None = None
    training: bool = False
    autocast: bool = False
    optimizer: str = "adamw"
    state_dtype: str | None = None
    checkpointing: bool = False
    accumulate: bool = False
    unpacked: bool = False
    tensors: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len", "bandwidth"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be above 0.")


def report(options: MemoryOptions) -> str:
    """The table that `minllama memory` prints.

    Raises:
        ValueError: no such model, or options that contradict each other.
    """
    config = find_config(options.name)
    seq_len = options.seq_len or min(config.max_seq_len, 8192)
    rows = f"{options.batch_size} row{'s' * (options.batch_size > 1)} of {seq_len:,}"
    count = sum(parameters_by_part(config).values())
    task = "a training step" if options.training else "generation"
    title = f"{options.name} · {count:,} parameters · {task}, {rows} tokens"
    make = _training if options.training else _generation
    return "\n".join([title, "", *make(config, options, seq_len)])


def _generation(config: LlamaConfig, options: MemoryOptions, T: int) -> list[str]:
    B = options.batch_size
    matrices = Format(
        dtype=options.dtype, group_size=options.group_size, zero_bits=options.zero_bits
    )
    head = Format(dtype=options.head_dtype) if options.head_dtype else None
    keys = Format(dtype=options.cache_dtype)
    weights = weight_bytes(config, matrices, head)
    cache = cache_bytes(config, B, T, keys)
    size = 4 if options.dtype == "float32" else 2
    width = config.head_dim
    rows: list[Row] = [
        (weights[part], part, _stored(count, weights[part]))
        for part, count in parameters_by_part(config).items()
        if count
    ]
    bits = keys.row_bytes(width) * 8 / width
    vectors = f"2 x {config.n_layers} layers x {config.n_kv_heads} heads x {width}"
    rows += [
        (cache, "cache", f"{B * T:,} tokens x {vectors} numbers x {bits:g} bits"),
        (
            prefill_bytes(config, B, T, size),
            "prompt",
            "for a moment, while one block reads all of it",
        ),
    ]
    lines = [*_table(rows), "", *_fits(sum(row[0] for row in rows)), ""]
    read = decode_bytes(config, weights, B, cache)
    return lines + _decoding(read, B, options.bandwidth) + _work(config, B, T)


def _stored(count: int, size: int) -> str:
    return f"{count:,} numbers x {size * 8 / count:.4g} bits"


def _decoding(read: int, batch_size: int, bandwidth: float | None) -> list[str]:
    words = f"  A decoding step at full context reads {read / 1e9:,.3g} GB"
    if bandwidth is None:
        return [f"{words}; --bandwidth (GB/s) turns that into a time."]
    seconds = read / (bandwidth * 1e9)
    return [
        f"{words}: at {bandwidth:,g} GB/s {seconds * 1e3:,.3g} ms",
        f"  or more, so at most {batch_size / seconds:,.0f} tokens/s.",
    ]


def _work(config: LlamaConfig, B: int, T: int) -> list[str]:
    """FLOPs of reading the prompt and of one decoding step at its end, by part."""
    prompt = forward_flops_by_part(config, T, heads=1)
    step = forward_flops_by_part(config, 1, T)
    lines = ["", "       TFLOP       GFLOP", "      prompt   next step"]
    for part in prompt:
        lines.append(
            f"{B * prompt[part] / 1e12:12,.3f}{B * step[part] / 1e9:12,.3f}  {part}"
        )
    totals = B * sum(prompt.values()) / 1e12, B * sum(step.values()) / 1e9
    return [*lines, f"{totals[0]:12,.3f}{totals[1]:12,.3f}  total"]


def _training(config: LlamaConfig, options: MemoryOptions, T: int) -> list[str]:
    if options.dtype in GROUPS:
        plain = ", ".join(dtype for dtype in BITS if dtype not in GROUPS)
        raise ValueError(
            f"dtype={options.dtype!r} cannot train: a step is smaller than its "
            f"spacing. Use one of {plain}, or train adapters over frozen weights "
            "(chapter peft)."
        )
    step = TrainingStep(
        batch_size=options.batch_size,
        seq_len=T,
        dtype=options.dtype,
        autocast=options.autocast,
        optimizer=options.optimizer,
        state_dtype=options.state_dtype,
        checkpointing=options.checkpointing,
        accumulate=options.accumulate,
        packed=not options.unpacked,
    )
    moment, parts = training_peak(config, step)
    rows = [(n, part, _reason(part, config, step)) for part, n in parts.items() if n]
    lines = [f"  The fullest moment is the {moment}.", "", *_table(rows), ""]
    always = parts["weights"] + parts["optimizer"]
    totals = {
        name: always + sum(held.values())
        for name, held in moments(config, step).items()
    }
    lines += ["  Every moment, weights and optimizer included:"]
    lines += [*_table([(n, name, "") for name, n in totals.items()])[:-1], ""]
    lines += _fits(sum(parts.values()))
    if options.tensors:
        saved = saved_by_block(config, step)
        each = [(size, what, f"{size:,} bytes") for what, size in saved.items()]
        lines += ["", "  What one block keeps for its backward pass:", *_table(each)]
    flops = 3 * step.batch_size * sum(forward_flops_by_part(config, T).values())
    return [*lines, "", f"  A step is {flops / 1e12:,.1f} TFLOP: three forward passes."]


def _reason(part: str, config: LlamaConfig, step: TrainingStep) -> str:
    """How the bytes of a part come about, in words."""
    N, state = config.n_layers, step.state_dtype or step.dtype
    numbers = "2 numbers" if step.optimizer == "adamw" else "1 or 2 numbers"
    kept = f"inputs of {N} blocks" if step.checkpointing else f"by each of {N} blocks"
    words = {
        "weights": f"{step.weight} bytes each",
        "optimizer": f"{step.optimizer}: {numbers} a weight, {state}",
        "kept by the blocks": f"for the backward pass: {kept}",
        "kept beside them": "the batch, angles of rope, last norm, input of the head",
        "log p and two gradients": f"3 x 4 bytes x {config.vocab_size:,} words a token",
        "gradients of activations": "on their way through",
        "temporaries": "of the optimizer, given back at once",
        "gradients": "of the weights, as far as they are there",
    }
    return words.get(part, "")


def _table(rows: Sequence[Row]) -> list[str]:
    total = sum(row[0] for row in rows)
    unit, name = (GIB, "GiB") if total > GIB / 4 else (MIB, "MiB")
    width = max(len(what) for _, what, _ in rows)
    lines = [f"{name:>12}"]
    lines += [f"{n / unit:12,.3f}  {what:<{width}}  {how}" for n, what, how in rows]
    return [line.rstrip() for line in [*lines, f"{total / unit:12,.3f}  total"]]


def _fits(needed: float) -> list[str]:
    """Which GPUs hold that many bytes, and by what margin."""
    lines = [f"  Does it fit? {RESERVE:g} GiB is set aside for CUDA itself and gaps."]
    for name, capacity in GPUS.items():
        left = capacity - RESERVE - needed / GIB
        words = (
            f"yes, {left:,.1f} GiB to spare" if left >= 0 else f"no, {-left:,.1f} GiB"
        )
        lines.append(f"    {name:<16} {words}{'' if left >= 0 else ' too little'}")
    return lines
