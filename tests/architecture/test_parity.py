"""Our logits are transformers' logits, and the comparison would see it if not."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from minllama.architecture.cache import Caches, StaticCaches
from minllama.architecture.config import LlamaConfig
from minllama.architecture.layout import Layout
from minllama.architecture.model import AttentionCore, MinimalLlama, RMSNorm
from minllama.architecture.rope import Llama3Rope, Rope, Rotation
from minllama.architecture.surgery import replace_modules
from tests.conftest import DEVICE, SCALING, make_model, random_tokens

# Of the largest logit. float32 carries 24 bits, and two layers of sums in another order
# cost some of them. On a GPU, moreover, the speeds of rope may differ in the last bit
# from those that transformers computed on the CPU, and 200 tokens multiply that.
TOLERANCE = 1e-5 if DEVICE == "cpu" else 5e-5

FAMILIES = {
    "llama": {},
    "llama31": {"rope_theta": 500.0, "head_dim": 16},
    "mistral": {"sliding_window": 16},
    "mistral, no window": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
}


def make_ours(family: str, **changes) -> MinimalLlama:
    """A model whose numbers all matter: 8 heads, and an eps that shows."""
    sizes = {"n_heads": 8, "n_kv_heads": 2, "head_dim": 8, "norm_eps": 0.02}
    settings = {**sizes, **FAMILIES[family], **changes}
    return make_model(family.split(",")[0], **settings)


def oracle(model: MinimalLlama) -> nn.Module:
    """The same weights in transformers' own code, with its slowest attention."""
    c: LlamaConfig = model.config
    rope = {
        "rope_type": "default",
        **(c.rope_scaling or {}),
        "rope_theta": c.rope_theta,
    }
    window = (
        {"sliding_window": c.sliding_window} if model.model_type == "mistral" else {}
    )
    settings = transformers.AutoConfig.for_model(
        model.model_type, vocab_size=c.vocab_size, hidden_size=c.dim,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim,
        intermediate_size=c.ffn_dim, rms_norm_eps=c.norm_eps, rope_parameters=rope,
        max_position_embeddings=c.max_seq_len, tie_word_embeddings=c.tie_embeddings,
        bos_token_id=None, eos_token_id=None, **window,
    )  # fmt: skip
    twin = transformers.AutoModelForCausalLM.from_config(
        settings, attn_implementation="eager"
    )
    weights = {hugging_face_name(name): w for name, w in model.state_dict().items()}
    twin.load_state_dict(weights, strict=True)
    return twin.to(DEVICE).eval()


def hugging_face_name(name: str) -> str:
    return name if name.startswith("lm_head") else f"model.{name}"


@torch.no_grad()
def worst_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest logit."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def parity_error(model: MinimalLlama, twin: nn.Module, tokens: Tensor) -> float:
    """The comparison that every test of this file makes."""
    return worst_error(model(tokens), twin(tokens).logits)


@torch.no_grad()
def cached_parity_error(
    model: MinimalLlama, twin: nn.Module, tokens: Tensor, kind: type[Caches] = Caches
) -> float:
    """The same, for a prefill of 9 tokens and then one at a time."""
    caches = model.new_caches(tokens.size(0), tokens.size(1), kind)
    pieces = [tokens[:, :9], *tokens[:, 9:].split(1, dim=1)]
    logits = torch.cat([model(piece, caches=caches) for piece in pieces], dim=1)
    return worst_error(logits, twin(tokens).logits)


@torch.no_grad()
def greedy(
    model: MinimalLlama, tokens: Tensor, steps: int, kind: type[Caches]
) -> Tensor:
    caches = model.new_caches(tokens.size(0), tokens.size(1) + steps, kind)
    new = tokens
    for _ in range(steps):
        new = model(new, caches=caches, at=-1).argmax(-1)  # (B, 1)
        tokens = torch.cat([tokens, new], dim=1)
    return tokens


@pytest.mark.parametrize("n_kv_heads", [8, 4, 2, 1])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, tied, n_kv_heads):
    model = make_ours(family, tie_embeddings=tied, n_kv_heads=n_kv_heads)
    tokens = random_tokens(2, 200)  # four times llama31's original context of 48
    assert parity_error(model, oracle(model), tokens) <= TOLERANCE


@pytest.mark.parametrize("kind", [Caches, StaticCaches])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_logits_are_those_of_transformers(family, kind):
    model = make_ours(family)
    tokens = random_tokens(2, 70)
    assert cached_parity_error(model, oracle(model), tokens, kind) <= TOLERANCE


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_texts_are_those_of_transformers(family, tied):
    model = make_ours(family, tie_embeddings=tied)
    prompt = random_tokens(2, 7)
    expected = oracle(model).generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
        max_new_tokens=64, pad_token_id=0,
    )  # fmt: skip
    for kind in (Caches, StaticCaches):
        assert greedy(model, prompt, 64, kind).tolist() == expected.tolist()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_names_and_shapes_are_those_of_transformers(family, tied):
    model = make_ours(family, tie_embeddings=tied)
    ours = {hugging_face_name(k): w.shape for k, w in model.state_dict().items()}
    theirs = {k: w.shape for k, w in oracle(model).state_dict().items()}
    assert ours == theirs


