"""What a model costs, before it is built: parameters, FLOPs, bytes.

    a matrix of P weights    2 P FLOPs a token: a multiply and an add each
    attention                4 H d FLOPs for each pair of a token and a key it sees:
                             2 for the score, 2 for the sum over values
    the cache                2 N K d numbers a token: keys and values of each layer

A decoding step reads every weight and the whole cache to make one token a row, so
their bytes over the bandwidth bound its time from below. What is held for a while only
is told by `accounting_training` (kept for the backward pass) and `accounting_peak`.
"""

import math
import time
from dataclasses import dataclass

import torch

from minllama.architecture.config import LlamaConfig
from minllama.architecture.model import MinimalLlama

PARTS: tuple[str, ...] = ("embedding", "attention", "feed-forward", "norms", "head")

PEAK_FLOPS = {  # dense bf16 matrix rate, FLOP/s, by the vendors' datasheets
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}

BITS = {  # of a stored number, without scales
    "float32": 32, "bfloat16": 16, "float16": 16,
    "fp8": 8, "int8": 8, "int4": 4, "nf4": 4,
}  # fmt: skip
GROUPS = {"fp8": None, "int8": None, "int4": 128, "nf4": 64}  # None: a whole row
SCALE_BITS = 16


@dataclass(frozen=True, kw_only=True)
class Format:
    """How numbers are stored: 16 or 32 bits each, or a few bits and a scale a group.

    Args:
        dtype: one of `BITS`.
        group_size: numbers that share a 16-bit scale, G. None: the usual of the dtype,
            which is a whole row in int8 and fp8, 128 in int4, 64 in nf4.
        zero_bits: of a group's zero point; 0: symmetric, 4: packed as GPTQ and AWQ do,
            16: beside the scale as torchao does.
    """

    dtype: str = "bfloat16"
    group_size: int | None = None
    zero_bits: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in BITS:
            raise ValueError(f"dtype={self.dtype!r} must be one of {', '.join(BITS)}.")
        if self.dtype not in GROUPS and (self.group_size or self.zero_bits):
            raise ValueError(
                f"dtype={self.dtype!r} has no groups, but group_size="
                f"{self.group_size}, zero_bits={self.zero_bits} were given; they are "
                f"for {', '.join(GROUPS)}."
            )
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1.")
        if not 0 <= self.zero_bits <= 32:
            raise ValueError(f"zero_bits={self.zero_bits} must lie within 0..32.")

    def row_bytes(self, length: int) -> int:
        """Bytes of a row of numbers, its scales and zero points included.

        Example:
            >>> int4 = Format(dtype="int4", group_size=128)
            >>> int4.row_bytes(4096) * 8 / 4096  # bits per weight: 4 + 16 / 128
            4.125
        """
        bits = length * BITS[self.dtype]
        if self.dtype in GROUPS:
            group = self.group_size or GROUPS[self.dtype] or length
            bits += math.ceil(length / group) * (SCALE_BITS + self.zero_bits)
        return math.ceil(bits / 8)


