"""What a training step keeps between forward and backward pass, tensor by tensor.

Weights and optimizer states are there all the time. What the backward pass will need
comes on top, and is most of it: SwiGLU alone keeps four tensors of width F in each
block, and the loss keeps log p, a float32 number for each word of the vocabulary and
each token. `accounting_peak` adds what comes and goes.

All this is what eager PyTorch does with `model.py` and `next_token_loss`, as it is and
not as it could be: a fused kernel, or a change there, changes it here.
"""

from dataclasses import dataclass

from minllama.architecture.accounting import BITS, parameters_by_part
from minllama.architecture.config import LlamaConfig

TRAINABLE = ("float32", "bfloat16", "float16")
_CHOICES = {
    "dtype": TRAINABLE,
    "state_dtype": (None, *TRAINABLE),
    "optimizer": ("adamw", "muon"),
    "device": ("cuda", "cpu"),
}


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """One step of `train`, as far as memory goes.

    Args:
        batch_size: rows, B.
        seq_len: tokens of a row, T.
        dtype: of weights and gradients: float32, bfloat16 or float16.
        autocast: matrix products in bfloat16 over float32 weights.
        optimizer: adamw or muon.
        state_dtype: of the optimizer's numbers. None: that of the weights.
        checkpointing: a block keeps only its input, and runs again when the backward
            pass comes by.
        accumulate: the gradients of earlier batches of the step are there already.
        packed: rows hold documents with borders, as `PackedBatches` makes them, so
            attention gets a mask. False: each row is one text.
        device: cuda, where a norm is one kernel and AdamW steps without temporaries;
            or cpu.

    Raises:
        ValueError: a number or a word out of range; the message names it.
    """

    batch_size: int
    seq_len: int
    dtype: str = "bfloat16"
    autocast: bool = False
    optimizer: str = "adamw"
    state_dtype: str | None = None
    checkpointing: bool = False
    accumulate: bool = False
    packed: bool = True
    device: str = "cuda"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                words = ", ".join(str(word) for word in allowed if word)
                raise ValueError(f"{name}={value!r} cannot train; use one of {words}.")
        if self.autocast and self.dtype != "float32":
            raise ValueError(
                f"autocast=True with dtype={self.dtype!r}: autocast is for float32 "
                "weights; drop it, or set dtype to float32."
            )
        if self.batch_size < 1 or self.seq_len < 1:
            raise ValueError(
                f"batch_size={self.batch_size} and seq_len={self.seq_len} must be at "
                "least 1."
            )

    @property
    def tokens(self) -> int:
        """B T."""
        return self.batch_size * self.seq_len

    @property
    def weight(self) -> int:
        """Bytes of a weight, its gradient, and a number of the residual stream."""
        return BITS[self.dtype] // 8

    @property
    def product(self) -> int:
        """Bytes of the numbers that matrix products and attention read and write."""
        return 2 if self.autocast else self.weight

    @property
    def cast(self) -> int:
        """Bytes of a weight's bfloat16 copy, which autocast makes for autograd."""
        return 2 if self.autocast else 0


def _is_masked(config: LlamaConfig, step: TrainingStep) -> bool:
    """Whether attention gets a mask; then keys and values are repeated, too."""
    window = config.sliding_window
    return step.packed or (window is not None and window < step.seq_len)


def _mask_entries(step: TrainingStep) -> int:
    """Pairs of tokens that the mask tells about; rows without borders share one."""
    return (step.batch_size if step.packed else 1) * step.seq_len**2


def _norm_bytes(step: TrainingStep, width: int, size: int, heads: int = 1) -> int:
    """Bytes per token that RMSNorm keeps: its input, and 1 / rms in float32.

    On a CPU it is no single kernel and keeps two float32 tensors of the input's shape.
    """
    return (size if step.device == "cuda" else 8) * width + 4 * heads


