"""What one rank holds of a sharded training step, before anything is built.

    slices      weights, gradients, two Adam moments: 16 bytes a weight / ranks
    borrowed    the block that computes, the one on its way, and the buffers of both
    its own     activations of its rows, in the dtype of the gathered weights

The first shrinks with the number of ranks; the other two do not. So with many ranks the
fullest moment is decided by a block, by the rows, and by the loss, which holds three
float32 numbers for each word of the vocabulary and each token.
"""

from dataclasses import dataclass

from minllama.architecture.accounting import BITS, count_parameters
from minllama.architecture.accounting_peak import moments
from minllama.architecture.accounting_training import TrainingStep, block_matrices
from minllama.architecture.config import LlamaConfig


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How `shard` was told to keep and to send weights.

    Args:
        ranks: that share one copy of the model.
        dtype: of slices and optimizer states.
        reduce_dtype: of gradients on their way.
        reshard: a block is forgotten after its forward pass.
    """

    ranks: int
    dtype: str = "float32"
    reduce_dtype: str = "float32"
    reshard: bool = True

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"ranks={self.ranks} must be at least 1.")
        for name in ("dtype", "reduce_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16", "float16"):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be float32, bfloat16 or "
                    "float16."
                )


def sharded_moments(
    config: LlamaConfig, step: TrainingStep, how: Sharding
) -> dict[str, dict[str, float]]:
    """Moments that may be the fullest, and what a rank holds at each, in bytes.

    Args:
        config: of the model.
        step: of one rank: its rows; its dtype is that of the gathered weights.
        how: the sharding.
    """
    count, n = count_parameters(config), how.ranks
    table = config.vocab_size * config.dim
    block = block_matrices(config)
    size, reduce = BITS[how.dtype] // 8, BITS[how.reduce_dtype] // 8
    g = step.weight  # bytes of a gathered weight, and of its gradient before it leaves
    always = {"slices": size * count / n, "optimizer": 2 * size * count / n}
    root = g * table if config.tie_embeddings else 0  # gathered for the whole step
    blocks = 0 if how.reshard else g * config.n_layers * block
    head = 0 if config.tie_embeddings else table
    grads = {  # of slices, as far as they are made
        "backward of the head": head,
        "backward of the last block": head,
        "backward of the first block": count - table - block,
        "backward of the embedding": count - table,
        "step of the optimizer": count,
    }
    leaving = {  # gradients of a unit: computed, copied for the reduce-scatter, reduced
        "backward of the head": table,
        "backward of the last block": block,
        "backward of the first block": 2 * block,
        "backward of the embedding": table,
    }
    coming = {  # gathered for this moment, and the buffer that they came in
        "cross-entropy": head,
        "backward of cross-entropy": head,
        "backward of the head": 2 * head,
        "backward of the last block": 3 * block,
        "backward of the first block": 2 * block,
    }
    found = {}
    for name, held in moments(config, step).items():
        own = {what: v for what, v in held.items() if what != "gradients"}
        if name == "step of the optimizer":
            own.pop("temporaries")  # fused AdamW over slices takes none
        gone = leaving.get(name, 0)
        found[name] = {
            **always,
            **own,
            "gathered for the whole step": root + blocks if "step" not in name else 0,
            "gathered, and on its way": g * coming.get(name, 0),
            "gradients of slices": size * grads.get(name, 0) / n,
            "gradients on their way": gone * (g + reduce + reduce / n),
        }
    return found


def sharded_peak(
    config: LlamaConfig, step: TrainingStep, how: Sharding
) -> tuple[str, dict[str, float]]:
    """The fullest moment of a rank's step, and the bytes of all that it holds.

    Example:
        >>> config = LlamaConfig.from_name("llama-3.1-8b")
        >>> step = TrainingStep(
        ...     batch_size=2, seq_len=4096, checkpointing=True, packed=False
        ... )
        >>> moment, parts = sharded_peak(config, step, Sharding(ranks=4))
        >>> moment, round(sum(parts.values()) / 2**30)
        ('backward of cross-entropy', 37)
    """
    found = sharded_moments(config, step, how)
    name = max(found, key=lambda moment: sum(found[moment].values()))
    return name, found[name]
