"""What training with an adapter costs, before anything is built.

    weights       all of the model's, frozen, and the adapter's few
    optimizer     two numbers for each number that trains
    gradients     one for each number that trains
    activations   what norms, attention and SwiGLU keep, since the gradient still flows
                  through all layers; but a frozen linear layer keeps nothing: its input
                  was for the gradient of its weight. An adapter keeps that input, and
                  what its own products need.

So optimizer and gradients nearly vanish, and activations do not.
"""

from dataclasses import dataclass

from minllama.architecture.accounting import BITS, count_parameters
from minllama.architecture.accounting_training import (
    TrainingStep,
    saved_by_block,
    saved_bytes,
    saved_elsewhere,
)
from minllama.architecture.config import LlamaConfig

METHODS = ("full", "lora", "dora", "ia3", "prefix")
READERS = {  # what a linear layer's input is called in the hub's accounting
    "q_proj": "input of q_proj, k_proj, v_proj",
    "k_proj": "input of q_proj, k_proj, v_proj",
    "v_proj": "input of q_proj, k_proj, v_proj",
    "o_proj": None,  # attention keeps its output itself
    "gate_proj": "input of gate_proj, up_proj",
    "up_proj": "input of gate_proj, up_proj",
    "down_proj": "silu(gate) * up, input of down_proj",
}
INPUTS = tuple(dict.fromkeys(name for name in READERS.values() if name))
TARGETS = {"ia3": ("k_proj", "v_proj", "down_proj")}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A method and its size.

    Args:
        method: one of METHODS.
        rank: of LoRA and DoRA; tokens of a prefix.
        targets: last words of linear layers; None: all of a block, or those of IA3.

    Raises:
        ValueError: an unknown method or target, or a rank below 1.
    """

    method: str
    rank: int = 16
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is none of {', '.join(METHODS)}.")
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1.")
        if unknown := [name for name in self.targets or () if name not in READERS]:
            raise ValueError(f"target {unknown[0]!r} is none of {', '.join(READERS)}.")

    @property
    def layers(self) -> tuple[str, ...]:
        """The linear layers of a block that are adapted."""
        if self.method in ("full", "prefix"):
            return ()
        return self.targets or TARGETS.get(self.method, tuple(READERS))


def linear_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linear layers of a block."""
    D, F = config.dim, config.ffn_dim
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return {
        "q_proj": (D, q), "k_proj": (D, kv), "v_proj": (D, kv), "o_proj": (q, D),
        "gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D),
    }  # fmt: skip


def adapter_parameters(config: LlamaConfig, plan: Plan) -> int:
    """How many numbers train.

    Example:
        >>> config = LlamaConfig.from_name("llama-3.1-8b")
        >>> adapter_parameters(config, Plan(method="lora", rank=16))
        41943040
    """
    if plan.method == "full":
        return count_parameters(config)
    if plan.method == "prefix":
        width = 2 * config.n_kv_heads * config.head_dim
        return config.n_layers * plan.rank * width
    total, shapes = 0, linear_shapes(config)
    for name in plan.layers:
        d_in, d_out = shapes[name]
        if plan.method == "ia3":
            total += d_in if name == "down_proj" else d_out
        else:
            total += plan.rank * (d_in + d_out) + (plan.method == "dora") * d_out
    return config.n_layers * total


def adapter_saved_bytes(config: LlamaConfig, step: TrainingStep, plan: Plan) -> int:
    """Bytes held between forward and backward pass beside weights and states.

    Without autocast and without checkpointing. Before the first adapted layer nothing
    is kept, since no gradient goes there: of the first block, its first norm.

    Raises:
        ValueError: a step that autocasts or checkpoints.
    """
    if step.autocast or step.checkpointing:
        raise ValueError(
            f"autocast={step.autocast}, checkpointing={step.checkpointing}: adapters "
            "are accounted for without; see saved_bytes for what these change."
        )
    if plan.method == "full":
        return saved_bytes(config, step)
    block = _frozen_block(config, step)
    kept = {READERS[name] for name in plan.layers}
    if plan.method == "ia3":  # the inputs of k and v are not needed, their outputs are
        kept = {READERS["down_proj"]} & kept
    total = sum(size for what, size in block.items() if what not in INPUTS)
    total += sum(block[what] for what in kept if what)
    total += step.tokens * step.product * _own_width(config, plan)
    if plan.method == "prefix":
        total += _prefix_bytes(config, step, plan.rank)
    elsewhere = saved_elsewhere(config, step)
    outside = sum(elsewhere.values()) - elsewhere["input of lm_head"]
    outside -= _normed(step, config.dim)
    first = 0  # what the first block does not keep, as nothing below it learns
    if plan.method == "prefix" or {"q_proj", "k_proj", "v_proj"} & set(plan.layers):
        first = block["residual stream, for input_layernorm"]
    return config.n_layers * total - first + outside


