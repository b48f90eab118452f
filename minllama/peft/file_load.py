"""What a file says, added to a model: which layers, which ranks, which options.

Layers and ranks are read from the tensors themselves: a pattern in the config may mean
more layers here.
"""

import re

import torch
from torch import Tensor, nn

from minllama.peft.adalora import add_adalora
from minllama.peft.adapter import specs
from minllama.peft.file_config import check_rows
from minllama.peft.file_tensors import PREFIX, chains, our_module, their_module
from minllama.peft.houlsby import add_houlsby
from minllama.peft.ia3 import add_ia3
from minllama.peft.llama_adapter import add_llama_adapter
from minllama.peft.lora import add_lora
from minllama.peft.prefix import add_prefix
from minllama.peft.prompt import add_prompt
from minllama.peft.saved import (
    add_biases,
    add_bitfit,
    add_norm_tuning,
    save_modules,
)
from minllama.peft.targets import outer_modules, pattern_value
from minllama.peft.tokens import add_trainable_tokens
from minllama.peft.vera import add_vera

HARMLESS = (True, False, None, "gaussian", "eva", "orthogonal")  # base unchanged
NOT_BUILT = (
    "fan_in_fan_out", "use_qalora", "layer_replication", "lora_bias", "use_bdlora",
    "alora_invocation_tokens", "target_parameters", "arrow_config", "kasa_config",
    "velora_config", "monteclora_config", "loftq_config",
)  # fmt: skip
ADAPTED = ("lora_", "ia3_l", "vera_", "ln_tuning_layers.", "trainable_tokens_delta",
           "base_layer.")  # fmt: skip  # in names of what is no whole saved module
WITH_OTHERS = ("IA3", "VERA", "ADALORA", "LN_TUNING")  # add_lora does that itself


def add_from_file(
    model: nn.Module,
    config: dict,
    tensors: dict[str, Tensor],
    name: str,
    dtype: torch.dtype | None,
) -> None:
    """Add the adapter that a config and the names of its tensors describe.

    Raises:
        ValueError: a method, or an option of it, that is not built here; or a config
            that lacks a number.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in LOADERS:
        raise ValueError(
            f"peft_type={kind!r} is not built here; known are "
            f"{', '.join(sorted(LOADERS))}."
        )
    for option in NOT_BUILT:
        if config.get(option):
            raise ValueError(
                f"{option}={config[option]!r} is not built here; merge such an adapter "
                "into its model where it was trained."
            )
    LOADERS[kind](model, config, tensors, name, dtype)
    if kind in WITH_OTHERS:
        _add_others(model, config, tensors, name)


def _add_others(model, config, tensors, name) -> None:
    """What is trained in full beside the adapted layers: biases, whole modules."""
    spec, which = specs(model)[name], config.get("bias") or "none"
    adapted = [at for at, _ in chains(model, name)]
    add_biases(model, spec, "lora_only" if which == "vera_only" else which, adapted)
    save_modules(model, spec, _saved_modules(model, tensors))
    spec.settings["bias"] = which


def _saved_modules(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    rest = [key for key in tensors if not any(word in key for word in ADAPTED)]
    whole = [
        k for k in rest if not k.endswith(".bias") or not _is_linear_bias(model, k)
    ]
    return sorted(
        {our_module(k.removeprefix(PREFIX)).rpartition(".")[0] for k in whole}
    )


def _number(config: dict, key: str, default: float | None = None):
    """A number of the config."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(
            f"{key}={value!r} in adapter_config.json must be a number; copy it from "
            "where the adapter was trained."
        )
    return value


def _whole_number(config: dict, key: str, default: int | None = None) -> int:
    value = _number(config, key, default)
    if not isinstance(value, int):
        raise ValueError(
            f"{key}={value!r} in adapter_config.json must be a whole number; copy it "
            "from where the adapter was trained."
        )
    return value


def _ids(key: str, value) -> list[int]:
    if not isinstance(value, list) or not all(type(i) is int for i in value):
        raise ValueError(
            f"{key}={value!r} in adapter_config.json must be a list of token ids; copy "
            "it from where the adapter was trained."
        )
    return value


def _places(tensors: dict[str, Tensor], *endings: str) -> dict[str, Tensor]:
    """Modules that have a tensor with one of these endings, by our names."""
    found = {}
    for key, tensor in tensors.items():
        for ending in endings:
            if key.startswith(PREFIX) and key.endswith(f".{ending}"):
                if tensor.dim() == 0:
                    raise ValueError(f"{key} is one number; the file is not whole.")
                at = key.removeprefix(PREFIX).removesuffix(f".{ending}")
                found[our_module(at)] = tensor
    return found


