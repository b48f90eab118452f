"""What a model is, in numbers: from its config alone, nothing is loaded."""

from pathlib import Path

from minllama.architecture.accounting import count_parameters, forward_flops
from minllama.architecture.config import REGISTRY, LlamaConfig
from minllama.architecture.weights import open_weights, shipped_names


def describe(name: str | None = None) -> str:
    """A table of one model, or of the names that exist.

    Raises:
        ValueError: no such name or folder.
    """
    if name is None:
        shipped = ", ".join(shipped_names())
        return (
            f"Shipped, with weights: {shipped}\n"
            f"Known by their numbers: {', '.join(REGISTRY)}\n"
            "minllama info NAME, or a folder with a config.json, tells more."
        )
    config = find_config(name)
    d, kv = config.head_dim, config.n_kv_heads
    scaling = config.rope_scaling
    scaled = "" if scaling is None else f", scaled by {scaling['factor']:g}"
    cache = 2 * config.n_layers * kv * d * 2
    rows = {
        "parameters": f"{count_parameters(config):,}",
        "vocabulary V": f"{config.vocab_size:,}",
        "width D": f"{config.dim:,}",
        "layers N": config.n_layers,
        "heads H": f"{config.n_heads} queries, {kv} keys and values, {d} wide",
        "feed-forward F": f"{config.ffn_dim:,}",
        "rope": f"theta {config.rope_theta:,.0f}{scaled}",
        "context": f"{config.max_seq_len:,} tokens",
        "head": "tied to the embedding" if config.tie_embeddings else "of its own",
        "cache": f"{cache:,} bytes a token in 16 bits",
        "forward": f"{forward_flops(config, 1) / 1e9:,.3g} GFLOP a token at no context",
    }
    width = max(map(len, rows))
    return "\n".join([name, *(f"  {key:<{width}}  {v}" for key, v in rows.items())])


def find_config(name: str) -> LlamaConfig:
    """The config of a registered name, a shipped model or a folder.

    Raises:
        ValueError: none of these; the message lists what exists.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    if name in shipped_names() or Path(name).exists():
        return open_weights(name).config
    raise ValueError(
        f"{name!r} is no folder and no known model. Shipped: "
        f"{', '.join(shipped_names())}. Registered: {', '.join(REGISTRY)}."
    )
