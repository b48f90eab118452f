"""Models of one's own, each a few lines, and each theorem of the hub still holds.

A part is changed by overriding one seam (`project`, `attend`, `mix`, `embed`, …), by a
module in a slot (`core`, `rope`), or by rewriting linear layers. Then: the seam is
reached, cached = uncached, packed = alone, the future does not matter, everything
learns, a checkpoint comes back, and compiled code is one graph.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from minllama.architecture.cache import Caches, GrowingKVCache, KVCache, StaticCaches
from minllama.architecture.config import LlamaConfig
from minllama.architecture.layout import Layout, packed
from minllama.architecture.model import (
    Attention,
    AttentionCore,
    Block,
    FeedForward,
    MinimalLlama,
    RMSNorm,
)
from minllama.architecture.rope import Rope
from minllama.architecture.surgery import replace_modules
from tests.conftest import (
    DEVICE,
    CountingBackend,
    GatedLlama,
    make_model,
    random_tokens,
    tiny_config,
    widen,
)


def named(*words: str) -> Callable[[str, nn.Module], bool]:
    return lambda name, _: name.split(".")[-1] in words


# ---- Seams of attention


class DifferentialAttention(Attention):
    """Two maps, one subtracted: noise cancels. Ye et al. 2024, arXiv:2410.05258."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.share = nn.Parameter(torch.tensor([0.4]))
        self.head_norm = RMSNorm(config.head_dim, config.norm_eps)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        (q1, q2), (k1, k2) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)
        noise = self.core(q2, k2, v, layout)
        return self.head_norm(self.core(q1, k1, v, layout) - self.share * noise)


class SoftCappedAttention(Attention):
    """Queries and keys are squashed after their projection: the seam `project`."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x)
        return 2 * (q / 2).tanh(), 2 * (k / 2).tanh(), v


class LatentAttention(nn.Module):
    """The cache holds a narrow latent and one rotary key for all heads, not K and V.

    Shares nothing with `Attention` but the signature. DeepSeek-AI 2024,
    arXiv:2405.04434, section 2.1.
    """

    rank = 12

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.H, self.d = config.n_heads, config.head_dim
        D, H, d = config.dim, self.H, self.d
        self.q_proj = nn.Linear(D, 2 * H * d, bias=False)  # a plain and a turned half
        self.kv_a_proj = nn.Linear(D, self.rank + d, bias=False)
        self.kv_a_norm = RMSNorm(self.rank, config.norm_eps)
        self.kv_b_proj = nn.Linear(self.rank, 2 * H * d, bias=False)
        self.o_proj = nn.Linear(H * d, D, bias=False)
        self.core = AttentionCore()

    def new_cache(self, batch_size: int, max_seq_len: int) -> KVCache:
        return KVCache(batch_size, max_seq_len)

    def forward(self, x: Tensor, layout: Layout, cache=None) -> Tensor:
        q, q_turned = self.q_proj(x).unflatten(-1, (self.H, -1)).chunk(2, dim=-1)
        parts = self.kv_a_proj(x)[:, :, None]  # (B, T, 1, rank + d)
        latent, k_turned = parts.split([self.rank, self.d], dim=-1)
        latent = self.kv_a_norm(latent)
        q_turned, k_turned = layout.rotation.turn_both(q_turned, k_turned)
        if cache is not None:
            latent, k_turned, layout = cache.update(latent, k_turned, layout)
        k, v = self.kv_b_proj(latent[:, :, 0]).unflatten(-1, (self.H, -1)).chunk(2, -1)
        k = torch.cat([k, k_turned.expand_as(k)], dim=-1)  # (B, S, H, 2 d)
        q = torch.cat([q, q_turned], dim=-1)  # (B, T, H, 2 d)
        return self.o_proj(self.core(q, k, v, layout).flatten(-2))


class LeakyState:
    """What a recurrence keeps of the past: one vector a row."""

    h: Tensor | float = 0.0


class LeakyMixer(nn.Module):
    """h_t = a h_{t-1} + u_t, anew where a document begins: no keys, no values."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.in_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.decay = nn.Parameter(torch.zeros(config.dim))

    def new_cache(self, batch_size: int, max_seq_len: int) -> LeakyState:
        return LeakyState()

    def forward(self, x: Tensor, layout: Layout, cache=None) -> Tensor:
        cache = cache or LeakyState()
        goes_on = (layout.positions > 0)[..., None] * self.decay.sigmoid()  # (B, T, D)
        states = []
        for a, u in zip(goes_on.unbind(1), self.in_proj(x).unbind(1)):
            cache.h = a * cache.h + u  # (B, D)
            states.append(cache.h)
        return self.o_proj(torch.stack(states, dim=1))


