"""Supervised fine-tuning, as far as the hub's loop does not do it already.

    model = add_lora(MinimalLlama.from_pretrained("stories"))
    talks = encode_conversations(read_conversations("talks.jsonl"), tok, seq_len=256)
    batches = PackedBatches(talks.documents, batch_size=8, seq_len=256)
    train(model, make_adamw(model, 1e-3), batches, steps=100)

`train` learns what has requires_grad, a marked document says itself which of its tokens
count, and `save_checkpoint(…, parts="trainable")` keeps what learns and nothing else.
What is left: the loss on text held out, and a learned prompt in front of each document.
"""

import numpy as np
import torch
from torch import nn

from minllama.architecture.data import MARKED, PackedBatches, mark
from minllama.architecture.train import next_token_loss
from minllama.peft.prompt import prepend_prompt


@torch.no_grad()
def held_out_loss(
    model: nn.Module, documents: list[np.ndarray], seq_len: int, batch_size: int = 16
) -> float:
    """Mean nats per learned token over all documents, none of which sees another.

    Args:
        model: in any state; left as it was.
        documents: ids, or marked ones.
        seq_len: tokens of a row; a longer document is cut there.
        batch_size: rows computed at once.

    Raises:
        ValueError: no document of two tokens, or none with a token to learn.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    batches = PackedBatches(documents, batch_size, seq_len)
    rows = list(batches.arrange(batches.documents))
    nats, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = batches.lay_out(rows[start : start + batch_size]).to(device)
        nats += next_token_loss(model, batch).item()
        count += int(batch.counted())
    model.train(training)
    if not count:
        raise ValueError("no document has a token to learn; give some with answers.")
    return nats / count


def with_prompt(
    model: nn.Module, documents: list[np.ndarray], seq_len: int
) -> list[np.ndarray]:
    """The ids of a learned prompt (`add_prompt`) before each document, not learned.

    Longer documents are cut at seq_len first, so that each piece has the prompt before
    it. Rows of seq_len and the prompt's size hold every one.
    """
    ids = prepend_prompt(model, torch.empty(1, 0, dtype=torch.long))[0].tolist()
    longer = []
    for document in documents:
        for start in range(0, len(document) - 1, seq_len):
            piece = document[start : start + seq_len + 1]
            marked = piece.dtype == MARKED
            own = piece["id"] if marked else piece
            learned = piece["learned"] if marked else np.ones(len(own), np.bool_)
            rest = learned[1:].tolist()  # the first token was no target, and is none
            longer.append(mark([*ids, *own], [False] * (len(ids) + 1) + rest))
    return longer
