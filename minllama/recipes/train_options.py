"""What `minllama train` takes: one dataclass, from which the flags are made."""

import math
from dataclasses import dataclass

import torch

from minllama.architecture.optim import make_adamw, make_muon
from minllama.dist_run.activations import POLICIES

OPTIMIZERS = {"adamw": make_adamw, "muon": make_muon}
SAVE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What `minllama train` takes; each field is a flag of that name.

    The defaults train a model of 1.2 million parameters, on a laptop in minutes.

    Args:
        data: a UTF-8 file, or a folder of them; <|endoftext|> separates documents
        out: folder for the model, its tokenizer and its curve
        valid: a text to score in the end
        model: train this one further: a shipped name or a folder
        tokenizer: a shipped name or a folder; else the model's, or a new one
        vocab_size: entries of a new tokenizer
        dim: width of a new model
        n_layers: blocks of a new model
        n_heads: query heads of a new model
        n_kv_heads: key/value heads of a new model
        ffn_dim: inner width of the feed-forward; else 8/3 of dim
        rope_theta: base of the rotary angles of a new model
        seq_len: tokens of a row, and the context of a new model
        epochs: passes over the data
        steps: in place of epochs
        batch_size: rows of a batch
        accumulate: batches of a step
        optimizer: adamw or muon
        lr: peak learning rate
        weight_decay: of matrices, times the rate
        warmup: steps until the peak
        dropout: share of channels dropped, in training only
        seed: of weights, shuffles and dropout
        device: cpu, cuda, mps; the fastest if not given
        bf16: compute matrix products in bfloat16
        compile: compile each block with torch.compile
        fast: Triton kernels and no logits (chapter fast_ops); needs a GPU to pay
        save_every: steps between checkpoints, from which a stopped run goes on
        keep: checkpoints that are kept, the newest
        save_dtype: of the weights in the end: float32, bfloat16 or float16
        fresh: begin anew though a stopped run is there
        replicate: torchrun: groups that hold the whole model each
        shard: torchrun: processes that share one copy; -1: all that are left
        tensor: torchrun: processes that share each matrix product
        checkpointing: full or selective: recompute activations, for memory
        max_skipped: steps in a row that may be passed over, not being finite
        hang_after: seconds without a step after which the slow ranks are named
        profile: step whose timeline is written to the folder, for Perfetto
    """

    data: str
    out: str
    valid: str | None = None
    model: str | None = None
    tokenizer: str | None = None
    vocab_size: int = 2048
    dim: int = 128
    n_layers: int = 5
    n_heads: int = 4
    n_kv_heads: int = 2
    ffn_dim: int | None = None
    rope_theta: float = 10000.0
    seq_len: int = 512
    epochs: float = 4.0
    steps: int | None = None
    batch_size: int = 16
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 3e-3
    weight_decay: float = 0.1
    warmup: int = 50
    dropout: float = 0.0
    seed: int = 0
    device: str | None = None
    bf16: bool = False
    compile: bool = False
    fast: bool = False
    save_every: int = 200
    keep: int = 2
    save_dtype: str = "float32"
    fresh: bool = False
    replicate: int = 1
    shard: int = -1
    tensor: int = 1
    checkpointing: str | None = None
    max_skipped: int = 0
    hang_after: float = 600.0
    profile: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("optimizer", tuple(OPTIMIZERS)),
            ("save_dtype", tuple(SAVE_DTYPES)),
            ("checkpointing", (None, *POLICIES)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                words = ", ".join(word for word in allowed if word)
                raise ValueError(f"{name}={value!r} must be one of {words}.")
        for name in (
            "epochs",
            "batch_size",
            "accumulate",
            "seq_len",
            "save_every",
            "keep",
            "hang_after",
            "lr",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value} must be a number above 0.")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1.")
        if self.profile is not None and self.profile < 2:
            raise ValueError(
                f"profile={self.profile} must be at least 2: the first step warms up."
            )
        for name in ("warmup", "seed", "max_skipped"):
            if not 0 <= getattr(self, name) < 2**63:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0.")
