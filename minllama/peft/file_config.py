"""`adapter_config.json`: what a method is called there, and what it needs to know."""

from torch import nn

from minllama.architecture.model import MinimalLlama
from minllama.peft.adalora import AdaLoRALinear
from minllama.peft.adapter import Adapter, Spec
from minllama.peft.file_tensors import chains, shares_rows, their_module
from minllama.peft.ia3 import IA3Linear
from minllama.peft.lora_layers import LoRALinear, LowRank
from minllama.peft.saved import BiasLinear, TrainedCopy
from minllama.peft.targets import outer_modules
from minllama.peft.tokens import TokenRows

TYPES = {
    "lora": "LORA", "dora": "LORA", "ia3": "IA3", "vera": "VERA", "adalora": "ADALORA",
    "prefix": "PREFIX_TUNING", "prompt": "PROMPT_TUNING", "norm_tuning": "LN_TUNING",
    "llama_adapter": "ADAPTION_PROMPT", "trainable_tokens": "TRAINABLE_TOKENS",
    "bitfit": "BITFIT", "houlsby": "HOULSBY",  # the last two are not in that library
}  # fmt: skip
STARTS = {"uniform": True, "gaussian": "gaussian", "pissa": "pissa", "olora": "olora"}


def write_config(model: MinimalLlama, spec: Spec, base_model: str | None) -> dict:
    """The config of one adapter, as the PEFT library reads it.

    Raises:
        ValueError: no config says what was adapted.
    """
    config = {
        "peft_type": TYPES[spec.method],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
    }
    found = list(chains(model, spec.name))
    check_rows(found)
    s = spec.settings
    if spec.method in ("lora", "dora"):
        return {**config, **_lora_config(model, spec, found)}
    others, layers = _beside(model, spec, found)
    if spec.method == "ia3":
        extra = _ia3_config(model, layers)
    elif spec.method in ("vera", "adalora", "norm_tuning", "bitfit", "houlsby"):
        extra = {"target_modules": _said(model, list(layers))}
    elif spec.method == "trainable_tokens":
        extra = _token_config(model, found)
    else:
        extra = {}
    if spec.method == "vera":
        extra |= {"r": s["rank"], "projection_prng_key": s["seed"],
                  "d_initial": s["d_initial"], "save_projection": True}  # fmt: skip
    if spec.method == "adalora":
        extra |= _adalora_config(spec, layers)
    if spec.method == "houlsby":
        extra |= {"size": s["size"]}
    if spec.method == "llama_adapter":
        extra |= {"adapter_len": s["size"], "adapter_layers": s["layers"],
                  "target_modules": "self_attn"}  # fmt: skip
    if spec.method in ("prefix", "prompt"):
        extra |= _prompt_config(model, spec)
    return {**config, **extra, **others}


def check_rows(found: list[tuple[str, Adapter]]) -> None:
    """Refuse rows of a table that the same adapter changes in another way, too.

    A LoRA around a head that takes the embedding's rows is the one exception.

    Raises:
        ValueError: there are such rows.
    """
    tied = shares_rows(found)
    for at, adapter in found:
        kin = [a for place, a in found if place == at and a is not adapter]
        if tied and at == "lm_head":
            kin = [a for a in kin if type(a) is not LoRALinear]
        if isinstance(adapter, TokenRows) and kin:
            raise ValueError(
                f"adapter {adapter.spec.name!r} trains rows of {at} and changes it as "
                f"{type(kin[0]).__name__}, too; no file holds both. merge it and save "
                "the model, or give one of the two another name= before training."
            )


def _beside(
    model: nn.Module, spec: Spec, found: list[tuple[str, Adapter]]
) -> tuple[dict, dict[str, Adapter]]:
    """What a config says of parts trained in full, and the layers that remain."""
    saved = [at for at, a in found if isinstance(a, TrainedCopy) and a.beside]
    layers = {at: a for at, a in found if at not in saved}
    if spec.method != "bitfit":
        layers = {at: a for at, a in found
                  if at in layers and not isinstance(a, BiasLinear)}  # fmt: skip
    others: dict = {"modules_to_save": _said_to_save(model, saved)} if saved else {}
    if spec.settings.get("bias", "none") != "none":
        others["bias"] = spec.settings["bias"]
    return others, layers