def with_attention(attention: type[nn.Module]) -> MinimalLlama:
    class OwnBlock(Block):
        attention_class = attention

    class OwnLlama(MinimalLlama):
        block_class = OwnBlock

    return OwnLlama(tiny_config())


# ---- Seams of block and model


class ParallelBlock(Block):
    """Attention and feed-forward side by side, as in PaLM, arXiv:2204.02311."""

    def forward(self, x: Tensor, layout: Layout, cache=None) -> Tensor:
        own = self.self_attn(self.input_layernorm(x), layout, cache)
        return x + own + self.mlp(self.post_attention_layernorm(x))


class OnePlusNorm(RMSNorm):
    """Gemma's: the weight counts from one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, 1 + self.weight, self.eps)


class OnePlusBlock(Block):
    norm_class = OnePlusNorm


class ReLUSquared(FeedForward):
    """relu(gate x)^2 * up x: So et al. 2021, arXiv:2109.08668, gated."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.gate_proj(x)).square() * self.up_proj(x))


class ReLUBlock(Block):
    feed_forward_class = ReLUSquared


def with_block(block: type[Block]) -> MinimalLlama:
    class OwnLlama(MinimalLlama):
        block_class = block

    return OwnLlama(tiny_config())


class NumberLlama(MinimalLlama):
    """Tokens below 10 are digits and share one vector, times their value.

    Golkar et al. 2023, arXiv:2310.02989. `values` overrides what the ids say.
    """

    def embed(self, tokens: Tensor, values: Tensor | None = None) -> Tensor:
        if values is None:
            values = torch.where(tokens < 10, tokens / 3, 1)
        x = super().embed(tokens.where(tokens >= 10, 0))
        return x * values[..., None].to(x.dtype)


# ---- Slots


