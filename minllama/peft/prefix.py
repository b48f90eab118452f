"""Prefix tuning: p learned keys and values in front of every layer's own.

Every token sees them, as if a text of p tokens stood before it, one that need not be
made of words, and may differ from layer to layer. Positions therefore start at p. The
model's outputs change at once: what is learned starts at random.

With a projection (P-tuning v2's option) keys and values come from a small network of
all layers, which trains more steadily; it is needed while training only.

Papers: prefix tuning Li and Liang 2021, arXiv:2101.00190 · P-tuning v2 Liu et al. 2021,
2110.07602.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from minllama.architecture.layout import Layout
from minllama.architecture.model import MinimalLlama
from minllama.architecture.rope import Rope, Rotation
from minllama.peft.adapter import Adapter, Spec
from minllama.peft.attach import check_free, wrap
from minllama.peft.base import model_dtype, place


@dataclass(frozen=True, kw_only=True)
class PrefixedLayout(Layout):
    """Packed documents behind p keys that all see: no interval any more, but a mask."""

    size: int = 0
    inner: Layout | None = None

    def interval(self, S: int) -> tuple[Tensor, Tensor]:
        """None.

        Raises:
            ValueError: always; an attention that cannot take a mask cannot be used.
        """
        raise ValueError(
            "a prefix in front of packed documents is no interval of keys; use the "
            "plain attention core, which takes a mask, or one text a row."
        )

    def mask(self, S: int) -> Tensor:
        """(B or 1, 1, T, S): the prefix, and what the inner layout shows."""
        assert self.inner is not None
        own = self.inner.mask(S - self.size)  # made once for all layers
        return nn.functional.pad(own, (self.size, 0), value=True)


def behind(layout: Layout, size: int) -> Layout:
    """The same tokens with `size` keys in front that everyone sees."""
    if layout.is_triangle:
        return replace(layout, start=layout.start + size)
    if layout.first is None and type(layout) is Layout:
        assert layout.last is not None
        return replace(layout, last=layout.last + size)
    return PrefixedLayout(
        positions=layout.positions,
        first=layout.first,
        last=layout.last,
        rotation=layout.rotation,
        size=size,
        inner=layout,
    )


class PrefixEncoder(nn.Module):
    """Makes hidden numbers of the prefix, (p, hidden), that each layer projects."""

    def __init__(self, size: int, width: int, hidden: int, place: dict) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, width, **place)
        self.transform = nn.Linear(width, hidden, **place)

    def forward(self) -> Tensor:
        return torch.tanh(self.transform(self.embedding.weight))


class PrefixRope(Adapter):
    """The model's rope, with positions counted behind the prefix. Holds the encoder."""

    base: Rope

    def __init__(
        self, base: nn.Module, spec: Spec, encoder: PrefixEncoder | None
    ) -> None:
        super().__init__(base, spec)
        self.encoder = encoder

    def reset_parameters(self) -> None:
        """As torch draws an embedding and a linear layer."""
        if self.encoder is not None:
            self.encoder.embedding.reset_parameters()
            self.encoder.transform.reset_parameters()

    def trained(self) -> list[nn.Parameter]:
        return [] if self.encoder is None else list(self.encoder.parameters())

    @property
    def amplitude(self) -> float:
        """The base's."""
        return self.base.amplitude

    def speeds(self, positions: Tensor) -> Tensor:
        """The base's."""
        return self.base.speeds(positions)

    def forward(self, positions: Tensor) -> Rotation:
        size = self.spec.settings["size"]
        return self.base(positions if self.strength == 0 else positions + size)


class PrefixCore(Adapter):
    """An attention core that sees p more keys and values, the same in each row."""

    def __init__(
        self, base: nn.Module, spec: Spec, heads: tuple[int, int], rope: PrefixRope,
        place: dict,
    ) -> None:  # fmt: skip
        super().__init__(base, spec)
        self.heads, self.rope = heads, [rope]  # a list: it has its place elsewhere
        K, d = heads
        if rope.encoder is None:
            self.prefix = nn.Parameter(
                torch.empty(spec.settings["size"], 2 * K * d, **place)
            )
        else:
            hidden = rope.encoder.transform.out_features
            self.project = nn.Linear(hidden, 2 * K * d, **place)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal numbers, as torch draws an embedding."""
        if hasattr(self, "prefix"):
            nn.init.normal_(self.prefix)
        else:
            self.project.reset_parameters()

    def trained(self) -> list[nn.Parameter]:
        mine = [self.prefix] if hasattr(self, "prefix") else self.project.parameters()
        return list(mine)

    def flat(self) -> Tensor:
        """Keys, then values, (p, 2 K d)."""
        if hasattr(self, "prefix"):
            return self.prefix
        assert self.rope[0].encoder is not None
        return self.project(self.rope[0].encoder())

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        if self.strength == 0:
            return self.base(q, k, v, layout)
        flat = self.flat().to(k.dtype).unflatten(-1, (2, *self.heads))  # (p, 2, K, d)
        flat = flat.expand(k.size(0), *flat.shape)  # (B, p, 2, K, d)
        k = torch.cat([flat[:, :, 0], k], dim=1)
        v = torch.cat([flat[:, :, 1], v], dim=1)
        return self.base(q, k, v, behind(layout, flat.size(1)))


def add_prefix(
    model: MinimalLlama,
    size: int = 16,
    hidden: int | None = None,
    name: str = "default",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Freeze the model, then put `size` learned keys and values before each layer's.

    Args:
        model: a Llama of this library, changed in place and returned.
        size: p, tokens of the prefix.
        hidden: width of a projection that makes the prefix while training; None: the
            keys and values themselves are learned.
        name: of the adapter.
        dtype: of what is learned; None: the model's.

    Raises:
        ValueError: a size below 1.
    """
    if size < 1 or (hidden is not None and hidden < 1):
        raise ValueError(f"size={size} and hidden={hidden} must be at least 1.")
    check_free(model, name)
    config = model.config
    spec = Spec(name, "prefix", {"size": size, "hidden": hidden})
    heads = (config.n_kv_heads, config.head_dim)
    activations = model_dtype(model)
    at = place(model.embed_tokens, dtype, activations)
    width = heads[0] * heads[1]
    encoder = None if hidden is None else PrefixEncoder(size, width, hidden, at)
    model.requires_grad_(False)
    rope = PrefixRope(model.rope, spec, encoder)
    wrap(model, ["rope"], lambda *_: rope)

    def make(at_name: str, core: nn.Module) -> PrefixCore:
        attention = model.get_submodule(at_name.rpartition(".")[0])
        where = place(attention.get_submodule("k_proj"), dtype, activations)
        return PrefixCore(core, spec, heads, rope, where)

    cores = [f"layers.{i}.self_attn.core" for i in range(config.n_layers)]
    return wrap(model, cores, make)