def _ia3_config(model: nn.Module, layers: dict[str, Adapter]) -> dict:
    """Layers whose input is scaled are said as the targets are, by names or in full."""
    inner = [
        at for at, a in layers.items() if isinstance(a, IA3Linear) and a.scales_input
    ]
    targets, leaves = _said(model, list(layers)), {at.split(".")[-1] for at in inner}
    alike = [at for at in layers if at.split(".")[-1] in leaves]
    if alike != inner or any("." in target for target in targets):
        targets = sorted(their_module(at) for at in layers)
        leaves = {their_module(at) for at in inner}
    return {"feedforward_modules": sorted(leaves), "target_modules": targets}


def _token_config(model: nn.Module, found: list[tuple[str, Adapter]]) -> dict:
    """One list of ids for all tables: that is what the format has."""
    ids = {at: a.ids for at, a in found if isinstance(a, TokenRows)}
    if shares_rows(found):
        ids.pop("lm_head")  # it follows the embedding there, too
    first, *rest = ids
    if other := [at for at in rest if ids[at] != ids[first]]:
        raise ValueError(
            f"token ids {ids[first]} of {first} and {ids[other[0]]} of {other[0]} "
            "differ; a file of trainable tokens holds one list for all tables. Train "
            "the same ids, or use add_lora(trainable_tokens=…), whose file holds both."
        )
    return {"token_indices": ids[first], "target_modules": _said(model, list(ids))}


def _adalora_config(spec: Spec, layers: dict[str, Adapter]) -> dict:
    """The rank to begin with, and which of its triples each layer has.

    Where a layer has more than the rank to begin with, the file begins with that many,
    and its alpha makes up for it: their scale is alpha / (init_r + 1e-5).
    """
    rank, alpha = spec.settings["rank"], spec.settings["alpha"]
    ranks = {at: a.rank for at, a in layers.items() if isinstance(a, AdaLoRALinear)}
    most = max(rank, *ranks.values())
    kept = {f"{their_module(at)}.lora_E": [i < r for i in range(most)]
            for at, r in ranks.items()}  # fmt: skip
    return {
        "init_r": most,
        "lora_alpha": alpha if most == rank else alpha * (most + 1e-5) / (rank + 1e-5),
        "rank_pattern": kept if set(ranks.values()) != {most} else None,
        "total_step": 1,
        "tinit": 0,
        "tfinal": 0,
    }


def _lora_config(
    model: nn.Module, spec: Spec, found: list[tuple[str, Adapter]]
) -> dict:
    s = spec.settings
    layers = {at: a for at, a in found if isinstance(a, LowRank)}
    saved = [at for at, a in found if isinstance(a, TrainedCopy)]
    rows = {at: a.ids for at, a in found if isinstance(a, TokenRows)}
    if shares_rows(found):
        rows.pop("lm_head")  # it follows the embedding there, too
    ranks = {their_module(at): a.rank for at, a in layers.items()}
    alphas = {their_module(at): a.alpha for at, a in layers.items()}
    return {
        "r": s["rank"],
        "lora_alpha": s["alpha"],
        "lora_dropout": s["dropout"],
        "use_rslora": s["rslora"],
        "use_dora": s["dora"],
        "init_lora_weights": STARTS[s["init"]],
        "bias": s["bias"],
        "target_modules": _said(model, list(layers)),
        "rank_pattern": {n: r for n, r in ranks.items() if r != s["rank"]},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != s["alpha"]},
        "modules_to_save": _said_to_save(model, saved) or None,
        "trainable_token_indices": {at: ids for at, ids in rows.items()} or None,
    }


def _prompt_config(model: MinimalLlama, spec: Spec) -> dict:
    config = model.config
    prefix = spec.method == "prefix"
    width = config.n_kv_heads * config.head_dim if prefix else config.dim
    return {
        "num_virtual_tokens": spec.settings["size"],
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": config.n_kv_heads if prefix else config.n_heads,
        "num_layers": config.n_layers,
    }


def _said(model: nn.Module, names: list[str]) -> list[str]:
    """The shortest way to say which modules are meant: last words, or full names."""
    leaves = {name.split(".")[-1] for name in names}
    meant = {n for n in outer_modules(model) if n.split(".")[-1] in leaves}
    if meant == set(names):
        return sorted(leaves)
    return sorted(their_module(name) for name in names)


def _said_to_save(model: nn.Module, names: list[str]) -> list[str]:
    """The same for modules_to_save, where "norm" means every name that ends so."""
    leaves = tuple({name.split(".")[-1] for name in names})
    if {n for n in outer_modules(model) if n.endswith(leaves)} == set(names):
        return sorted(leaves)
    return sorted(their_module(name) for name in names)
