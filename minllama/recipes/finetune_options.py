"""What `minllama finetune` takes: its options, and its methods by name."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from minllama.architecture.model import MinimalLlama
from minllama.architecture.optim import make_adamw
from minllama.dist_run.activations import POLICIES
from minllama.peft import (
    RankAllocator,
    add_adalora,
    add_bitfit,
    add_houlsby,
    add_ia3,
    add_llama_adapter,
    add_lora,
    add_norm_tuning,
    add_prefix,
    add_prompt,
    add_vera,
    lora_plus_groups,
    make_galore,
    orthogonality_loss,
)
from minllama.peft.saved import layers_with_bias
from minllama.peft.targets import find_targets

PREFERENCE_LOSSES = ("dpo", "ipo")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _adamw(model: nn.Module, o: "FinetuneOptions", lr: float, _: int) -> Optimizer:
    return make_adamw(model, lr, o.weight_decay)


def _lora_plus(model: nn.Module, o: "FinetuneOptions", lr: float, _: int) -> Optimizer:
    groups = lora_plus_groups(model, lr, o.loraplus_lr_ratio, o.weight_decay)
    return AdamW(groups, betas=(0.9, 0.95))


def _galore(model: nn.Module, o: "FinetuneOptions", lr: float, _: int) -> Optimizer:
    return make_galore(model, lr, o.rank, weight_decay=o.weight_decay)


def _adalora(
    model: nn.Module, o: "FinetuneOptions", lr: float, steps: int
) -> Optimizer:
    """AdamW and falling ranks: all for a tenth of the run, few for its last third."""
    optimizer = make_adamw(model, lr, o.weight_decay)
    RankAllocator(
        model,
        optimizer,
        target_rank=o.rank,
        steps=steps,
        warmup=steps // 10,
        final=steps // 3,
        every=max(1, steps // 100),
    )
    return optimizer


@dataclass(frozen=True)
class Method:
    """How a model is prepared, and what goes with it.

    The learning rates suit the shipped models (benchmarks/bench_peft_pirate.py tries
    several of those that it compares); a large model wants lower ones.
    """

    add: Callable[[MinimalLlama, "FinetuneOptions"], nn.Module]
    lr: float
    merges: bool = True  # into plain weights
    whole: bool = False  # all weights learn; there is no adapter
    optimizer: Callable[[nn.Module, "FinetuneOptions", float, int], Optimizer] = _adamw
    penalty: Callable[[nn.Module], Tensor] | None = None  # added to the mean loss


def _lora(**settings) -> Callable:
    def add(model: MinimalLlama, options: "FinetuneOptions") -> nn.Module:
        return add_lora(
            model,
            options.rank,
            options.alpha,
            targets_of(options.targets),
            dropout=options.dropout,
            dtype=torch.float32,  # whatever the frozen weights are
            **settings,
        )

    return add


def targets_of(words: str) -> str | list[str]:
    """Names between commas as a list; "all-linear" or a regular expression as it is.

    Example:
        >>> targets_of("q_proj, v_proj"), targets_of("all-linear")
        (['q_proj', 'v_proj'], 'all-linear')
    """
    names = [name.strip() for name in words.split(",")]
    return names if len(names) > 1 else words


def _bitfit(model: MinimalLlama, o: "FinetuneOptions") -> nn.Module:
    """Biases of the targets; those to be merged need a place in the model's files."""
    targets = targets_of(o.targets)
    if o.merge:
        names = find_targets(model, targets)
        placed = layers_with_bias(model, names)
        if new := sorted({at.split(".")[-1] for at in names if at not in placed}):
            old = sorted({at.split(".")[-1] for at in placed})
            remedy = f"give --targets {','.join(old)}, or " if old else ""
            raise ValueError(
                f"method='bitfit' with --merge: {', '.join(new)} of this model have no "
                f"bias, and its files no place for one; {remedy}leave --merge out."
            )
    return add_bitfit(model, targets)