def saved_by_block(config: LlamaConfig, step: TrainingStep) -> dict[str, int]:
    """Bytes that one block keeps for its backward pass, tensor by tensor.

    A linear layer keeps its input, which layers that read the same tensor share; under
    autocast each casts a copy of its own. Rope keeps only the angles, a sum nothing.
    SwiGLU keeps four tensors of width F, the most of all.
    """
    D, F, H = config.dim, config.ffn_dim, config.n_heads
    q_dim, kv_dim = H * config.head_dim, config.n_kv_heads * config.head_dim
    r, b = step.weight, step.product
    masked = _is_masked(config, step)
    per_token = {
        "residual stream, for input_layernorm": _norm_bytes(step, D, r),
        "input of q_proj, k_proj, v_proj": b * D * (3 if step.autocast else 1),
        "queries": b * q_dim,
        "keys": b * (q_dim if masked else kv_dim),
        "values": b * (q_dim if masked else kv_dim),
        "logsumexp of attention, float32": 4 * H,
        "output of attention, input of o_proj": b * q_dim,
        "residual stream, for post_attention_layernorm": _norm_bytes(step, D, r),
        "input of gate_proj, up_proj": b * D * (2 if step.autocast else 1),
        "gate": b * F,
        "silu(gate)": b * F,
        "up": b * F,
        "silu(gate) * up, input of down_proj": b * F,
    }
    if config.model_type == "qwen3":  # r: from torch 2.12 autocast norms in float32
        per_token["queries, for q_norm"] = _norm_bytes(step, q_dim, r, H)
        per_token["keys, for k_norm"] = _norm_bytes(step, kv_dim, r, config.n_kv_heads)
    saved = {what: step.tokens * size for what, size in per_token.items()}
    if masked:  # blocks share its booleans, but SDPA turns them into numbers in each
        saved["mask, as numbers to add"] = b * _mask_entries(step)
    return saved


def saved_elsewhere(config: LlamaConfig, step: TrainingStep) -> dict[str, int]:
    """Bytes that are kept beside the blocks when the forward pass has ended."""
    rows = step.batch_size if step.packed else 1  # else all rows share their positions
    norm = _norm_bytes(step, config.dim, step.weight)
    return {
        "tokens, targets, positions": 3 * 8 * step.tokens,
        "cosines and sines, float32": 2 * 4 * config.head_dim * rows * step.seq_len,
        "residual stream, for the last norm": norm * step.tokens,
        "input of lm_head": step.product * config.dim * step.tokens,
        "bfloat16 copy of lm_head": step.cast * config.vocab_size * config.dim,
        "log p, float32": 4 * config.vocab_size * step.tokens,
    }


def block_matrices(config: LlamaConfig) -> int:
    """Weights in the matrices of one block."""
    heads = (config.n_heads + config.n_kv_heads) * config.head_dim
    return config.dim * (2 * heads + 3 * config.ffn_dim)


def block_bytes(config: LlamaConfig, step: TrainingStep) -> tuple[int, int, int]:
    """Bytes of a block in full, of what it keeps until its turn, and of the mask.

    They differ under checkpointing, where a block keeps its input, and all of them the
    one mask of booleans that they will be run with again.
    """
    full = sum(saved_by_block(config, step).values())
    full += step.cast * block_matrices(config)
    if not step.checkpointing:
        return full, full, 0
    mask = _mask_entries(step) if _is_masked(config, step) else 0
    return full, step.weight * config.dim * step.tokens, mask


def saved_bytes(config: LlamaConfig, step: TrainingStep) -> int:
    """All that is held between forward and backward pass, beside weights and states.

    Example:
        >>> step = TrainingStep(batch_size=1, seq_len=4096)
        >>> saved = saved_bytes(LlamaConfig.from_name("llama-3.2-1b"), step)
        >>> round(saved / 2**30, 1)
        8.5
    """
    _, kept, mask = block_bytes(config, step)
    elsewhere = sum(saved_elsewhere(config, step).values())
    return config.n_layers * kept + mask + elsewhere


def state_bytes(config: LlamaConfig, step: TrainingStep) -> int:
    """Bytes of the optimizer: two numbers a weight; Muon: one for those in blocks."""
    parts = parameters_by_part(config)
    numbers = 2 * sum(parts.values())
    if step.optimizer == "muon":
        numbers -= config.n_layers * block_matrices(config)
    return numbers * BITS[step.state_dtype or step.dtype] // 8