# ---- Planted mistakes: the comparison above must see each of them.


class NeighbourRotation(Rotation):
    """Meta's pairing: (0, 1), (2, 3), …, under weights laid out for (i, i + d/2)."""

    def turn(self, x: Tensor) -> Tensor:
        shuffled = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        turned = super().turn(shuffled)
        return turned.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


class NeighbourRope(Rope):
    def forward(self, positions: Tensor) -> Rotation:
        return NeighbourRotation(*super().forward(positions))


class BackwardRope(Rope):
    def forward(self, positions: Tensor) -> Rotation:
        return super().forward(-positions)


class WrongCore(AttentionCore):
    """Attention by hand, with room for a mistake."""

    def share(self, k: Tensor, times: int) -> Tensor:
        return k.repeat_interleave(times, dim=2)

    def scale(self, d: int) -> float:
        return d**-0.5

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        k, v = (self.share(x, q.size(2) // x.size(2)) for x in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) * self.scale(q.size(-1))
        scores = scores.masked_fill(~layout.mask(k.size(1)), -torch.inf)
        return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


class InterleavedHeads(WrongCore):
    def share(self, k: Tensor, times: int) -> Tensor:
        return k.repeat(1, 1, times, 1)


class OneHeadForAll(WrongCore):
    def share(self, k: Tensor, times: int) -> Tensor:
        return k[:, :, :1].expand(-1, -1, k.size(2) * times, -1)


class Unscaled(WrongCore):
    def scale(self, d: int) -> float:
        return 1.0


class SeesOneAhead(WrongCore):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        first, last = layout.interval(k.size(1))
        return super().forward(q, k, v, replace(layout, first=first, last=last + 1))


class NormOutsideEps(RMSNorm):
    """eps added to the root instead of to the mean square."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


class MeanNorm(RMSNorm):
    """LayerNorm's mean taken off."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


def replace_norms(model: MinimalLlama, norm: type[RMSNorm]) -> None:
    for module in model.modules():
        if type(module) is RMSNorm:
            module.__class__ = norm


def replace_cores(model: MinimalLlama, core: type[AttentionCore]) -> None:
    replace_modules(model, lambda name, _: name.endswith("core"), lambda _: core())


def set_eps(model: MinimalLlama, eps: float) -> None:
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eps = eps


def change_rope(model: MinimalLlama, kind: type[Rope], theta: float = 10000.0) -> None:
    model.rope = kind(model.config.head_dim, theta)


def change_scaling(model: MinimalLlama, **changes) -> None:
    c = model.config
    model.rope = Llama3Rope(c.head_dim, c.rope_theta, {**SCALING, **changes})


def swap(module: nn.Module, a: str, b: str) -> None:
    first, second = getattr(module, a), getattr(module, b)
    setattr(module, a, second)
    setattr(module, b, first)


def change_window(model: MinimalLlama, window: int | None) -> None:
    for layer in model.layers:
        layer.self_attn.window = window


def untie(model: MinimalLlama) -> None:
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))


def turn_before_norm(model: MinimalLlama) -> None:
    """Qwen3's norms after rope instead of before: same lengths, other channels."""
    for layer in model.layers:
        attention = layer.self_attn
        norms = attention.q_norm, attention.k_norm
        plain = type(attention).__mro__[1].project

        class Late(Rotation):
            def turn_both(self, q, k, norms=norms):
                q, k = super().turn_both(q, k)
                return norms[0](q), norms[1](k)

        def mix(x, layout, cache=None, attention=attention, late=Late):
            layout = replace(layout, rotation=late(*layout.rotation))
            return type(attention).mix(attention, x, layout, cache)

        attention.project = plain.__get__(attention)
        attention.mix = mix