class AlibiCore(AttentionCore):
    """Scores fall with the distance, a slope a head. Press et al., arXiv:2108.12409."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        H, S, times = q.size(2), k.size(1), q.size(2) // k.size(2)
        slopes = 2.0 ** (-8 * torch.arange(1, H + 1, device=q.device) / H)
        _, last = layout.interval(S)  # (B or 1, T)
        distance = last[..., None] - torch.arange(S, device=q.device)  # (B or 1, T, S)
        bias = -slopes[:, None, None] * distance[:, None]  # (B or 1, H, T, S)
        bias = bias.masked_fill(~layout.mask(S), -torch.inf).to(q.dtype)
        k, v = (x.repeat_interleave(times, dim=2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


class StillRope(Rope):
    """Turns nothing: for positions that are told in another way."""

    def speeds(self, positions: Tensor) -> Tensor:
        return 0 * super().speeds(positions)


class LinearRope(Rope):
    """Position interpolation: Chen et al. 2023, arXiv:2306.15595."""

    factor = 4.0

    def speeds(self, positions: Tensor) -> Tensor:
        return super().speeds(positions) / self.factor


class WindowCore(nn.Module):
    """Whatever core it is, now over the newest keys only."""

    def __init__(self, core: nn.Module, window: int) -> None:
        super().__init__()
        self.core, self.window = core, window

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        return self.core(q, k, v, layout.within(self.window, k.size(1)))


class PrefixCore(nn.Module):
    """Learned keys and values before all others. Li and Liang, arXiv:2101.00190."""

    def __init__(self, core: nn.Module, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.core = core
        self.k = nn.Parameter(torch.randn(shape))  # (p, K, d)
        self.v = nn.Parameter(torch.randn(shape))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        if layout.first is not None:
            raise ValueError(
                "layout.first is given: prefix and document are no interval."
            )
        if layout.last is not None:
            layout = replace(layout, last=layout.last + self.k.size(0))
        k, v = (
            torch.cat([new.expand(len(old), -1, -1, -1), old], dim=1)
            for new, old in ((self.k, k), (self.v, v))
        )
        return self.core(q, k, v, layout)


# ---- Rewritten linear layers


class LoRALinear(nn.Module):
    """base(x) + B A x. Hu et al. 2021, arXiv:2106.09685."""

    def __init__(self, base: nn.Module, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / 6)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


class Int8Linear(nn.Module):
    """A byte a weight and a scale a row. Keeps no parameter."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        scale = base.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (base.weight.detach() / scale).round().char())
        self.register_buffer("scale", scale.squeeze(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


# ---- The variants


def make_int8(model: MinimalLlama) -> MinimalLlama:
    body = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    return replace_modules(model, named(*body), Int8Linear)


def alibi() -> MinimalLlama:
    model = MinimalLlama(tiny_config())
    model.rope = StillRope(8, 1e4)
    return replace_modules(model, named("core"), lambda _: AlibiCore())


def linear_rope() -> MinimalLlama:
    model = MinimalLlama(tiny_config())
    model.rope = LinearRope(8, 1e4)
    return model


def windowed() -> MinimalLlama:
    model = MinimalLlama(tiny_config())
    return replace_modules(model, named("core"), lambda core: WindowCore(core, 5))


def hybrid() -> MinimalLlama:
    """One layer remembers by recurrence, the other by keys and values."""
    model = MinimalLlama(tiny_config())
    model.layers[0].self_attn = LeakyMixer(model.config)
    return model


def prefixed() -> MinimalLlama:
    model = MinimalLlama(tiny_config())
    return replace_modules(
        model, named("core"), lambda core: PrefixCore(core, (3, 2, 8))
    )


def adapted() -> MinimalLlama:
    return replace_modules(
        MinimalLlama(tiny_config()), named("q_proj", "v_proj", "up_proj"), LoRALinear
    )


VARIANTS: dict[str, Callable[[], MinimalLlama]] = {
    "differential": lambda: with_attention(DifferentialAttention),
    "gated": lambda: GatedLlama(tiny_config()),
    "capped": lambda: with_attention(SoftCappedAttention),
    "latent": lambda: with_attention(LatentAttention),
    "hybrid": hybrid,
    "parallel": lambda: with_block(ParallelBlock),
    "other norm": lambda: with_block(OnePlusBlock),
    "other feed-forward": lambda: with_block(ReLUBlock),
    "numbers": lambda: NumberLlama(tiny_config()),
    "alibi": alibi,
    "linear rope": linear_rope,
    "window": windowed,
    "prefix": prefixed,
    "lora": adapted,
    "int8": lambda: make_int8(widen(MinimalLlama(tiny_config()))),
}


def make_variant(name: str) -> MinimalLlama:
    """Peaked random weights, float64, on the device."""
    return widen(VARIANTS[name]()).double().to(DEVICE).eval()


@pytest.fixture(params=VARIANTS)
def variant(request) -> MinimalLlama:
    return make_variant(request.param)


# ---- Every theorem for every variant


@torch.no_grad()
def test_the_change_is_reached(variant):
    """Its logits are not those of a plain Llama with the weights that they share."""
    plain = make_model("llama").double()
    own = plain.state_dict()
    for name, weight in variant.state_dict().items():
        name = name.replace(".base", "")
        if name in own and own[name].shape == weight.shape:
            own[name].copy_(weight)
    tokens = random_tokens(2, 23)
    assert (variant(tokens) - plain(tokens)).abs().max() > 0.01


@pytest.mark.parametrize("kind", [Caches, StaticCaches])
@torch.no_grad()
def test_cached_logits_equal_uncached(variant, kind):
    tokens = random_tokens(2, 23)
    expected = variant(tokens)
    for split in ([1] * 23, [9, 1, 13], [22, 1]):
        caches = variant.new_caches(2, 23, kind)
        pieces = [variant(part, caches=caches) for part in tokens.split(split, dim=1)]
        assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "prefix"])
