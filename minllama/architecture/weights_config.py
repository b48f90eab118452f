"""`config.json`: Hugging Face's description of a model, read and written.

The same numbers as LlamaConfig under longer names, in two spellings. Since version 5
of transformers `rope_parameters` holds the base and the scaling together and the type
of the weights is `dtype`; before, they were `rope_theta`, `rope_scaling` and
`torch_dtype`, and the scaling's `rope_type` was once `type`. Both are read.

A key that would change the logits and that nothing here builds is refused by name; one
that is absent has transformers' default for that family.
"""

from pathlib import Path

import torch

from minllama.architecture.config import LlamaConfig
from minllama.architecture.families import FAMILIES
from minllama.architecture.weights_files import DTYPES, read_json

NAMES = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
    "sliding_window": "sliding_window",
    "bos_id": "bos_token_id",
}  # rope and the end ids have shapes of their own
REQUIRED = ("vocab_size", "dim", "n_layers", "n_heads", "ffn_dim")
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
DEFAULTS = {"norm_eps": 1e-6, "tie_embeddings": False}  # where config.json is silent
FAMILY_DEFAULTS = {"mistral": {"sliding_window": 4096}, "qwen3": {"head_dim": 128}}
ROPE_KEYS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def read_config(folder: Path) -> LlamaConfig:
    """The config of a Hugging Face folder.

    Where a `generation_config.json` names the end ids, it wins: Llama 3 Instruct ends a
    turn with one token and a text with another, and only that file knows both.

    Raises:
        ValueError: `config.json` is broken, incomplete, or asks for what is not built.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    _refuse_unbuilt(path, raw)
    known = {ours: raw[theirs] for ours, theirs in NAMES.items() if theirs in raw}
    absent = [NAMES[name] for name in REQUIRED if known.get(name) is None]
    if absent:
        raise ValueError(
            f"{path} lacks {', '.join(absent)}; without them the model has no shape. "
            "Download it again."
        )
    kind = raw["model_type"]
    fields = {**DEFAULTS, **FAMILY_DEFAULTS.get(kind, {}), **known, "model_type": kind}
    if kind != "mistral":
        fields["sliding_window"] = None  # Qwen states one that it does not use
    if not isinstance(fields["tie_embeddings"], bool):
        value = fields["tie_embeddings"]
        raise ValueError(
            f"{path}: tie_word_embeddings={value!r} must be true or false."
        )
    ends = read_generation(folder)
    fields["eos_ids"] = ends["eos_ids"] or _as_tuple(raw.get("eos_token_id"))
    if fields.get("bos_id") is None:
        fields["bos_id"] = ends["bos_id"]
    try:
        return LlamaConfig(**fields, **_read_rope(raw))
    except ValueError as error:
        named = [n for n in NAMES if f"{n}=" in str(error) and n != NAMES[n]]
        there = ", ".join(f"{name} is {NAMES[name]}" for name in named)
        raise ValueError(f"{path}: {error}{there and f' (There {there}.)'}") from None


def read_generation(folder: Path) -> dict:
    """bos_id, eos_ids, max_seq_len of generation_config.json; None or () if absent."""
    path = Path(folder) / "generation_config.json"
    raw = read_json(path) if path.is_file() else {}
    return {
        "bos_id": raw.get("bos_token_id"),
        "eos_ids": _as_tuple(raw.get("eos_token_id")),
        "max_seq_len": raw.get("max_length"),
    }


def read_dtype(folder: Path) -> torch.dtype | None:
    """The weights' type that config.json states, if it is one that weights have."""
    raw = read_json(Path(folder) / "config.json")
    name = str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch.")
    return {str(dtype): dtype for dtype in DTYPES.values()}.get(f"torch.{name}")


def config_json(config: LlamaConfig, model_type: str, dtype: torch.dtype) -> dict:
    """What goes into config.json: both spellings, for transformers 4 and 5.

    Raises:
        ValueError: transformers has no architecture of that name.
    """
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"model_type={model_type!r} is none of {', '.join(ARCHITECTURES)}; "
            "transformers could not read the folder. Keep it with save_checkpoint."
        )
    content = {theirs: getattr(config, ours) for ours, theirs in NAMES.items()}
    if model_type == "llama":
        del content["sliding_window"]
    if model_type.startswith("qwen"):
        content["use_sliding_window"] = False
    scaling = config.rope_scaling
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        **content,
        "eos_token_id": _as_json(config.eos_ids),
        "hidden_act": "silu",
        "rope_parameters": {
            "rope_type": "default",
            **(scaling or {}),
            "rope_theta": config.rope_theta,
        },
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def generation_json(config: LlamaConfig) -> dict:
    """What goes into generation_config.json."""
    return {"bos_token_id": config.bos_id, "eos_token_id": _as_json(config.eos_ids)}


def _refuse_unbuilt(path: Path, raw: dict) -> None:
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"{path}: model_type={kind!r} is none of {', '.join(sorted(FAMILIES))}; "
            "other models come with their chapters (vision), or subclass MinimalLlama."
        )
    quantized = raw.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise ValueError(
            f"{path}: quantization_config names the method {method!r}; here only plain "
            "weights are read. The chapter quantize reads some such folders; or "
            "download the model that is not quantized."
        )
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise ValueError(
                f"{path}: {key}={raw[key]!r}; no layer of {kind} here has that bias. "
                "Subclass its Attention or FeedForward, as Qwen2 does."
            )
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(
            f"{path}: hidden_act={raw['hidden_act']!r}; the feed-forward has 'silu'. "
            "Subclass FeedForward for another."
        )
    windows = "sliding_attention" in str(raw.get("layer_types"))
    if kind != "mistral" and (raw.get("use_sliding_window") or windows):
        raise ValueError(
            f"{path}: use_sliding_window=true; {kind} is built here without windows. "
            "Set it to false and use the chapter long_context."
        )


def _read_rope(raw: dict) -> dict:
    """`rope_theta` and `rope_scaling`, from either spelling."""
    new, old = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    for key, value in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(value, dict):
            raise ValueError(f"{key}={value!r} must be an object, {{…}}.")
    rope = {**old, **new}
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(
            f"rope_parameters={rope!r} differ by layer; the model has one rope. "
            "Give a subclass another model.rope."
        )
    share = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if share != 1.0:
        raise ValueError(
            f"partial_rotary_factor={share!r}; rope turns whole heads here. Give a "
            "subclass another model.rope."
        )
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    scaling = {key: rope[key] for key in ROPE_KEYS if key in rope}
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **scaling}}


def _as_tuple(ids) -> tuple:
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)


def _as_json(ids: tuple[int, ...]) -> int | list[int] | None:
    if len(ids) > 1:
        return list(ids)
    return ids[0] if ids else None