def _frozen_block(config: LlamaConfig, step: TrainingStep) -> dict[str, int]:
    """`saved_by_block` where norms do not train."""
    block = saved_by_block(config, step)
    widths = {what: config.dim for what in block if what.startswith("residual")}
    widths |= {
        "queries, for q_norm": config.n_heads * config.head_dim,
        "keys, for k_norm": config.n_kv_heads * config.head_dim,
    }
    return {
        what: size - (_normed(step, widths[what]) if what in widths else 0)
        for what, size in block.items()
    }


def _normed(step: TrainingStep, width: int) -> int:
    """What a norm on a CPU keeps for its weight alone: x / rms, in float32."""
    return 4 * width * step.tokens if step.device == "cpu" else 0


def _own_width(config: LlamaConfig, plan: Plan) -> int:
    """Numbers per token that the adapters of a block keep for themselves."""
    width, shapes = 0, linear_shapes(config)
    for name in plan.layers:
        if plan.method in ("lora", "dora"):
            width += plan.rank  # A x
        if plan.method == "dora" or (plan.method == "ia3" and name != "down_proj"):
            width += shapes[name][1]  # what m or l multiplies
    return width


def _prefix_bytes(config: LlamaConfig, step: TrainingStep, size: int) -> int:
    """What a prefix adds in a block: longer keys and values, a mask in any case."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    rows, T = step.batch_size, step.seq_len
    keys = 2 * step.product * rows * ((T + size) * q - T * (q if step.packed else kv))
    mask = step.product * (rows if step.packed else 1) * T
    return keys + mask * (size if step.packed else T + size)


def adapter_memory(
    config: LlamaConfig, step: TrainingStep, plan: Plan
) -> dict[str, int]:
    """Bytes of a training step by what they are for.

    Args:
        config: of the model.
        step: batch, length and types. `state_dtype` and `dtype` are the adapter's, too.
        plan: what is trained.
    """
    return _memory(config, step, plan, count_parameters(config))


def _memory(
    config: LlamaConfig, step: TrainingStep, plan: Plan, whole: int
) -> dict[str, int]:
    full = plan.method == "full"
    trained = whole if full else adapter_parameters(config, plan)
    state = BITS[step.state_dtype or step.dtype] // 8
    return {
        "weights": step.weight * (whole if full else whole + trained),
        "optimizer": 2 * state * trained,
        "gradients": step.weight * trained,
        "activations": adapter_saved_bytes(config, step, plan),
    }


def memory_table(
    names: tuple[str, ...] = ("llama-3.2-1b", "llama-3.1-8b"),
    step: TrainingStep | None = None,
    rank: int = 16,
) -> list[dict]:
    """Full, LoRA, DoRA, IA3 and prefix side by side: a row a model and method.

    Args:
        names: of the registry.
        step: None: one row of 2,048 tokens in bfloat16.
        rank: of LoRA and DoRA, and tokens of the prefix.
    """
    step = step or TrainingStep(batch_size=1, seq_len=2048)
    rows = []
    for name in names:
        config = LlamaConfig.from_name(name)
        whole = count_parameters(config)  # builds shapes, so once a model
        for method in METHODS:
            parts = _memory(config, step, Plan(method=method, rank=rank), whole)
            trained = parts["gradients"] // step.weight
            row = {"model": name, "method": method, "trained": trained}
            row |= {"share": trained / whole, **parts, "total": sum(parts.values())}
            rows.append(row)
    return rows