MISTAKES = {
    "wrong theta": ("llama", lambda m: change_rope(m, Rope, theta=9900.0)),
    "neighbouring pairs": ("llama", lambda m: change_rope(m, NeighbourRope)),
    "turned backward": ("llama", lambda m: change_rope(m, BackwardRope)),
    "no scaling": ("llama31", lambda m: change_rope(m, Rope, theta=500.0)),
    "factor 32 for 8": ("llama31", lambda m: change_scaling(m, factor=32.0)),
    "low for high": ("llama31", lambda m: change_scaling(m, high_freq_factor=3.0)),
    "other origin": (
        "llama31",
        lambda m: change_scaling(m, original_max_position_embeddings=64),
    ),
    "heads dealt round": ("llama", lambda m: replace_cores(m, InterleavedHeads)),
    "one head for all": ("llama", lambda m: replace_cores(m, OneHeadForAll)),
    "no 1 / sqrt(d)": ("llama", lambda m: replace_cores(m, Unscaled)),
    "sees one ahead": ("llama", lambda m: replace_cores(m, SeesOneAhead)),
    "eps ignored": ("llama", lambda m: set_eps(m, 0.0)),
    "eps of another model": ("llama", lambda m: set_eps(m, 0.021)),
    "eps outside the root": ("llama", lambda m: replace_norms(m, NormOutsideEps)),
    "a mean taken off": ("llama", lambda m: replace_norms(m, MeanNorm)),
    "gate is up": ("llama", lambda m: swap(m.layers[1].mlp, "gate_proj", "up_proj")),
    "norms swapped": (
        "llama",
        lambda m: swap(m.layers[0], "input_layernorm", "post_attention_layernorm"),
    ),
    "keys are values": (
        "llama",
        lambda m: swap(m.layers[0].self_attn, "k_proj", "v_proj"),
    ),
    "layers swapped": ("llama", lambda m: swap(m.layers, "0", "1")),
    "no last norm": ("llama", lambda m: setattr(m, "norm", nn.Identity())),
    "head not tied": ("llama-tied", untie),
    "no window": ("mistral", lambda m: change_window(m, None)),
    "window one more": ("mistral", lambda m: change_window(m, 17)),
    "window one less": ("mistral", lambda m: change_window(m, 15)),
    "no norm of q": (
        "qwen3",
        lambda m: setattr(m.layers[0].self_attn, "q_norm", nn.Identity()),
    ),
    "no norm of k": (
        "qwen3",
        lambda m: setattr(m.layers[0].self_attn, "k_norm", nn.Identity()),
    ),
    "q and k norms swapped": (
        "qwen3",
        lambda m: swap(m.layers[0].self_attn, "q_norm", "k_norm"),
    ),
    "turned before the norm": ("qwen3", turn_before_norm),
    "no bias of q": (
        "qwen2",
        lambda m: setattr(m.layers[0].self_attn.q_proj, "bias", None),
    ),
    "no bias of k": (
        "qwen2",
        lambda m: setattr(m.layers[0].self_attn.k_proj, "bias", None),
    ),
    "no bias of v": (
        "qwen2",
        lambda m: setattr(m.layers[0].self_attn.v_proj, "bias", None),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_shows_in_the_logits(mistake):
    family, plant = MISTAKES[mistake]
    family, _, tied = family.partition("-")
    model = make_ours(family, tie_embeddings=bool(tied))
    twin, tokens = oracle(model), random_tokens(2, 200)
    assert parity_error(model, twin, tokens) <= TOLERANCE
    plant(model)
    assert parity_error(model, twin, tokens) > 10 * TOLERANCE


def test_the_hand_written_core_of_the_mistakes_makes_none_itself():
    model = make_ours("llama")
    replace_cores(model, WrongCore)
    assert parity_error(model, oracle(model), random_tokens(2, 50)) <= TOLERANCE


class LateStep(Caches):
    """A step after the prefill stands one place too far: q and k keep their distance
    to each other, but not to the prefill's keys."""

    def reserve(self, T: int) -> Layout:
        layout = super().reserve(T)
        return replace(layout, positions=layout.positions + (layout.start > 0))


class StandingStill(Caches):
    """Every call begins at position 0."""

    def reserve(self, T: int) -> Layout:
        layout = super().reserve(T)
        return replace(layout, positions=layout.positions - layout.start)


class OneForAll(StaticCaches):
    """A step writes where the last one wrote."""

    def reserve(self, T: int) -> Layout:
        layout = super().reserve(T)
        return replace(layout, last=layout.last.clamp(max=9))


class ForgetsTheFirst(StaticCaches):
    """No token sees the first slot."""

    def reserve(self, T: int) -> Layout:
        layout = super().reserve(T)
        return replace(layout, first=torch.ones_like(layout.last))


@pytest.mark.parametrize("kind", [LateStep, StandingStill, OneForAll, ForgetsTheFirst])
def test_a_planted_mistake_of_the_cache_shows_in_the_logits(kind):
    model = make_ours("llama")
    twin, tokens = oracle(model), random_tokens(2, 70)
    assert cached_parity_error(model, twin, tokens, kind.__mro__[1]) <= TOLERANCE
    assert cached_parity_error(model, twin, tokens, kind) > 10 * TOLERANCE


def test_all_positions_one_too_far_cannot_show():
    """Rope tells distances, not places: this mistake is none, but for rounding."""
    model = make_ours("llama")
    tokens = random_tokens(2, 50)
    far = Layout(positions=torch.arange(1, 51, device=DEVICE)[None])
    with torch.no_grad():
        assert worst_error(model(tokens, layout=far), model(tokens)) <= TOLERANCE


def test_attention_of_these_models_is_peaked():
    """Else the mistakes above could hide: a flat average has no heads and no angles."""
    model = make_ours("llama")
    seen = []

    class Watching(WrongCore):
        def forward(self, q, k, v, layout):
            k = self.share(k, q.size(2) // k.size(2))
            scores = torch.einsum("bthd,bshd->bhts", q, k) / q.size(-1) ** 0.5
            scores = scores.masked_fill(~layout.mask(k.size(1)), -torch.inf)
            seen.append(scores.softmax(-1)[:, :, 100:].amax(-1).mean().item())
            return F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, self.share(v, 4))), is_causal=True
            ).transpose(1, 2)

    replace_cores(model, Watching)
    with torch.no_grad():
        model(random_tokens(2, 200))
    assert min(seen) > 5 / 100  # a flat average gives each at most 1 / 100
