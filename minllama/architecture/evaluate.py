"""How well a model predicts text, in units that do not depend on its tokenizer.

Loss per token flatters a large vocabulary: its tokens are longer, so there are fewer
of them. Bits per byte charges the same text the same way:

    bits per byte = (sum of nats over the tokens scored) / (ln 2 x UTF-8 bytes scored)

8 would be random bytes; what gzip reaches on English prose is near 3.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minllama.architecture.data import IGNORE
from minllama.architecture.model import MinimalLlama
from minllama.architecture.tokenizer import Tokenizer


@dataclass(frozen=True)
class Score:
    """What was lost on a text, and how much text that was."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """The tokenizer-free measure."""
        return self.nats / (math.log(2) * self.bytes)

    @property
    def perplexity(self) -> float:
        """exp(mean loss per token): comparable only between equal tokenizers."""
        return math.exp(self.nats / self.tokens)


@torch.no_grad()
def score_documents(
    model: MinimalLlama,
    tok: Tokenizer,
    documents: Sequence[str],
    max_tokens: int = 512,
    batch_size: int = 16,
) -> Score:
    """Score each document alone, after one begin token, up to max_tokens of its tokens.

    The end token is not counted, and bytes are those of the tokens scored. The model
    computes in its own dtype; the loss is float32 at least, its sum float64.

    Raises:
        ValueError: no document, or a tokenizer without a begin token.
    """
    if not documents:
        raise ValueError("no document to score; give at least one text.")
    if tok.bos_id is None:
        raise ValueError("the tokenizer has no bos_id; scoring begins with that token.")
    device = model.embed_tokens.weight.device
    rows = [tok.encode(text)[:max_tokens] for text in documents]
    rows = sorted((row for row in rows if row), key=len)  # like lengths share a batch
    if not rows:
        raise ValueError("every document is empty; give at least one with text.")
    if tok.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer's vocab_size={tok.vocab_size} exceeds the model's "
            f"{model.config.vocab_size}; tokenizer and model do not belong together."
        )
    nats = 0.0
    for start in range(0, len(rows), batch_size):
        part = [torch.tensor(row) for row in rows[start : start + batch_size]]
        targets = torch.nn.utils.rnn.pad_sequence(part, True, IGNORE).to(device)
        begin = torch.full_like(targets[:, :1], tok.bos_id)
        tokens = torch.cat([begin, targets[:, :-1].clamp(min=0)], dim=1)  # (B, T)
        logits = model(tokens)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        each = F.cross_entropy(
            logits.flatten(0, 1),
            targets.flatten(),
            ignore_index=IGNORE,
            reduction="none",
        )
        nats += each.double().sum().item()
    size = sum(len(tok.token_bytes(token)) for row in rows for token in row)
    return Score(nats, sum(map(len, rows)), size)
