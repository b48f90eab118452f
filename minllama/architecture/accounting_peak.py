"""What is held at the fullest moment: of a training step, of reading a prompt.

Through the backward pass gradients grow while what the forward pass kept shrinks. With
a large vocabulary the fullest moment is at neither end but at the second operation,
when three float32 tensors of the logits' shape exist at once:

    log p, kept by log_softmax  ·  d loss / d log p  ·  d loss / d logits

12 V bytes a token: with the 128,256 words of Llama 3.2 1B nearly as much as all its
sixteen blocks keep. The chapter large_vocab makes them vanish.
benchmarks/bench_memory.py holds these numbers against the GPU's allocator.
"""

from minllama.architecture.accounting import named_shapes, parameters_by_part, part_of
from minllama.architecture.accounting_training import (
    TrainingStep,
    block_bytes,
    block_matrices,
    saved_elsewhere,
    state_bytes,
)
from minllama.architecture.config import LlamaConfig


def optimizer_bytes(config: LlamaConfig, step: TrainingStep) -> int:
    """Bytes that a step of the optimizer takes and gives back.

    Fused AdamW takes none; as a loop over the weights, on a CPU, two tensors of a
    weight's size, while one of the weight before is still there. Muon looks one step
    ahead for all matrices of the blocks, then turns those of equal shape as one stack:
    the stack itself and, in the precision of its products, either the matrices, two
    terms and their sum, and a square, or the matrices, one term and four squares.
    """
    shapes = named_shapes(config)
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    sizes = [step.weight * shape.numel() for shape in matrices.values()]
    if step.optimizer == "adamw":
        loop = max(2 * now + last for now, last in zip(sizes, [0, *sizes]))
        return 0 if step.device == "cuda" else loop
    inner = [
        shape
        for name, shape in matrices.items()
        if part_of(name) in ("attention", "feed-forward")
    ]
    product = 2 if step.device == "cuda" else 4
    most = last = 0
    for shape in dict.fromkeys(inner):
        stack = inner.count(shape) * shape.numel()
        square = inner.count(shape) * min(shape) ** 2
        turning = product * max(4 * stack + square, 2 * stack + 4 * square)
        most = max(most, last + step.weight * stack + turning)
        last = step.weight * stack  # steps of this shape stay until the next are made
    ahead = step.weight * sum(shape.numel() for shape in inner)
    return max(ahead + most, 5 * max(sizes))  # embedding and head take AdamW's step


def moments(config: LlamaConfig, step: TrainingStep) -> dict[str, dict[str, int]]:
    """Moments that may be the fullest, and what each holds beside weights and states.

    From block to block gradients grow and the rest shrinks evenly, so that none between
    the last and the first is fuller than both. Within a block most is held at the
    product of SwiGLU, when its two factors get their gradients.
    """
    N, V, t = config.n_layers, config.vocab_size, step.tokens
    full, kept, mask = block_bytes(config, step)
    elsewhere = saved_elsewhere(config, step)
    gradients = _gradients(config, step)
    batch = elsewhere["tokens, targets, positions"]
    log_p = elsewhere["log p, float32"]
    logits = step.product * V * t
    copy = 0 if step.product == 4 else log_p  # .float() of float32 copies nothing
    stream = step.weight * config.dim * t
    casts = step.cast * N * block_matrices(config) if step.checkpointing else 0
    forward = {
        "kept by the blocks": N * kept + mask,
        "kept beside them": sum(elsewhere.values()) - log_p,
    }
    within = {
        "kept beside them": batch + elsewhere["cosines and sines, float32"],
        "gradients of activations": stream + 2 * step.product * config.ffn_dim * t,
    }
    held = {
        "cross-entropy": {
            **forward,
            "bfloat16 copies of the blocks": casts,  # autocast drops them in the end
            "logits, again in float32, log p": logits + copy + log_p,
        },
        "backward of cross-entropy": {**forward, "log p and two gradients": 3 * log_p},
        "backward of the head": {**forward, "gradient of the logits": logits},
        "backward of the last block": {
            "kept by the blocks": (N - 1) * kept + full + mask,
            **within,
        },
        "backward of the first block": {"kept by the blocks": full + mask, **within},
        "backward of the embedding": {
            "kept beside them": batch,
            "gradients of activations": stream,
        },
        "step of the optimizer": {
            "kept beside them": batch,
            "temporaries": optimizer_bytes(config, step),
        },
    }
    return {at: {**parts, "gradients": gradients[at]} for at, parts in held.items()}


def _gradients(config: LlamaConfig, step: TrainingStep) -> dict[str, int]:
    """Bytes of the weights' gradients at those moments.

    That of a tied table comes in two halves, from the head and from the embedding, and
    the first waits for the second. Their sum takes a third, but under autocast: there
    the head's half is a fresh float32 copy, to which the other is added in place.
    """
    g = step.weight
    tied = config.tie_embeddings
    total = g * sum(parameters_by_part(config).values())
    table = g * config.vocab_size * config.dim
    tables = table if not tied else 2 * table if step.autocast else 3 * table
    # That of down_proj was just made, or added to the one before; its cast is freed.
    down = config.ffn_dim * config.dim * ((0 if step.accumulate else g) - step.cast)
    before = total if step.accumulate else 0
    head = table if tied or not before else 0  # if it waits, or is new
    others = 0 if before else total - (1 if tied else 2) * table
    first = 0 if before else g * block_matrices(config)  # not made yet
    return {
        "cross-entropy": before,
        "backward of cross-entropy": before,
        "backward of the head": before + table,
        "backward of the last block": before + head + down,
        "backward of the first block": before + head + others - first + down,
        "backward of the embedding": (before or total - table) + tables,
        "step of the optimizer": total,
    }


def training_peak(
    config: LlamaConfig, step: TrainingStep
) -> tuple[str, dict[str, int]]:
    """The fullest moment of a step, and the bytes of all that it holds."""
    all_moments = moments(config, step)
    name = max(all_moments, key=lambda moment: sum(all_moments[moment].values()))
    total = sum(parameters_by_part(config).values())
    always = {"weights": step.weight * total, "optimizer": state_bytes(config, step)}
    return name, {**always, **all_moments[name]}


def prefill_bytes(
    config: LlamaConfig, batch_size: int, seq_len: int, size: int = 2
) -> int:
    """Bytes that reading a prompt takes beside weights and cache, and gives back.

    Held at once are three tensors of width D (a block's input, the residual stream
    after attention, its norm) and three of width F (silu(gate), up, their product); or,
    where heads are wide as in Qwen3, what turns the queries, two of it in float32.

    Args:
        config: of the model.
        batch_size: prompts, of equal length.
        seq_len: tokens of each, in one pass.
        size: bytes of a number: 2, or 4 in float32.
    """
    D, q_dim = config.dim, config.n_heads * config.head_dim
    kv_dim = config.n_kv_heads * config.head_dim
    feed_forward = size * 3 * (D + config.ffn_dim)
    rope = size * (2 * D + 2 * q_dim + 2 * kv_dim) + 2 * 4 * q_dim
    positions = (2 * 4 * config.head_dim + 8) * seq_len
    block = max(feed_forward, rope) * batch_size * seq_len + positions
    logits = (size + 4) * config.vocab_size * batch_size  # of the last token only
    return max(block, logits)
