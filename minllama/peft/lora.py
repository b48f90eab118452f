"""LoRA: learn a low-rank change beside each frozen weight.

    y = W x + (alpha / r) B A x        W (out, in) frozen, A (r, in), B (out, r)

B starts at zero, so adding LoRA changes no output until training does. Its relatives
differ in a line each: rsLoRA divides alpha by sqrt(r), since with 1 / r a larger rank
learns no faster; DoRA learns each row's length apart from its direction; PiSSA and
OLoRA start inside the weight; LoRA-FA freezes A; LoRA+ gives B a higher rate.

Papers: LoRA Hu et al. 2021, arXiv:2106.09685, section 4.1 · rsLoRA Kalajdzievski 2023,
2312.03732 · LoRA+ Hayou et al. 2024, 2402.12354 · LoRA-FA Zhang et al. 2023,
2308.03303.
"""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn

from minllama.peft.adapter import Spec
from minllama.peft.attach import all_or_nothing, attach, check_free
from minllama.peft.base import model_dtype, place
from minllama.peft.dora import DoRALinear
from minllama.peft.lora_init import SPLITS, STARTS, SplitLoRALinear, check_splits
from minllama.peft.lora_layers import LoRAEmbedding, LoRALinear, LowRank
from minllama.peft.saved import add_biases, save_modules
from minllama.peft.targets import (
    check_patterns,
    find_targets,
    is_linear,
    pattern_value,
)
from minllama.peft.tokens import train_tokens

QUERY_VALUE = ("q_proj", "v_proj")  # the paper's choice


