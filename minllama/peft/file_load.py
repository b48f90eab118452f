"""What a file says, added to a model: which layers, which ranks, which options.

Layers and ranks are read from the tensors themselves: a pattern in the config may mean
more layers here.
"""

import re

import torch
from torch import Tensor, nn

from minllama.peft.adalora import add_adalora
from minllama.peft.file_tensors import PREFIX, our_module, their_module
from minllama.peft.houlsby import add_houlsby
from minllama.peft.ia3 import add_ia3
from minllama.peft.llama_adapter import add_llama_adapter
from minllama.peft.lora import add_lora
from minllama.peft.prefix import add_prefix
from minllama.peft.prompt import add_prompt
from minllama.peft.saved import add_bitfit, add_norm_tuning
from minllama.peft.targets import outer_modules
from minllama.peft.tokens import add_trainable_tokens
from minllama.peft.vera import add_vera

HARMLESS = (True, False, None, "gaussian", "eva", "orthogonal")  # base unchanged
NOT_BUILT = (
    "fan_in_fan_out", "use_qalora", "layer_replication", "lora_bias", "use_bdlora",
    "alora_invocation_tokens", "target_parameters", "arrow_config", "kasa_config",
    "velora_config", "monteclora_config", "loftq_config",
)  # fmt: skip


def add_from_file(
    model: nn.Module,
    config: dict,
    tensors: dict[str, Tensor],
    name: str,
    dtype: torch.dtype | None,
) -> None:
    """Add the adapter that a config and the names of its tensors describe.

    Raises:
        ValueError: a method, or an option of it, that is not built here.
    """
    kind = config.get("peft_type")
    add = LOADERS.get(kind)  # type: ignore[arg-type]
    if add is None:
        raise ValueError(
            f"peft_type={kind!r} is not built here; known are "
            f"{', '.join(sorted(LOADERS))}."
        )
    add(model, config, tensors, name, dtype)


def _places(tensors: dict[str, Tensor], *endings: str) -> dict[str, Tensor]:
    """Modules that have a tensor with one of these endings, by our names."""
    found = {}
    for key, tensor in tensors.items():
        for ending in endings:
            if key.startswith(PREFIX) and key.endswith(f".{ending}"):
                at = key.removeprefix(PREFIX).removesuffix(f".{ending}")
                found[our_module(at)] = tensor
    return found


def _load_lora(model, config, tensors, name, dtype) -> None:
    for option in NOT_BUILT:
        if config.get(option):
            raise ValueError(f"{option}={config[option]!r} is not built here.")
    init = config.get("init_lora_weights", True)
    if init not in (*HARMLESS, "pissa", "olora"):
        raise ValueError(
            f"init_lora_weights={init!r} changed the base in a way that cannot be "
            "repeated; convert the adapter to plain LoRA where it was trained "
            "(path_initial_model_for_weight_conversion)."
        )
    linear = _places(tensors, "lora_A.weight")
    tables = _places(tensors, "lora_embedding_A")
    ranks = {at: len(t) for at, t in (linear | tables).items()}
    alphas = config.get("alpha_pattern") or {}
    adapted = ("lora_", "trainable_tokens_delta", "base_layer.")
    rest = [k for k in tensors if not any(word in k for word in adapted)]
    saved = {our_module(k.removeprefix(PREFIX)).rpartition(".")[0] for k in rest
             if not k.endswith(".bias") or not _is_linear_bias(model, k)}  # fmt: skip
    add_lora(
        model,
        config["r"],
        config.get("lora_alpha", 8),
        list(ranks),
        name=name,
        dropout=config.get("lora_dropout", 0.0),
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        init=init if init in ("pissa", "olora") else "uniform",
        rank_pattern={re.escape(at): r for at, r in ranks.items() if r != config["r"]},
        alpha_pattern={k: v for k, v in alphas.items()},
        modules_to_save=sorted(saved),
        bias=config.get("bias") or "none",
        trainable_tokens=_token_rows(config.get("trainable_token_indices")),
        dtype=dtype,
    )


def _is_linear_bias(model: nn.Module, key: str) -> bool:
    """Whether it is a bias trained by bias="all", not part of a saved module."""
    at = our_module(key.removeprefix(PREFIX)).removesuffix(".bias")
    return f"{PREFIX}{their_module(at)}.weight" != key and hasattr(
        outer_modules(model).get(at), "in_features"
    )


def _token_rows(indices) -> dict[str, list[int]] | list[int]:
    if isinstance(indices, dict):
        return {our_module(at): list(ids) for at, ids in indices.items()}
    return list(indices or ())


def _load_ia3(model, config, tensors, name, dtype) -> None:
    found = _places(tensors, "ia3_l")
    inner = [at for at, t in found.items() if t.shape[0] == 1]
    add_ia3(model, list(found), inner, name, dtype)


def _load_vera(model, config, tensors, name, dtype) -> None:
    found = _places(tensors, "vera_lambda_b")
    seed = config.get("projection_prng_key", 0)
    d = config.get("d_initial", 0.1)
    if "base_model.vera_A" not in tensors:
        raise ValueError(
            "the file has no vera_A: it was saved without its random matrices, which "
            "differ between machines; save it with save_projection=True."
        )
    add_vera(model, config["r"], list(found), d, seed, name, dtype)


def _load_adalora(model, config, tensors, name, dtype) -> None:
    found = _places(tensors, "lora_A")
    rank = config.get("init_r", 12)
    odd = {at: len(t) for at, t in found.items() if len(t) != rank}
    add_adalora(model, rank, config.get("lora_alpha", 8), list(found), name, dtype, odd)


def _load_prefix(model, config, tensors, name, dtype) -> None:
    add_prefix(model, len(tensors["prompt_embeddings"]), None, name, dtype)


def _load_prompt(model, config, tensors, name, dtype) -> None:
    add_prompt(model, len(tensors["prompt_embeddings"]), (), None, name, dtype)


def _load_llama_adapter(model, config, tensors, name, dtype) -> None:
    size, layers = config["adapter_len"], config["adapter_layers"]
    add_llama_adapter(model, size, layers, name, dtype)


def _load_norms(model, config, tensors, name, dtype) -> None:
    add_norm_tuning(model, list(_places(tensors, "ln_tuning_layers.weight")), name)


def _load_tokens(model, config, tensors, name, dtype) -> None:
    found = _places(tensors, "trainable_tokens_delta")
    ids = list(config["token_indices"])
    add_trainable_tokens(model, {at: ids for at in found}, name)


def _load_bitfit(model, config, tensors, name, dtype) -> None:
    add_bitfit(model, list(_places(tensors, "bias")), name)


def _load_houlsby(model, config, tensors, name, dtype) -> None:
    found = list(_places(tensors, "down_bias"))
    add_houlsby(model, config["size"], found, name, dtype)


LOADERS = {
    "LORA": _load_lora,
    "IA3": _load_ia3,
    "VERA": _load_vera,
    "ADALORA": _load_adalora,
    "PREFIX_TUNING": _load_prefix,
    "PROMPT_TUNING": _load_prompt,
    "P_TUNING": _load_prompt,
    "ADAPTION_PROMPT": _load_llama_adapter,
    "LN_TUNING": _load_norms,
    "TRAINABLE_TOKENS": _load_tokens,
    "BITFIT": _load_bitfit,
    "HOULSBY": _load_houlsby,
}
