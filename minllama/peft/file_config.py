"""`adapter_config.json`: what a method is called there, and what it needs to know."""

from torch import nn

from minllama.architecture.model import MinimalLlama
from minllama.peft.adapter import Adapter, Spec
from minllama.peft.file_tensors import chains, their_module
from minllama.peft.ia3 import IA3Linear
from minllama.peft.lora_layers import LowRank
from minllama.peft.saved import TrainedCopy
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
    """The config of one adapter, as the PEFT library reads it."""
    config = {
        "peft_type": TYPES[spec.method],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
    }
    found = list(chains(model, spec.name))
    s = spec.settings
    if spec.method in ("lora", "dora"):
        return {**config, **_lora_config(model, spec, found)}
    if spec.method == "ia3":
        inner = [at for at, a in found if isinstance(a, IA3Linear) and a.scales_input]
        targets = _said(model, [at for at, _ in found])
        full = any("." in target for target in targets)
        inner = [their_module(at) if full else at.split(".")[-1] for at in inner]
        extra = {"feedforward_modules": sorted(set(inner)), "target_modules": targets}
    elif spec.method in ("vera", "adalora", "norm_tuning", "bitfit", "houlsby"):
        extra = {"target_modules": _said(model, [at for at, _ in found])}
    elif spec.method == "trainable_tokens":
        ids = {at: a.ids for at, a in found if isinstance(a, TokenRows)}
        names = [at for at in ids if at != "lm_head"] or ["lm_head"]
        extra = {"token_indices": ids[names[0]], "target_modules": _said(model, names)}
    else:
        extra = {}
    if spec.method == "vera":
        extra |= {"r": s["rank"], "projection_prng_key": s["seed"],
                  "d_initial": s["d_initial"], "save_projection": True}  # fmt: skip
    if spec.method == "adalora":
        extra |= {"init_r": s["rank"], "lora_alpha": s["alpha"], "total_step": 1,
                  "tinit": 0, "tfinal": 0}  # fmt: skip
    if spec.method == "houlsby":
        extra |= {"size": s["size"]}
    if spec.method == "llama_adapter":
        extra |= {"adapter_len": s["size"], "adapter_layers": s["layers"],
                  "target_modules": "self_attn"}  # fmt: skip
    if spec.method in ("prefix", "prompt"):
        extra |= _prompt_config(model, spec)
    return {**config, **extra}


def _lora_config(
    model: nn.Module, spec: Spec, found: list[tuple[str, Adapter]]
) -> dict:
    s = spec.settings
    layers = {at: a for at, a in found if isinstance(a, LowRank)}
    saved = [at for at, a in found if isinstance(a, TrainedCopy)]
    rows = {at: a.ids for at, a in found if isinstance(a, TokenRows)}
    if len(rows) > 1 and len({id(a.rows) for _, a in found
                              if isinstance(a, TokenRows)}) == 1:  # fmt: skip
        rows.pop("lm_head", None)  # it follows the embedding there, too
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
        "modules_to_save": _said(model, saved) or None,
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