def named_shapes(config: LlamaConfig) -> dict[str, torch.Size]:
    """Every parameter's name and shape; a tied head is not there twice."""
    with torch.device("meta"):
        model = MinimalLlama.from_config(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def part_of(name: str) -> str:
    """The part of a model that a parameter belongs to, one of `PARTS`.

    Example:
        >>> part_of("layers.0.self_attn.q_norm.weight")
        'norms'
    """
    if "norm" in name.split(".")[-2]:
        return "norms"
    places = {"embed_tokens": "embedding", "self_attn": "attention",
              "mlp": "feed-forward", "lm_head": "head"}  # fmt: skip
    return next(places[word] for word in name.split(".") if word in places)


def parameters_by_part(config: LlamaConfig) -> dict[str, int]:
    """Parameters of each of `PARTS`; a tied head has none of its own.

    Example:
        >>> parameters_by_part(LlamaConfig.from_name("llama-3.2-1b"))["embedding"]
        262668288
    """
    parts = dict.fromkeys(PARTS, 0)
    for name, shape in named_shapes(config).items():
        parts[part_of(name)] += shape.numel()
    return parts


def count_parameters(config: LlamaConfig) -> int:
    """Parameters of a model of this config; a tied head counts once.

    Example:
        >>> count_parameters(LlamaConfig.from_name("llama-3.1-8b"))
        8030261248
    """
    return sum(parameters_by_part(config).values())


def weight_bytes(
    config: LlamaConfig, matrices: Format, rest: Format | None = None
) -> dict[str, int]:
    """Bytes of each of `PARTS`.

    Args:
        config: of the model.
        matrices: format of the matrices of the blocks.
        rest: of embedding and head. None: as `matrices` if those have no groups, else
            16 bits. Vectors (norms, biases) never have groups.
    """
    plain = Format() if matrices.dtype in GROUPS else matrices
    rest = rest or plain
    parts = dict.fromkeys(PARTS, 0)
    for name, shape in named_shapes(config).items():
        part = part_of(name)
        inner = part in ("attention", "feed-forward")
        format = plain if len(shape) == 1 else matrices if inner else rest
        parts[part] += shape[:-1].numel() * format.row_bytes(shape[-1])
    return parts


def cache_bytes(
    config: LlamaConfig, batch_size: int, seq_len: int, format: Format | None = None
) -> int:
    """Bytes of keys and values of all layers, for seq_len tokens in each row.

    A window (Mistral 7B v0.1) does not shrink the hub's cache: all tokens are kept.

    Args:
        config: of the model.
        batch_size: rows.
        seq_len: tokens that each row has room for.
        format: None: bfloat16. A key or value of one head is the row of a format.

    Example:
        >>> cache_bytes(LlamaConfig.from_name("llama-3.2-1b"), 1, 1)
        32768
    """
    vector = (format or Format()).row_bytes(config.head_dim)
    return 2 * config.n_layers * config.n_kv_heads * vector * batch_size * seq_len


def decode_bytes(
    config: LlamaConfig, weights: dict[str, int], batch_size: int, cache: int
) -> int:
    """Bytes that one decoding step must read: the matrices once, and the cache.

    Of an embedding that is not the head, too, only one row per token is read.

    Args:
        config: of the model.
        weights: bytes by part, as `weight_bytes` gives them.
        batch_size: tokens of the step.
        cache: bytes, as `cache_bytes` gives them for the present context.
    """
    table = weights["embedding"]
    looked_up = (
        table if config.tie_embeddings else table * batch_size / config.vocab_size
    )
    return round(sum(weights.values()) - table + looked_up + cache)


def seen_keys(config: LlamaConfig, new: int, context: int) -> int:
    """Pairs of a new token and a key it sees: causal, and within the window.

    Example:
        >>> config = LlamaConfig(vocab_size=2, dim=2, n_layers=1, n_heads=1)
        >>> seen_keys(config, new=3, context=3)  # 1 + 2 + 3
        6
    """
    window = config.sliding_window or context
    first = (
        context - new + 1
    )  # keys that the first new token sees, were there no window
    growing = max(0, min(context, window) - first + 1)  # tokens not yet at the window
    return growing * (2 * first + growing - 1) // 2 + (new - growing) * window


def forward_flops_by_part(
    config: LlamaConfig, new: int, context: int | None = None, heads: int | None = None
) -> dict[str, int]:
    """FLOPs of a forward pass over one row, by part.

    Norms, rope and other element-wise work are left out: they cost time, not FLOPs.
    The embedding is a look-up.

    Args:
        config: of the model.
        new: tokens computed.
        context: tokens seen in the end, the new ones included. None: `new`.
        heads: tokens that get logits. None: all. Generation wants one.
    """
    D, q_dim = config.dim, config.n_heads * config.head_dim
    kv_dim = config.n_kv_heads * config.head_dim
    pairs = seen_keys(config, new, context or new)
    per_layer = {
        "attention": 2 * new * 2 * D * (q_dim + kv_dim),
        "scores and values": 4 * q_dim * pairs,
        "feed-forward": 2 * new * 3 * D * config.ffn_dim,
    }
    parts = {part: config.n_layers * flops for part, flops in per_layer.items()}
    parts["head"] = 2 * (new if heads is None else heads) * D * config.vocab_size
    return parts


def forward_flops(config: LlamaConfig, seq_len: int) -> float:
    """FLOPs per token of a forward pass over texts of seq_len tokens, causal.

    Matrices, head included (tied or not, it is multiplied), plus attention with the
    keys that a token sees on average, (seq_len + 1) / 2.
    """
    return sum(forward_flops_by_part(config, seq_len).values()) / seq_len


def training_flops(config: LlamaConfig, seq_len: int) -> float:
    """FLOPs per token of forward and backward: three times the forward.

    Each product y = W x has two in its backward pass, for x and for W. What a kernel
    computes a second time (scores, checkpointed blocks) is work, but not progress.
    """
    return 3 * forward_flops(config, seq_len)


def peak_flops(device: torch.device | str) -> float | None:
    """The datasheet's dense bf16 rate of a known GPU in FLOP/s, else None."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for key, rate in PEAK_FLOPS.items() if key in name), None)


def matmul_rate(
    device: torch.device | str, dtype: torch.dtype = torch.float32, size: int = 1024
) -> float:
    """What this machine's matrix products reach, FLOP/s, measured in about 0.1 s."""
    own = torch.Generator(device).manual_seed(0)  # a resumed run draws as before
    a = torch.randn(size, size, device=device, dtype=dtype, generator=own)
    best, until = math.inf, time.perf_counter() + 0.1
    while best == math.inf or time.perf_counter() < until:
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
