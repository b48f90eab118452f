"""Prompt tuning: p learned embeddings in front of the text. Nothing else changes.

The p rows are the embeddings of p new ids, V … V + p - 1, that stand before a text:

    logits = model(prepend_prompt(model, tokens))[:, p:]
    text = generate(model, prepend_prompt(model, tokens))[:, p:]

So caches, generation and packing need to know nothing of it. The model does not put the
ids there by itself: without them it is as it was, and training moves nothing. To train,
put them before each document (`with_prompt` of sft.py). P-tuning makes the rows with a
small network while training.

Papers: prompt tuning Lester et al. 2021, arXiv:2104.08691 · P-tuning Liu et al. 2021,
2103.10385.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from minllama.architecture.model import MinimalLlama
from minllama.peft.adapter import Adapter, Spec, adapters
from minllama.peft.attach import attach
from minllama.peft.base import model_dtype, place


class PromptEmbedding(Adapter):
    """An embedding with p rows more, which are learned. (B, T) -> (B, T, D)."""

    sizes = ("embedding_dim",)

    def __init__(self, base: nn.Module, spec: Spec, place: dict) -> None:
        super().__init__(base, spec)
        self.first: int = base.num_embeddings  # type: ignore[assignment]  # of the rows
        size, D = spec.settings["size"], self.embedding_dim
        self.rows = nn.Parameter(torch.empty(size, D, **place))
        hidden = spec.settings["hidden"]
        self.encoder = None
        if hidden is not None:
            self.encoder = nn.Sequential(
                nn.Linear(D, hidden, **place),
                nn.ReLU(),
                nn.Linear(hidden, hidden, **place),
                nn.ReLU(),
                nn.Linear(hidden, D, **place),
            )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal numbers, or the embeddings of the words asked for."""
        words = self.spec.settings["words"]
        nn.init.normal_(self.rows)
        if words:
            ids = torch.tensor(words, device=self.rows.device)
            ids = ids.repeat(-(-len(self.rows) // len(ids)))[: len(self.rows)]
            self.rows.copy_(self.base(ids))
        for layer in self.encoder or ():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    @property
    def num_embeddings(self) -> int:  # type: ignore[override]
        """Ids that may be looked up: the prompt's, too, while it is on."""
        return self.first + (len(self.rows) if self.strength != 0 else 0)

    def trained(self) -> list[nn.Parameter]:
        return [self.rows, *(self.encoder.parameters() if self.encoder else ())]

    def prompt(self) -> Tensor:
        """The learned embeddings, (p, D)."""
        return self.rows if self.encoder is None else self.encoder(self.rows)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.strength == 0:
            return self.base(tokens)
        V, prompt = self.first, self.prompt()
        y = self.base(tokens.clamp(max=V - 1))
        learned = prompt.to(y.dtype)[(tokens - V).clamp(min=0)]
        return torch.where((tokens >= V)[..., None], learned, y)


def add_prompt(
    model: MinimalLlama,
    size: int = 16,
    words: Iterable[int] = (),
    hidden: int | None = None,
    name: str = "default",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Freeze the model, then give it `size` learned embeddings to stand before a text.

    Args:
        model: changed in place and returned. A call without `prepend_prompt` (to train:
            `with_prompt`) does not read the prompt, and gives it a gradient of zero.
        size: p, tokens of the prompt.
        words: ids whose embeddings the prompt starts at, again and again if they are
            fewer; (): random.
        hidden: width of a network that makes the prompt while training (P-tuning).
        name: of the adapter.
        dtype: of what is learned; None: the embedding's.

    Raises:
        ValueError: a size below 1, or an id that is no token.
    """
    table: nn.Module = model.embed_tokens
    V, words = table.num_embeddings, list(words)
    wrong = [word for word in words if not 0 <= word < V]
    if size < 1 or (hidden is not None and hidden < 1):
        raise ValueError(f"size={size} and hidden={hidden} must be at least 1.")
    if wrong:
        raise ValueError(f"words={wrong} are no tokens; ids are 0 to {V - 1}.")
    if any(isinstance(m, PromptEmbedding) for m in adapters(model).values()):
        raise ValueError(
            "the model has a prompt already, and a second would take the same ids; "
            "remove_adapter first, or make one longer prompt."
        )
    spec = Spec(name, "prompt", {"size": size, "words": words, "hidden": hidden})
    at = place(table, dtype, model_dtype(model))
    return attach(
        model, spec, ["embed_tokens"], lambda _, base: PromptEmbedding(base, spec, at)
    )


def prepend_prompt(model: nn.Module, tokens: Tensor) -> Tensor:
    """(B, T) -> (B, p + T): the prompt's ids before each row; as they are if it is off.

    Raises:
        ValueError: the model has no prompt.
    """
    for adapter in adapters(model).values():
        if isinstance(adapter, PromptEmbedding):
            if adapter.strength == 0:
                return tokens
            first, size = adapter.first, len(adapter.rows)
            ids = torch.arange(first, first + size, device=tokens.device)
            return torch.cat([ids.expand(len(tokens), -1), tokens], dim=1)
    raise ValueError("the model has no prompt to stand before the text; add_prompt.")