@torch.no_grad()
def test_packed_logits_are_those_of_each_document_alone(name):
    variant, tokens, lengths = make_variant(name), random_tokens(1, 23), [9, 1, 13]
    documents = [torch.arange(n, device=DEVICE) for n in lengths]
    together = variant(tokens, layout=packed(torch.cat(documents)[None]))
    alone = [variant(part) for part in tokens.split(lengths, dim=1)]
    assert_close(together, torch.cat(alone, dim=1), rtol=0, atol=1e-12)


def test_no_gradient_comes_from_the_future(variant):
    x = variant.embed(random_tokens(1, 13)).detach().requires_grad_()
    hidden = variant.hidden_states(None, embeds=x)
    (dx,) = torch.autograd.grad(hidden[:, 6].square().sum(), x)
    size = dx.abs().sum(-1)[0]  # (T,)
    assert (size[7:] == 0).all() and (size[3:7] > 0).all()


def test_every_parameter_learns(variant):
    variant(random_tokens(2, 19)).square().mean().backward()
    for name, weight in variant.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_a_checkpoint_comes_back(name):
    variant, twin = make_variant(name), make_variant(name)  # other random numbers
    tokens = random_tokens(2, 9)
    assert not torch.equal(twin(tokens), variant(tokens))
    twin.load_state_dict(variant.state_dict(), strict=True)
    assert torch.equal(twin(tokens), variant(tokens))
    assert torch.equal(copy.deepcopy(variant)(tokens), variant(tokens))


@torch.no_grad()
def test_adding_lora_changes_no_output(variant):
    tokens = random_tokens(2, 9)
    before = variant(tokens)
    replace_modules(variant, named("o_proj", "down_proj"), LoRALinear)
    variant.double().to(DEVICE)
    assert torch.equal(variant(tokens), before)


@torch.no_grad()
def test_compiled_it_is_one_graph_and_the_same(variant):
    backend = CountingBackend()
    tokens = random_tokens(2, 12)
    expected = variant(tokens)
    caches = variant.new_caches(2, 16, StaticCaches)
    variant(tokens[:, :8], caches=caches)

    @torch.compile(fullgraph=True, dynamic=False, backend=backend)
    def step(token: Tensor) -> Tensor:
        return variant(token, caches=caches)

    for i in range(8, 12):
        got = step(tokens[:, i : i + 1])
        assert_close(got[:, 0], expected[:, i], rtol=0, atol=1e-12)
    assert backend.graphs == 1


# ---- And what is special about some


@torch.no_grad()
def test_a_window_core_is_mistrals_window():
    mistral = make_model("mistral", sliding_window=5)
    model = windowed().to(DEVICE)
    model.load_state_dict(mistral.state_dict())
    tokens = random_tokens(2, 23)
    assert torch.equal(model(tokens), mistral(tokens))


@torch.no_grad()
def test_a_window_goes_around_any_core():
    """Around ALiBi's, and an ALiBi put into a window already there, are one."""
    models = [alibi(), windowed()]
    replace_modules(models[0], named("core"), lambda core: WindowCore(core, 5))
    models[1].rope = StillRope(8, 1e4)
    for layer in models[1].layers:
        layer.self_attn.core.core = AlibiCore()
    widen(models[0])
    models[1].load_state_dict(models[0].state_dict())
    tokens = random_tokens(2, 23).cpu()
    assert torch.equal(models[0](tokens), models[1](tokens))


@torch.no_grad()
def test_interpolated_positions_are_the_plain_ones_divided():
    scaled, tokens = make_variant("linear rope"), random_tokens(2, 9)
    plain = make_model("llama").double()
    plain.load_state_dict(scaled.state_dict())
    at = torch.arange(9, device=DEVICE)[None]
    got = scaled(tokens, layout=Layout(positions=4 * at))
    assert_close(got, plain(tokens), rtol=0, atol=1e-4)  # float32 angles


@torch.no_grad()
def test_a_prefix_is_keys_that_every_token_sees():
    """Against a cache that was given the prefix as its first keys."""
    model = make_variant("prefix")
    plain = make_model("llama").double()
    plain.load_state_dict(model.state_dict(), strict=False)
    tokens = random_tokens(2, 9)
    caches = plain.new_caches(2, 12)
    caches.layers = [GrowingKVCache(2, 12) for _ in plain.layers]
    for cache, layer in zip(caches.layers, model.layers):
        core = layer.self_attn.core
        cache.k, cache.v = (x.expand(2, -1, -1, -1) for x in (core.k, core.v))
    assert_close(plain(tokens, caches=caches), model(tokens), rtol=0, atol=1e-12)


