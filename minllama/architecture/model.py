"""Llama from bottom to top: norm, attention, feed-forward, block, model.

B batch · T new tokens · S tokens seen so far · V vocabulary · D model width
F feed-forward width · H query heads · K key/value heads · d head width · N layers

What may be replaced, and stays replaced through caches, training and checkpoints:
seams to override in a subclass (`block_class`, `attention_class`, …, `embed`,
`project`, `attend`, `mix`), and slots that hold a module without weights of its own
(`model.rope`, `self_attn.core`).

Papers: Llama arXiv:2302.13971 · RMSNorm 1910.07467 · SwiGLU 2002.05202 · shared
key/value heads 2305.13245.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minllama.architecture.cache import Caches, KVCache
from minllama.architecture.config import LlamaConfig
from minllama.architecture.layout import Layout
from minllama.architecture.rope import make_rope


class RMSNorm(nn.Module):
    """w * x / sqrt(mean(x^2) + eps), statistics in float32. (..., D) -> (..., D)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)  # differs under autocast; fused if alike
        return F.rms_norm(x, weight.shape, weight, self.eps)


class AttentionCore(nn.Module):
    """softmax(q k / sqrt d) v over the keys that the layout shows. Has no weights.

    (B, T, H, d), (B, S, K, d) twice -> (B, T, H, d). A slot: faster, paged or
    distributed attention replaces this module; a subclass may call it twice.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        T, H = q.shape[1:3]
        S, K = k.shape[1:3]
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, K, S, d)
        if T == 1:  # the H / K queries that share a key head become rows of one
            mask = None if layout.is_triangle else layout.mask(S)  # (B, 1, 1, S)
            rows = q.reshape(q.size(0), K, H // K, -1)
            y = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
            return y.reshape(q.size(0), 1, H, -1)
        q = q.transpose(1, 2)  # (B, H, T, d)
        if layout.is_triangle and T == S:
            shared = H != K
            y = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=shared
            )
        else:  # fused kernels take a mask or shared heads, not both
            k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask(S))
        return y.transpose(1, 2)


class Attention(nn.Module):
    """Causal attention whose key/value heads are shared by H / K query heads."""

    cache_class = KVCache

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_dim = config.n_heads * config.head_dim  # not always dim: Qwen3
        kv_dim = config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)
        self.core = AttentionCore()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> q (B, T, H, d), k and v (B, T, K, d). Seam: norms, biases."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        """(B, T, H, d), (B, S, K, d) twice -> (B, T, H, d). Seam: other maps."""
        return self.core(q, k, v, layout)

    def mix(self, x: Tensor, layout: Layout, cache: KVCache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, H d): the heads side by side. Seam: gates on heads."""
        q, k, v = self.project(x)
        assert layout.rotation is not None  # the model fills it in
        q, k = layout.rotation.turn_both(q, k)
        if cache is not None:
            k, v, layout = cache.update(k, v, layout)  # (B, S, K, d)
        return self.attend(q, k, v, layout).flatten(-2)

    def new_cache(self, batch_size: int, max_seq_len: int) -> KVCache:
        """The state that this attention keeps between calls."""
        return self.cache_class(batch_size, max_seq_len)

    def forward(self, x: Tensor, layout: Layout, cache=None) -> Tensor:
        return self.o_proj(self.mix(x, layout, cache))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x). (B, T, D) -> (B, T, F) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Two steps beside the residual stream: attend, then think. (B, T, D) -> same."""

    attention_class: type = Attention
    feed_forward_class: type = FeedForward
    norm_class: type = RMSNorm

    def __init__(self, config: LlamaConfig, index: int = 0) -> None:
        super().__init__()
        self.input_layernorm = self.norm_class(config.dim, config.norm_eps)
        self.self_attn = self.attention_class(config)
        self.post_attention_layernorm = self.norm_class(config.dim, config.norm_eps)
        self.mlp = self.feed_forward_class(config)

    def new_cache(self, batch_size: int, max_seq_len: int):
        """The state that this layer keeps between calls."""
        return self.self_attn.new_cache(batch_size, max_seq_len)

    def forward(self, x: Tensor, layout: Layout, cache=None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), layout, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def check_layout(layout: Layout, new: Tensor, caches: Caches) -> None:
    """Refuse a layout that was made for other tokens than the new (B, T).

    Raises:
        ValueError: positions of another shape, or a triangle that the caches did not
            reserve: it would overwrite what stands there.
    """
    places, (B, T) = tuple(layout.positions.shape), new.shape[:2]
    if places not in ((B, T), (1, T)):  # would be broadcast, over heads even
        raise ValueError(
            f"layout.positions of shape {places} do not fit tokens of shape {(B, T)}; "
            "give (B, T), or (1, T) for all rows."
        )
    if type(caches) is not Caches or all(cache is None for cache in caches.layers):
        return
    end = layout.start + T
    if end != caches.length if layout.is_triangle else T > caches.length:
        raise ValueError(
            f"layout.start={layout.start} and {T} tokens do not end at the caches' "
            f"length={caches.length}; take the layout from caches.reserve({T}) and "
            "replace what differs."
        )


class MinimalLlama(nn.Module):
    """Tokens (B, T) -> logits (B, T, V). Holds weights, and no other state.

    Random weights: normal with standard deviation 0.02, and the two projections that
    write into the residual stream divided by sqrt(2 N), as in GPT-2, so that the
    stream does not grow with depth.

    Raises:
        ValueError: the config belongs to another class of the family.
    """

    block_class: type[Block] = Block
    model_type = "llama"
    has_window = False  # True in a class that builds config.sliding_window

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        if config.model_type not in (None, self.model_type):
            raise ValueError(
                f"config.model_type={config.model_type!r} is not what "
                f"{type(self).__name__} builds ({self.model_type!r}); use "
                "MinimalLlama.from_config(config), which picks the class."
            )
        if config.sliding_window is not None and not self.has_window:
            raise ValueError(
                f"sliding_window={config.sliding_window} is built by Mistral, not by "
                f"{type(self).__name__}; set it to None and use the chapter "
                "long_context."
            )
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.rope = make_rope(config)
        blocks = (self.block_class(config, index) for index in range(config.n_layers))
        self.layers = nn.ModuleList(blocks)
        self.norm = self.block_class.norm_class(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.init_weights()
        self.tie_weights()

    def init_weights(self) -> None:
        """Draw the random weights anew; norms start at 1, biases at 0. Seam."""
        writes = ("o_proj.weight", "down_proj.weight")
        for module in self.modules():
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        for name, weight in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(weight)
            elif weight.dim() > 1:
                shrink = (
                    (2 * self.config.n_layers) ** 0.5 if name.endswith(writes) else 1
                )
                nn.init.normal_(weight, std=0.02 / shrink)

    def tie_weights(self) -> None:
        """Let the head share the embedding's weight, if the config says so.

        Loading with `assign=True`, `to_empty` and tensor parallelism undo the tie: call
        this after each.

        Raises:
            ValueError: the head is no plain linear layer any more (quantized, adapted);
                tying would throw that away in silence.
        """
        if not self.config.tie_embeddings:
            return
        if type(self.lm_head) is not nn.Linear:
            raise ValueError(
                f"lm_head is {type(self.lm_head).__name__}, no nn.Linear; tie the "
                "weights before the head is rewritten."
            )
        self.lm_head.weight = self.embed_tokens.weight

    def new_caches(
        self, batch_size: int, max_seq_len: int, kind: type[Caches] = Caches
    ) -> Caches:
        """Empty caches for `batch_size` rows of at most `max_seq_len` tokens.

        `kind` is `Caches` (rows advance together) or `StaticCaches` (rows of different
        length; fixed shapes for compiled and captured steps).
        """
        layers = [
            layer.new_cache(batch_size, max_seq_len)  # type: ignore[operator]
            for layer in self.layers
        ]
        device = next(self.parameters()).device
        return kind(layers, batch_size, max_seq_len, device)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, D). Seam: values, images, prompts."""
        return self.embed_tokens(tokens)

    def hidden_states(
        self,
        tokens: Tensor | None,
        caches: Caches | None = None,
        layout: Layout | None = None,
        embeds: Tensor | None = None,
    ) -> Tensor:
        """(B, T) -> (B, T, D): the trunk, after the last norm, without the head.

        Args:
            tokens: ids (B, T), or None where `embeds` takes their place.
            caches: continue what these saw; None: a text of its own.
            layout: where the tokens sit and what they see; None: the caches decide.
            embeds: (B, T, D) in place of `embed(tokens)`.

        Raises:
            ValueError: no (B, T) or (B, T, D), another batch size than the caches', a
                layout of other tokens, or more tokens than the caches hold.
        """
        new = tokens if embeds is None else embeds  # T from here: x may be sharded
        if new is None or new.dim() != (2 if embeds is None else 3):
            shape = None if new is None else tuple(new.shape)
            raise ValueError(
                f"input of shape {shape}: give tokens (B, T) or embeds (B, T, D)."
            )
        x = self.embed(new) if embeds is None else embeds
        if caches is None:
            none = [None] * len(self.layers)
            caches = Caches(none, new.size(0), new.size(1), new.device)
        if new.size(0) != caches.batch_size:  # one row would be spread over all
            raise ValueError(
                f"{new.size(0)} rows do not fit caches of batch_size="
                f"{caches.batch_size}; make new_caches with that of the tokens."
            )
        if layout is None:
            layout = caches.reserve(new.size(1))
        else:
            check_layout(layout, new, caches)
        layout = replace(layout, rotation=self.rope(layout.positions))
        for layer, cache in zip(self.layers, caches.layers, strict=True):
            x = layer(x, layout, cache)
        return self.norm(x)

    def forward(
        self,
        tokens: Tensor | None,
        caches: Caches | None = None,
        layout: Layout | None = None,
        embeds: Tensor | None = None,
        at: int | Tensor | None = None,
    ) -> Tensor:
        """(B, T) -> (B, T, V), or (B, 1, V) with `at`.

        Args:
            tokens: as in `hidden_states`; so are caches, layout and embeds.
            caches: see `hidden_states`.
            layout: see `hidden_states`.
            embeds: see `hidden_states`.
            at: compute the logits of one token per row only: its index, the same for
                all rows (-1: the last) or (B,) of them. A prompt of 8,192 tokens of a
                1B Llama has 2 GB of logits in bfloat16; generation needs the last row.
        """
        x = self.hidden_states(tokens, caches, layout, embeds)  # (B, T, D)
        if isinstance(at, int):
            x = x[:, at, None]  # (B, 1, D)
        elif at is not None:
            x = x[torch.arange(x.size(0), device=x.device), at][:, None]  # (B, 1, D)
        return self.lm_head(x)

    @classmethod
    def from_config(cls, config: LlamaConfig) -> "MinimalLlama":
        """Random weights, in the class that `config.model_type` names.

        Called on a subclass of your own it builds that subclass.
        """
        from minllama.architecture.families import class_for

        return class_for(cls, config.model_type)(config)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        new: Iterable[str] = (),
    ) -> "MinimalLlama":
        """Weights of a shipped model, or of a folder. See `weights.load_pretrained`."""
        from minllama.architecture.weights import load_pretrained

        return load_pretrained(cls, folder, dtype, device, new)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that this library and transformers read back."""
        from minllama.architecture.weights import save_pretrained

        save_pretrained(self, folder)
