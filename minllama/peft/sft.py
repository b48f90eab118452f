"""Supervised fine-tuning, as far as the hub's loop does not do it already.

    model = add_lora(MinimalLlama.from_pretrained("stories"))
    talks = encode_conversations(read_conversations("talks.jsonl"), tok, seq_len=256)
    batches = PackedBatches(talks.documents, batch_size=8, seq_len=256)
    train(model, make_adamw(model, 1e-3), batches, steps=100)

`train` learns what has requires_grad, and a marked document says itself which of its
tokens count. What is left: the loss on text held out, a learned prompt in front of each
document, and a training state of only what learns.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from minllama.architecture.data import MARKED, PackedBatches, mark
from minllama.architecture.hooks import load_training_state, save_training_state
from minllama.architecture.train import Run, next_token_loss
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


class Learned:
    """What learns in a model, and nothing else, for a training state.

    The frozen rest is read again from where it came from: the state of an adapter of
    an 8B model then takes megabytes.
    """

    def __init__(self, model: nn.Module) -> None:
        named = model.named_parameters()
        self.weights = {name: p for name, p in named if p.requires_grad}

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(self.weights.values())

    def state_dict(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.weights.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises RuntimeError for other names or shapes, as a module does."""
        if differ := state.keys() ^ self.weights.keys():
            raise RuntimeError(f"{min(differ)} trains in one of the two only.")
        for name, p in self.weights.items():
            p.copy_(state[name])


def save_learned(run: Run, path: str | Path) -> None:
    """`save_training_state` of what learns; the frozen weights are left out."""
    save_training_state(replace(run, model=Learned(run.model)), path)  # type: ignore[arg-type]


def load_learned(run: Run, path: str | Path) -> Run:
    """Put a state of `save_learned` into a run made anew; it goes on bit for bit.

    Raises:
        ValueError: as `load_training_state`.
    """
    loaded = load_training_state(replace(run, model=Learned(run.model)), path)  # type: ignore[arg-type]
    run.step, run.tokens = loaded.step, loaded.tokens
    return run