def test_a_prefix_before_packed_documents_is_refused():
    """Prefix and document together are two intervals, and a layout knows one."""
    layout = packed(torch.tensor([[0, 1, 0, 1]], device=DEVICE))
    with pytest.raises(ValueError, match="layout.first is given"):
        make_variant("prefix")(random_tokens(1, 4), layout=layout)


class NewestKeys(GrowingKVCache):
    """Keeps four keys for the next call, all that a window of five needs."""

    def update(self, k, v, layout):
        k, v, layout = super().update(k, v, layout)
        self.k, self.v = k[:, -4:], v[:, -4:]
        return k, v, layout


@torch.no_grad()
def test_a_layer_may_have_a_window_and_a_cache_of_its_own():
    """Window, full, window, full: Gemma's pattern, and the memory that it saves."""
    model = widen(MinimalLlama(tiny_config(n_layers=4))).double().to(DEVICE)
    for layer in model.layers[::2]:
        layer.self_attn.core = WindowCore(layer.self_attn.core, 5)
        layer.self_attn.cache_class = NewestKeys
    tokens = random_tokens(2, 23)
    expected = model(tokens)
    for split in ([1] * 23, [9, 1, 13], [2, 21]):
        caches = model.new_caches(2, 23)
        pieces = [model(part, caches=caches) for part in tokens.split(split, dim=1)]
        assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=1e-12)
        assert [cache.k.size(1) for cache in caches.layers] == [4, 23, 4, 23]
    with pytest.raises(ValueError, match="NewestKeys has no fixed slots"):
        model(tokens, caches=model.new_caches(2, 23, StaticCaches))


@torch.no_grad()
def test_numbers_may_come_from_outside():
    """Values beside tokens, through `embeds`, in a cache as without."""
    model = make_variant("numbers")
    tokens, values = random_tokens(2, 9), torch.rand(2, 9, device=DEVICE)
    x = model.embed(tokens, values)
    expected = model(None, embeds=x)
    assert (expected - model(tokens)).abs().max() > 0.01
    caches = model.new_caches(2, 9)
    got = [
        model(None, caches=caches, embeds=part) for part in x.split([5, 1, 3], dim=1)
    ]
    assert_close(torch.cat(got, dim=1), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_int8_costs_half_a_step_of_each_row():
    """A weight moves by at most half its row's scale: 1 / 254 of the largest."""
    plain = make_model("llama").double()
    model = make_int8(copy.deepcopy(plain))
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            exact = plain.get_submodule(name).weight
            moved = (module.weight * module.scale[:, None] - exact).abs()
            assert (moved <= exact.abs().amax(1, keepdim=True) / 253.9).all()
    tokens = random_tokens(2, 9)
    error = (model(tokens) - plain(tokens)).norm() / plain(tokens).norm()
    assert 0 < error < 0.1


@torch.no_grad()
def test_latent_attention_caches_the_latent():
    model = make_variant("latent")
    caches = model.new_caches(2, 9)
    model(random_tokens(2, 9), caches=caches)
    assert caches.layers[0].k.shape == (2, 9, 1, 12)  # the latent, for all heads
    assert caches.layers[0].v.shape == (2, 9, 1, 8)  # and their rotary key


@torch.no_grad()
def test_changes_stack():
    """Qwen3 with a prefix over a window, int8 below LoRA: cached equals uncached."""
    model = make_model("qwen3")
    make_int8(model)
    replace_modules(model, named("q_proj", "down_proj"), LoRALinear)
    replace_modules(model, named("core"), lambda core: PrefixCore(core, (3, 2, 12)))
    for name, weight in model.named_parameters():
        if name.endswith(".b"):
            nn.init.normal_(weight, std=0.3)
    model.double().to(DEVICE)
    tokens = random_tokens(2, 23)
    expected = model(tokens)
    for kind in (Caches, StaticCaches):
        caches = model.new_caches(2, 23, kind)
        pieces = [
            model(part, caches=caches) for part in tokens.split([9, 1, 13], dim=1)
        ]
        assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=1e-12)