def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    targets: str | Iterable[str] = QUERY_VALUE,
    *,
    name: str = "default",
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    init: str = "uniform",
    freeze_a: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers_to_transform: Collection[int] | None = None,
    modules_to_save: Iterable[str] = (),
    bias: str = "none",
    trainable_tokens: Iterable[int] | Mapping[str, Iterable[int]] = (),
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Freeze the model, then put LoRA around every layer that `targets` says.

    Args:
        model: changed in place and returned.
        rank: r, of B A.
        alpha: the change is scaled by alpha / r.
        targets: names or ends of names, "all-linear" (all but the head), or a regular
            expression for whole names. Linear layers and embeddings.
        name: by which the adapter is switched and merged. A second name adds a second
            adapter to the same layers.
        dropout: of the adapter's input, while training.
        rslora: alpha / sqrt(r) instead.
        dora: train the length of each row beside its direction.
        init: "uniform"; "gaussian"; "pissa" or "olora", which start inside the weight.
            Of linear layers: the change of an embedding always starts at zero.
        freeze_a: train B alone (LoRA-FA).
        rank_pattern: name or regular expression -> another rank.
        alpha_pattern: the same for alpha.
        layers_to_transform: blocks, counted from 0; None: all.
        modules_to_save: modules that are trained in full beside the adapter.
        bias: train biases: "none", "all", or "lora_only".
        trainable_tokens: rows of the embedding that are trained; or name -> rows.
        dtype: of A and B. None: of the layer's weight; of the model's activations if
            that is quantized.

    Raises:
        ValueError: a number out of range, a word or name that is not there (the
            message lists those that are), or a pair that does not go together.
    """
    _check(rank, alpha, dropout, init, dora)
    check_free(model, name)
    names = find_targets(model, targets, layers_to_transform, embeddings=True)
    check_patterns(dict(rank_pattern or {}), names, "rank_pattern")
    check_patterns(dict(alpha_pattern or {}), names, "alpha_pattern")
    if init in SPLITS:
        linear = [at for at in names if is_linear(model.get_submodule(at))]
        patterns = dict(rank_pattern or {})
        ranks = {at: pattern_value(patterns, at, rank) for at in linear}
        check_splits(model, ranks, init)
    saved = list(modules_to_save)
    settings = {
        "rank": rank, "alpha": alpha, "dropout": dropout, "rslora": rslora,
        "dora": dora, "init": init, "freeze_a": freeze_a, "bias": bias,
    }  # fmt: skip
    spec = Spec(name, "dora" if dora else "lora", settings)
    activations = model_dtype(model)

    def make(at: str, base: nn.Module) -> LowRank:
        kind = _kind(at, base, dora, init)
        r = pattern_value(dict(rank_pattern or {}), at, rank)
        s = pattern_value(dict(alpha_pattern or {}), at, alpha)
        return kind(base, spec, r, s, place(base, dtype, activations))

    with all_or_nothing(model, name):
        attach(model, spec, names, make)
        add_biases(model, spec, bias, names)
        save_modules(model, spec, saved)
        if trainable_tokens:
            train_tokens(model, spec, trainable_tokens)
    return model


def _kind(
    at: str, base: nn.Module, dora: bool, init: str
) -> type[LoRALinear] | type[LoRAEmbedding]:
    if not is_linear(base):
        if dora:
            raise ValueError(
                f"dora=True on the embedding {at} is not built; leave it out of "
                "targets, and give it a LoRA of another name=."
            )
        return LoRAEmbedding
    if dora:
        return DoRALinear
    return SplitLoRALinear if init in SPLITS else LoRALinear


def _check(rank: int, alpha: float, dropout: float, init: str, dora: bool) -> None:
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1.")
    if not alpha > 0:
        raise ValueError(f"alpha={alpha} must be above 0; it scales the change.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must lie within 0 and 1.")
    if init not in STARTS:
        raise ValueError(f"init={init!r} is none of {', '.join(STARTS)}.")
    if dora and init in SPLITS:
        raise ValueError(
            f"dora=True with init={init!r} is not built: both say where a weight's "
            "rows begin. Use one of them."
        )


def add_rslora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    targets: str | Iterable[str] = QUERY_VALUE,
    name: str = "default",
) -> nn.Module:
    """LoRA scaled by alpha / sqrt(r). Further settings: `add_lora(rslora=True, …)`."""
    return add_lora(model, rank, alpha, targets, name=name, rslora=True)


def add_dora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    targets: str | Iterable[str] = QUERY_VALUE,
    name: str = "default",
) -> nn.Module:
    """DoRA. Further settings: `add_lora(dora=True, …)`."""
    return add_lora(model, rank, alpha, targets, name=name, dora=True)


def add_pissa(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    targets: str | Iterable[str] = QUERY_VALUE,
    name: str = "default",
) -> nn.Module:
    """PiSSA. Further settings: `add_lora(init="pissa", …)`."""
    return add_lora(model, rank, alpha, targets, name=name, init="pissa")


def add_olora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    targets: str | Iterable[str] = QUERY_VALUE,
    name: str = "default",
) -> nn.Module:
    """OLoRA. Further settings: `add_lora(init="olora", …)`."""
    return add_lora(model, rank, alpha, targets, name=name, init="olora")


def add_lora_fa(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    targets: str | Iterable[str] = QUERY_VALUE,
    name: str = "default",
) -> nn.Module:
    """LoRA with A frozen. Further settings: `add_lora(freeze_a=True, …)`."""
    return add_lora(model, rank, alpha, targets, name=name, freeze_a=True)


def lora_plus_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, weight_decay: float = 0.0
) -> list[dict]:
    """Groups for an optimizer: every B learns `ratio` times as fast as the rest.

    A starts random and B at zero, so B has to travel further.

    Example:
        optimizer = torch.optim.AdamW(lora_plus_groups(model, lr=1e-4))

    Raises:
        ValueError: no LoRA in the model trains.
    """
    ids = {id(m.b) for m in model.modules() if isinstance(m, LowRank)}
    fast = [p for p in model.parameters() if p.requires_grad and id(p) in ids]
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    if not fast:
        raise ValueError("no B of a LoRA has requires_grad; call add_lora first.")
    groups = [{"params": rest, "lr": lr}, {"params": fast, "lr": lr * ratio}]
    return [{**g, "weight_decay": weight_decay} for g in groups if g["params"]]