METHODS = {
    "full": Method(lambda model, o: model, lr=5e-5, whole=True),
    "lora": Method(_lora(), lr=1e-3),
    "rslora": Method(_lora(rslora=True), lr=1e-3),
    "dora": Method(_lora(dora=True), lr=1e-3),
    "pissa": Method(_lora(init="pissa"), lr=3e-4),
    "olora": Method(_lora(init="olora"), lr=3e-4),
    "lora-fa": Method(_lora(freeze_a=True), lr=3e-3),
    "lora+": Method(_lora(), lr=1e-4, optimizer=_lora_plus),
    "adalora": Method(
        lambda model, o: add_adalora(
            model,
            math.ceil(1.5 * o.rank),  # as in the paper; o.rank is left
            o.alpha,
            targets_of(o.targets),
            dtype=torch.float32,
        ),
        lr=5e-3,
        optimizer=_adalora,
        penalty=lambda model: 0.5 * orthogonality_loss(model),
    ),
    "vera": Method(
        lambda model, o: add_vera(model, o.rank, targets_of(o.targets)), lr=1e-2
    ),
    "ia3": Method(lambda model, o: add_ia3(model), lr=1e-2),
    "bitfit": Method(_bitfit, lr=3e-3),
    "norms": Method(lambda model, o: add_norm_tuning(model), lr=1e-2),
    "houlsby": Method(lambda model, o: add_houlsby(model, o.rank), 1e-3, merges=False),
    "prefix": Method(lambda model, o: add_prefix(model, o.size), 1e-2, merges=False),
    "prompt": Method(lambda model, o: add_prompt(model, o.size), 1e-2, merges=False),
    "llama-adapter": Method(
        lambda model, o: add_llama_adapter(model, o.size), 1e-2, merges=False
    ),
    "galore": Method(lambda model, o: model, lr=5e-4, whole=True, optimizer=_galore),
}


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """What `minllama finetune` takes; each field is a flag of that name.

    The defaults teach `stories` a manner of speaking on a laptop in a minute or two.

    Args:
        out: folder for the adapter and its curve
        data: text; or .json, .jsonl with instruction and output, or with messages
        dpo: in place of data: .json, .jsonl with prompt, chosen, rejected
        valid: a file of the same kind to score before and after; else a part of data
        valid_share: that part, 0 for none
        model: a shipped name or a folder
        method: full, lora, dora, ia3, prefix, …; a wrong name lists all
        rank: of LoRA and its kin, and of galore's gradients; width of houlsby
        alpha: LoRA's change is scaled by alpha / rank
        targets: all-linear, names between commas, or a regular expression
        loraplus_lr_ratio: of lora+: how many times as fast B learns as A
        dropout: of the input of a LoRA, in training only
        size: tokens of prefix, prompt and llama-adapter
        format: of conversations: plain, llama3, chatml, llama2; else the model's
        seq_len: tokens of a row; longer conversations are cut
        epochs: passes over the data
        steps: in place of epochs
        batch_size: rows of a batch; pairs with --dpo
        accumulate: batches of a step
        lr: peak learning rate; else one that fits the method
        weight_decay: of matrices, times the rate
        warmup: share of the steps until the peak
        beta: of --dpo: how dear it is to leave the reference
        label_smoothing: of --dpo: share of the pairs taken to be the wrong way round
        preference_loss: of --dpo: dpo or ipo
        seed: of the adapter, shuffles, dropout and split
        device: cpu, cuda, mps; the fastest if not given
        dtype: of the frozen weights: float32, or bfloat16 for large models
        bf16: compute matrix products in bfloat16
        fast: Triton kernels and no logits (chapter fast_ops); needs a GPU to pay
        compile: compile each block with torch.compile
        checkpointing: full or selective: recompute activations, for memory
        merge: also write out/merged, a whole model with the adapter folded in
        save_every: steps between training states, from which a stopped run goes on
        fresh: begin anew though a stopped run is there
    """

    out: str
    data: str | None = None
    dpo: str | None = None
    valid: str | None = None
    valid_share: float = 0.1
    model: str = "stories"
    method: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    targets: str = "all-linear"
    loraplus_lr_ratio: float = 16.0
    dropout: float = 0.0
    size: int = 16
    format: str | None = None
    seq_len: int = 256
    epochs: float = 6.0
    steps: int | None = None
    batch_size: int = 4
    accumulate: int = 1
    lr: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.05
    beta: float = 0.1
    label_smoothing: float = 0.0
    preference_loss: str = "dpo"
    seed: int = 0
    device: str | None = None
    dtype: str = "float32"
    bf16: bool = False
    fast: bool = False
    compile: bool = False
    checkpointing: str | None = None
    merge: bool = False
    save_every: int = 50
    fresh: bool = False

    def __post_init__(self) -> None:
        if (self.data is None) == (self.dpo is None):
            raise ValueError(
                f"data={self.data!r} and dpo={self.dpo!r}: give one of the two; "
                "preferences come after the answers, on the merged model."
            )
        for name, allowed in (
            ("method", tuple(METHODS)),
            ("preference_loss", PREFERENCE_LOSSES),
            ("dtype", tuple(DTYPES)),
            ("checkpointing", (None, *POLICIES)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                words = ", ".join(word for word in allowed if word)
                raise ValueError(f"{name}={value!r} must be one of {words}.")
        whole = METHODS[self.method].whole
        if self.dpo and (whole or self.method == "prompt"):
            raise ValueError(
                f"method={self.method!r} with --dpo: the reference is the model with "
                "its adapter off; use lora or another adapter of layers."
            )
        if self.merge and not METHODS[self.method].merges:
            raise ValueError(
                f"method={self.method!r} is no change of a weight, so it cannot be "
                "merged; leave --merge out."
            )
        if whole and self.dtype != "float32":
            raise ValueError(
                f"dtype={self.dtype!r} with method={self.method!r}: small steps would "
                "be rounded away; train in float32, with --bf16 for speed."
            )
        if whole and self.merge:
            raise ValueError(
                f"method={self.method!r} leaves nothing to merge; leave --merge out."
            )
        for name in ("epochs", "batch_size", "accumulate", "seq_len", "save_every",
                     "beta", "lr", "loraplus_lr_ratio"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value} must be a number above 0.")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1.")
        for name, most in (("valid_share", 0.9), ("warmup", 1), ("dropout", 0.99),
                           ("label_smoothing", 0.5)):  # fmt: skip
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)} must lie in 0..{most}.")