def _load_lora(model, config, tensors, name, dtype) -> None:
    rank, alpha = _whole_number(config, "r"), _number(config, "lora_alpha", 8)
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
    add_lora(
        model,
        rank,
        alpha,
        list(ranks),
        name=name,
        dropout=_number(config, "lora_dropout", 0.0),
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        init=init if init in ("pissa", "olora") else "uniform",
        rank_pattern={re.escape(at): r for at, r in ranks.items() if r != rank},
        alpha_pattern=_alphas(config, list(ranks)),
        modules_to_save=_saved_modules(model, tensors),
        bias=config.get("bias") or "none",
        trainable_tokens=_token_rows(config.get("trainable_token_indices")),
        dtype=dtype,
    )
    check_rows(list(chains(model, name)))


def _alphas(config: dict, names: list[str]) -> dict[str, float]:
    """Layers with an alpha of their own; patterns that fit none are passed over."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"alpha_pattern={patterns!r} must say name: alpha for each.")
    own = {at: pattern_value(patterns, their_module(at), None) for at in names}
    return {
        re.escape(at): _number(own, at)
        for at, alpha in own.items()
        if alpha is not None
    }


def _is_linear_bias(model: nn.Module, key: str) -> bool:
    """Whether it is the bias of a linear layer, as bias="all" trains it."""
    at = our_module(key.removeprefix(PREFIX)).removesuffix(".bias")
    return hasattr(outer_modules(model).get(at), "in_features")


def _token_rows(indices) -> dict[str, list[int]] | list[int]:
    if isinstance(indices, dict):
        return {our_module(at): _ids(at, ids) for at, ids in indices.items()}
    return _ids("trainable_token_indices", indices or [])


def _load_ia3(model, config, tensors, name, dtype) -> None:
    found = _places(tensors, "ia3_l")
    inner = [at for at, t in found.items() if t.shape[0] == 1]
    add_ia3(model, list(found), inner, name, dtype)


def _load_vera(model, config, tensors, name, dtype) -> None:
    found = _places(tensors, "vera_lambda_b")
    rank, d = _whole_number(config, "r"), _number(config, "d_initial", 0.1)
    seed = _whole_number(config, "projection_prng_key", 0)
    if "base_model.vera_A" not in tensors:
        raise ValueError(
            "the file has no vera_A: it was saved without its random matrices, which "
            "differ between machines; save it with save_projection=True."
        )
    add_vera(model, rank, list(found), d, seed, name, dtype)


def _load_adalora(model, config, tensors, name, dtype) -> None:
    found = _places(tensors, "lora_A")
    rank, alpha = _whole_number(config, "init_r"), _number(config, "lora_alpha", 8)
    odd = {re.escape(at): len(t) for at, t in found.items() if len(t) != rank}
    add_adalora(model, rank, alpha, list(found), name, dtype, odd)


def _prompt_length(tensors: dict[str, Tensor]) -> int:
    prompt = tensors.get("prompt_embeddings")
    if prompt is None or prompt.dim() != 2:
        raise ValueError("the file has no table prompt_embeddings; it is not whole.")
    return len(prompt)


def _load_prefix(model, config, tensors, name, dtype) -> None:
    add_prefix(model, _prompt_length(tensors), None, name, dtype)


def _load_prompt(model, config, tensors, name, dtype) -> None:
    add_prompt(model, _prompt_length(tensors), (), None, name, dtype)


def _load_llama_adapter(model, config, tensors, name, dtype) -> None:
    size = _whole_number(config, "adapter_len")
    layers = _whole_number(config, "adapter_layers")
    add_llama_adapter(model, size, layers, name, dtype)


def _load_norms(model, config, tensors, name, dtype) -> None:
    add_norm_tuning(model, list(_places(tensors, "ln_tuning_layers.weight")), name)


def _load_tokens(model, config, tensors, name, dtype) -> None:
    found = _places(tensors, "trainable_tokens_delta")
    ids = _ids("token_indices", config.get("token_indices"))
    add_trainable_tokens(model, {at: ids for at in found}, name)


def _load_bitfit(model, config, tensors, name, dtype) -> None:
    add_bitfit(model, list(_places(tensors, "bias")), name)


def _load_houlsby(model, config, tensors, name, dtype) -> None:
    found = list(_places(tensors, "down_bias"))
    add_houlsby(model, _whole_number(config, "size"), found, name, dtype)


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
