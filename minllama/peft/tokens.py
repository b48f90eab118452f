"""Trainable tokens: a few rows of the embedding learn, the rest stay as they are.

Made for a vocabulary that was enlarged: only its new rows need training. Where head and
embedding share their weight, the head takes the same rows, so the tie holds. They lie
below a LoRA of the head, which adds to them as to all other rows.
"""

from collections.abc import Collection, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minllama.peft.adapter import Adapter, Spec
from minllama.peft.attach import all_or_nothing, check_free, wrap
from minllama.peft.base import float_weight, innermost, is_tied
from minllama.peft.lora_layers import LoRALinear
from minllama.peft.targets import find_modules, is_embedding, is_linear, outer_modules


def own_weight(layer: nn.Module) -> Tensor:
    """The table that some rows stand in for."""
    weight = float_weight(layer)
    if weight is None:
        raise ValueError(
            f"{type(innermost(layer)).__name__} holds no plain weight, so no row of it "
            "can be trained; train tokens before quantize."
        )
    return weight


class TokenRows(Adapter):
    """Rows `ids` of a table are trained as `rows` (n, D); all others are `base`'s."""

    def __init__(
        self,
        base: nn.Module,
        spec: Spec,
        ids: Collection[int],
        rows: nn.Parameter | None = None,
    ) -> None:
        super().__init__(base, spec)
        weight = own_weight(base)
        self.ids = list(ids)
        V = weight.size(0)
        wrong = [i for i in self.ids if not 0 <= i < V]
        if not self.ids or wrong or len(set(self.ids)) < len(self.ids):
            raise ValueError(
                f"token ids {wrong or self.ids}: give each once, from 0 to {V - 1}."
            )
        empty = torch.empty(len(self.ids), weight.size(1), device=weight.device)
        self.rows = nn.Parameter(empty.to(weight.dtype)) if rows is None else rows
        index = torch.empty(len(self.ids), dtype=torch.long, device=weight.device)
        slot = torch.empty(V, dtype=torch.long, device=weight.device)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("slot", slot, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The rows as they are in the table."""
        index = torch.tensor(self.ids, device=self.index.device)  # type: ignore[union-attr]
        self.index.copy_(index)  # type: ignore[operator]
        self.slot.fill_(-1)[index] = torch.arange(len(index), device=index.device)  # type: ignore[operator]
        self.rows.copy_(own_weight(self.base)[index])

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The table with the rows in their places."""
        return weight.index_copy(0, self.index, self.rows.to(weight.dtype)), bias  # type: ignore[arg-type]


class TokenRowsEmbedding(TokenRows):
    """(B, T) -> (B, T, D)."""

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.base(tokens)
        if self.strength == 0:
            return y
        slot = self.slot[tokens]  # type: ignore[index]  # (B, T), -1 where base's
        rows = F.embedding(slot.clamp(min=0), self.rows).to(y.dtype)
        return torch.where((slot >= 0)[..., None], rows, y)


class TokenRowsLinear(TokenRows):
    """The head's side: (…, D) -> (…, V), the columns of `ids` from the trained rows."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.strength == 0:
            return y
        return y.index_copy(-1, self.index, F.linear(x, self.rows.to(x.dtype)))  # type: ignore[arg-type]


def train_tokens(
    model: nn.Module, spec: Spec, tokens: Iterable[int] | Mapping[str, Iterable[int]]
) -> None:
    """Put TokenRows around the named tables; a tied head shares the embedding's rows.

    Raises:
        ValueError: a wrong name or id, or a tied head with rows of its own.
    """
    named: dict = (
        dict(tokens) if isinstance(tokens, Mapping) else {"embed_tokens": tokens}
    )
    wanted = {find_modules(model, [name])[0]: list(ids) for name, ids in named.items()}
    modules = outer_modules(model)
    tied = is_tied(model)
    if tied and "lm_head" in wanted and wanted.get("embed_tokens") != wanted["lm_head"]:
        raise ValueError(
            "lm_head shares the weight of embed_tokens, so it cannot have trained rows "
            "of its own; name embed_tokens alone, or untie them."
        )
    for name, ids in wanted.items():
        if name == "lm_head" and tied:
            continue
        kind = TokenRowsEmbedding if is_embedding(modules[name]) else TokenRowsLinear
        if not (is_embedding(modules[name]) or is_linear(modules[name])):
            raise ValueError(f"{name} is no embedding and no linear layer.")
        wrap(model, [name], lambda _, m, kind=kind, ids=ids: kind(m, spec, ids))
    if tied and "embed_tokens" in wanted:
        shared = model.embed_tokens.rows  # type: ignore[union-attr]
        ids = wanted["embed_tokens"]
        lora = (
            type(modules["lm_head"]) is LoRALinear and modules["lm_head"].spec is spec
        )
        at = "lm_head.base" if lora else "lm_head"
        wrap(model, [at], lambda _, m: TokenRowsLinear(m, spec, ids, shared))  # type: ignore[arg-type]


def add_trainable_tokens(
    model: nn.Module,
    tokens: Iterable[int] | Mapping[str, Iterable[int]],
    name: str = "default",
) -> nn.Module:
    """Train some rows of the embedding, or of embedding and head, and nothing else.

    Args:
        model: changed in place.
        tokens: ids, for `embed_tokens`; or name -> ids, for any table. A head that
            shares the embedding's weight follows it.
        name: of the adapter.

    Raises:
        ValueError: a wrong name or id.
    """
    check_free(model, name)
    with all_or_nothing(model, name):
        model.requires_grad_(False)
        train_tokens(model, Spec(name, "trainable_tokens"), tokens)
    return model
