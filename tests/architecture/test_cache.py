"""Cached equals uncached for any split of the tokens, and no token is ever dropped."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from minllama.architecture.cache import Caches, GrowingKVCache, KVCache, StaticCaches
from minllama.architecture.layout import Layout, packed
from minllama.architecture.model import MinimalLlama
from tests.conftest import DEVICE, make_model, random_tokens, tiny_config

KINDS = [Caches, StaticCaches]
PAIRS = [(Caches, KVCache), (Caches, GrowingKVCache), (StaticCaches, KVCache)]
ON_CPU = pytest.mark.skipif(
    DEVICE != "cpu",
    reason="a GPU's counts are not read: the write asserts, and ends the process",
)


def with_cache(model: MinimalLlama, cache_class: type) -> MinimalLlama:
    for layer in model.layers:
        layer.self_attn.cache_class = cache_class
    return model


def random_split(total: int, seed: int) -> list[int]:
    """Lengths from 1 to all, that sum to the total."""
    draw = random.Random(seed)
    lengths = []
    while total:
        lengths.append(draw.randint(1, draw.choice([1, 5, total])))
        lengths[-1] = min(lengths[-1], total)
        total -= lengths[-1]
    return lengths


def in_pieces(model, tokens: Tensor, lengths: list[int], caches: Caches) -> Tensor:
    pieces = tokens.split(lengths, dim=1)
    return torch.cat([model(piece, caches=caches) for piece in pieces], dim=1)


# ---- Cached equals uncached


@pytest.mark.parametrize(("kind", "cache_class"), PAIRS)
@torch.no_grad()
def test_cached_logits_equal_uncached_for_any_split(any_model, kind, cache_class):
    with_cache(any_model.double(), cache_class)
    tokens = random_tokens(2, 23)
    expected = any_model(tokens)
    splits = [
        [23],
        [1] * 23,
        [22, 1],
        [1, 22],
        *(random_split(23, i) for i in range(4)),
    ]
    for split in splits:
        room = 23 + len(split) % 3  # to the last slot, and with slots to spare
        caches = any_model.new_caches(2, room, kind)
        got = in_pieces(any_model, tokens, split, caches)
        assert_close(got, expected, rtol=0, atol=1e-12, msg=f"{split}")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_logits_equal_uncached_in_float32(any_model, kind):
    tokens = random_tokens(3, 41)
    expected = any_model(tokens)
    for split in ([7, 1, 1, 19, 13], random_split(41, 0)):
        caches = any_model.new_caches(3, 64, kind)
        got = in_pieces(any_model, tokens, split, caches)
        worst = (got - expected).abs().max() / expected.abs().max()
        assert worst <= 1e-5, split


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_logits_in_bfloat16_stay_as_near_as_bfloat16_is(any_model, kind):
    """Both are roundings of the float32 logits; neither is further off."""
    tokens = random_tokens(2, 19)
    exact = any_model(tokens)
    any_model.bfloat16()
    whole = any_model(tokens)
    caches = any_model.new_caches(2, 32, kind)
    pieces = in_pieces(any_model, tokens, [11, 1, 1, 6], caches)
    assert pieces.dtype == torch.bfloat16
    assert caches.layers[0].k.dtype == torch.bfloat16
    rounding = (whole.float() - exact).norm()
    assert 0 < (pieces.float() - exact).norm() < 1.5 * rounding


@torch.no_grad()
def test_rows_of_different_length_are_as_each_row_alone(any_model):
    """Prompts padded on the right; each row then writes over its own padding."""
    any_model.double()
    lengths = torch.tensor([5, 11, 1, 8], device=DEVICE)
    tokens, new = random_tokens(4, 11), random_tokens(4, 6)
    caches = any_model.new_caches(4, 17, StaticCaches)
    first = any_model(tokens, caches=caches, at=lengths - 1)  # (B, 1, V)
    caches.lengths.copy_(lengths)
    steps = [any_model(token, caches=caches) for token in new.split([1, 1, 3, 1], 1)]
    for row, length in enumerate(lengths.tolist()):
        text = torch.cat([tokens[row, :length], new[row]])[None]
        alone = any_model(text)[0, length - 1 :]
        got = torch.cat([first[row], *(step[row] for step in steps)])
        assert_close(got, alone, rtol=0, atol=1e-12)
    assert caches.lengths.tolist() == (lengths + 6).tolist()


@torch.no_grad()
def test_layers_may_hold_different_caches():
    model = make_model("llama").double()
    model.layers[1].self_attn.cache_class = GrowingKVCache
    tokens = random_tokens(2, 23)
    caches = model.new_caches(2, 23)
    assert [type(cache) for cache in caches.layers] == [KVCache, GrowingKVCache]
    got = in_pieces(model, tokens, [9, 1, 13], caches)
    assert_close(got, model(tokens), rtol=0, atol=1e-12)


@torch.no_grad()
def test_packed_documents_can_be_put_into_a_static_cache():
    """A layout that names its slots is obeyed: as without the cache."""
    model = make_model("llama").double()
    tokens = random_tokens(2, 12)
    layout = packed(torch.cat([torch.arange(5), torch.arange(7)]).to(DEVICE)[None])
    got = model(tokens, caches=model.new_caches(2, 20, StaticCaches), layout=layout)
    assert_close(got, model(tokens, layout=layout), rtol=0, atol=1e-12)


@torch.no_grad()
def test_copies_of_caches_go_separate_ways():
    """Two continuations of one prompt: what beam search and speculation need."""
    model = make_model("llama").double()
    tokens = random_tokens(1, 9)
    for kind in KINDS:
        caches = model.new_caches(1, 16, kind)
        model(tokens[:, :5], caches=caches)
        other = copy.deepcopy(caches)
        model(random_tokens(1, 3), caches=other)
        got = model(tokens[:, 5:], caches=caches)
        assert_close(got, model(tokens)[:, 5:], rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_cache_can_be_rolled_back():
    """Slots behind the count are never seen, whatever they hold."""
    model = make_model("llama").double()
    tokens = random_tokens(2, 9)
    caches, static = (model.new_caches(2, 16, kind) for kind in KINDS)
    for each in (caches, static):
        model(tokens[:, :5], caches=each)
        model(random_tokens(2, 6), caches=each)
    caches.length -= 6
    static.lengths -= 6
    for each in (caches, static):
        got = model(tokens[:, 5:], caches=each)
        assert_close(got, model(tokens)[:, 5:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(("kind", "cache_class"), PAIRS)
def test_inference_mode_may_come_and_go(kind, cache_class, begun, made):
    """Its tensors may not be written outside of it: no cache may consist of them."""
    model = with_cache(make_model("llama").double(), cache_class)
    tokens = random_tokens(2, 9)
    with torch.inference_mode(made):
        caches = model.new_caches(2, 9, kind)
    with torch.inference_mode(begun):
        model(tokens[:, :4], caches=caches)
    with torch.no_grad():
        model(tokens[:, 4:6], caches=caches)
        with torch.inference_mode():
            model(tokens[:, 6:7], caches=caches)
        got = model(tokens[:, 7:], caches=caches)
        assert_close(got, model(tokens)[:, 7:], rtol=0, atol=1e-12)


# ---- Nothing is dropped, nothing is spread


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(
    ("kind", "cache_class"),
    [*PAIRS[:2], pytest.param(StaticCaches, KVCache, marks=ON_CPU)],
)
@torch.no_grad()
def test_a_token_past_the_cache_is_an_error(kind, cache_class, T):
    model = with_cache(make_model("llama"), cache_class)
    tokens = random_tokens(2, 16)
    caches = model.new_caches(2, 16, kind)
    for piece in tokens.split(4, dim=1):
        model(piece, caches=caches)  # the sixteenth token fits
    with pytest.raises(ValueError, match=f"{16 + T} tokens .* max_seq_len=16"):
        model(tokens[:, :T], caches=caches)


@pytest.mark.parametrize("kind", [Caches, pytest.param(StaticCaches, marks=ON_CPU)])
@torch.no_grad()
def test_a_prompt_longer_than_the_cache_is_an_error(kind):
    model = make_model("llama")
    with pytest.raises(ValueError, match="9 tokens .* max_seq_len=8"):
        model(random_tokens(2, 9), caches=model.new_caches(2, 8, kind))


@pytest.mark.parametrize("T", [1, 3])
def test_a_cache_of_one_layer_drops_nothing_either(T):
    """A slice past the end is empty, and one token broadcasts into it in silence."""
    k = torch.zeros(2, T, 2, 8, device=DEVICE)
    at = torch.arange(8, 8 + T, device=DEVICE)[None]
    with pytest.raises(ValueError, match=f"{8 + T} tokens .* max_seq_len=8"):
        KVCache(2, 8).update(k, k, Layout(positions=at, start=8))


@ON_CPU
@torch.no_grad()
def test_a_slot_past_the_cache_is_an_error_where_counts_are_not_read():
    """Compiled code reads no count: there the write itself must fail."""
    model = make_model("llama")
    caches = model.new_caches(2, 8, StaticCaches)
    at = torch.tensor([[8], [3]])
    with pytest.raises(IndexError, match="index 8 is out of bounds .* size 8"):
        model(random_tokens(2, 1), caches=caches, layout=Layout(positions=at, last=at))


@ON_CPU
@torch.no_grad()
def test_one_full_row_refuses_for_all():
    """Row 1 has room, row 0 has none: its token must not be dropped."""
    model = make_model("llama")
    caches = model.new_caches(2, 8, StaticCaches)
    model(random_tokens(2, 4), caches=caches)
    caches.lengths.copy_(torch.tensor([8, 2]))
    with pytest.raises(ValueError, match="9 tokens .* max_seq_len=8"):
        model(random_tokens(2, 1), caches=caches)


@pytest.mark.parametrize("kind", [Caches, pytest.param(StaticCaches, marks=ON_CPU)])
@torch.no_grad()
def test_a_refused_token_leaves_the_caches_as_they_were(kind):
    model = make_model("llama").double()
    tokens = random_tokens(2, 8)
    caches = model.new_caches(2, 8, kind)
    model(tokens[:, :5], caches=caches)
    with pytest.raises(ValueError, match="9 tokens"):
        model(random_tokens(2, 4), caches=caches)
    got = model(tokens[:, 5:], caches=caches)
    assert_close(got, model(tokens)[:, 5:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(("kind", "cache_class"), PAIRS)
@torch.no_grad()
def test_another_batch_size_is_refused(kind, cache_class, started, batch, T):
    """One row must not be spread over two in silence."""
    model = with_cache(make_model("llama").double(), cache_class)
    tokens = random_tokens(2, 4 + T)
    caches = model.new_caches(2, 16, kind)
    if started:
        model(tokens[:, :4], caches=caches)
    with pytest.raises(ValueError, match=f"{batch} rows .* batch_size=2"):
        model(random_tokens(batch, T), caches=caches)
    if started:  # and the caches are as they were
        got = model(tokens[:, 4:], caches=caches)
        assert_close(got, model(tokens)[:, 4:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("cache_class", [KVCache, GrowingKVCache])
def test_a_cache_of_one_layer_refuses_another_batch_size(cache_class):
    k = torch.zeros(3, 1, 2, 8, device=DEVICE)
    layout = Layout(positions=torch.zeros(1, 1, dtype=torch.long, device=DEVICE))
    with pytest.raises(ValueError, match="3 rows .* batch_size=2"):
        cache_class(2, 16).update(k, k, layout)


@pytest.mark.parametrize("n_layers", [1, 3])
@torch.no_grad()
def test_caches_of_another_model_are_refused(n_layers):
    """A model must not stop after as many layers as the caches have."""
    caches = make_model("llama", n_layers=n_layers).new_caches(2, 16)
    with pytest.raises(ValueError, match="zip.. argument 2 is (shorter|longer)"):
        make_model("llama", n_layers=2)(random_tokens(2, 4), caches=caches)


class TrimmingCache(GrowingKVCache):
    """Keeps the newest 6 keys for later calls, so that memory stays small."""

    def update(self, k, v, layout):
        k, v, layout = super().update(k, v, layout)
        self.k, self.v = k[:, -6:], v[:, -6:]
        return k, v, layout


@pytest.mark.parametrize("cache_class", [GrowingKVCache, TrimmingCache])
@torch.no_grad()
def test_a_cache_without_slots_refuses_a_layout_of_slots(cache_class):
    """Its keys have no fixed number, so slot 9 may be another key, or none."""
    model = with_cache(make_model("mistral"), cache_class)
    with pytest.raises(ValueError, match=f"layout.last .* {cache_class.__name__}"):
        model(random_tokens(2, 4), caches=model.new_caches(2, 16, StaticCaches))
    layout = packed(torch.tensor([[0, 1, 0, 1]], device=DEVICE))
    caches = model.new_caches(2, 16)
    caches.reserve(4)
    with pytest.raises(ValueError, match=f"layout.last .* {cache_class.__name__}"):
        model(random_tokens(2, 4), caches=caches, layout=layout)


@torch.no_grad()
def test_a_trimming_cache_serves_a_window():
    """Six old keys and its own are all that a window of seven shows."""
    model = with_cache(make_model("mistral").double(), TrimmingCache)
    tokens = random_tokens(2, 41)
    expected = model(tokens)
    for split in ([1] * 41, [17, 1, 1, 22], random_split(41, 5)):
        caches = model.new_caches(2, 41)
        got = in_pieces(model, tokens, split, caches)
        assert_close(got, expected, rtol=0, atol=1e-12)
        assert all(cache.k.size(1) == 6 for cache in caches.layers)


class RingCache(KVCache):
    """Seven slots for ever: a token takes the slot of the one that left the window.

    Serves one token at a time; which slot holds which token does not matter, because
    each key was turned at its own position.
    """

    def __init__(self, batch_size: int, max_seq_len: int) -> None:
        super().__init__(batch_size, 7)

    def update(self, k, v, layout):
        at = layout.positions  # (B, 1)
        k, v, _ = super().update(k, v, replace(layout, last=at % 7))
        return k, v, Layout(positions=at, last=at.clamp(max=6))


@torch.no_grad()
def test_a_ring_of_slots_serves_a_window():
    model = with_cache(make_model("llama").double(), RingCache)
    tokens = random_tokens(2, 23)
    caches = model.new_caches(2, 23, StaticCaches)
    got = in_pieces(model, tokens, [1] * 23, caches)
    oracle = make_model("mistral").double()  # a window of seven
    oracle.load_state_dict(model.state_dict())
    assert_close(got, oracle(tokens), rtol=0, atol=1e-12)


class MarginCache(KVCache):
    """Three slots in front belong to somebody else."""

    def __init__(self, batch_size: int, max_seq_len: int) -> None:
        super().__init__(batch_size, max_seq_len + 3)

    def update(self, k, v, layout):
        last = layout.last + 3
        layout = replace(layout, first=torch.full_like(last, 3), last=last)
        return super().update(k, v, layout)


@torch.no_grad()
def test_a_cache_may_answer_with_another_layout():
    """Attention asks what the cache says, not what it was told before."""
    model = with_cache(make_model("llama").double(), MarginCache)
    tokens = random_tokens(2, 23)
    caches = model.new_caches(2, 23, StaticCaches)
    got = in_pieces(model, tokens, [9, 1, 13], caches)
    assert_close(got, model(tokens), rtol=0, atol=1e-12)


# ---- What the caches are


def test_a_cache_is_allocated_once():
    model = make_model("llama")
    for kind in KINDS:
        caches = model.new_caches(2, 16, kind)
        with torch.no_grad():
            model(random_tokens(2, 3), caches=caches)
            before = [cache.k.data_ptr() for cache in caches.layers]
            for _ in range(5):
                model(random_tokens(2, 1), caches=caches)
        assert [cache.k.data_ptr() for cache in caches.layers] == before
        assert caches.layers[0].k.shape == (2, 16, 2, 8)  # (B, S_max, K, d)


def test_counts_are_of_tokens_seen():
    model = make_model("llama")
    caches, static = (model.new_caches(2, 16, kind) for kind in KINDS)
    with torch.no_grad():
        for T in (3, 1, 5):
            for each in (caches, static):
                model(random_tokens(2, T), caches=each)
    assert caches.length == 9 and static.lengths.tolist() == [9, 9]


def test_caches_live_where_the_model_lives():
    with torch.device("meta"):
        model = MinimalLlama(tiny_config())
    caches = model.new_caches(2, 16, StaticCaches)
    tokens = torch.empty(2, 5, dtype=torch.long, device="meta")
    assert model(tokens, caches=caches).shape == (2, 5, 97)
    assert caches.layers[0].k.is_meta and caches.lengths.is_meta


def test_two_new_caches_share_nothing():
    model = make_model("llama").double()
    a, b = model.new_caches(1, 8), model.new_caches(1, 8)
    with torch.no_grad():
        model(random_tokens(1, 5), caches=a)
        tokens = random_tokens(1, 5)
        got = model(tokens, caches=b)
        assert_close(got, model(tokens), rtol=0, atol=1e-12)


# ---- Gradients


def test_gradients_through_a_growing_cache_equal_uncached(any_model):
    with_cache(any_model.double(), GrowingKVCache)
    tokens = random_tokens(2, 12)
    x = any_model.embed(tokens).detach().requires_grad_()
    weights = [x, *any_model.parameters()]

    def gradients(logits: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(logits.square().mean(), weights, allow_unused=True)

    caches = any_model.new_caches(2, 12)
    pieces = [any_model(None, caches=caches, embeds=e) for e in x.split([5, 1, 6], 1)]
    got = gradients(torch.cat(pieces, dim=1))
    expected = gradients(any_model(None, embeds=x))
    names = ["embeds", *(name for name, _ in any_model.named_parameters())]
    for name, a, b in zip(names, got, expected):
        if name == "embed_tokens.weight" and not any_model.config.tie_embeddings:
            assert a is b is None  # embeds took its place
            continue
        assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)
    assert got[0][:, :5].abs().sum() > 0


def test_training_through_the_preallocated_cache_is_an_error_or_right():
    """Its writes are in place. Autograd refuses, unless its kernel kept copies."""
    model = make_model("llama").double()
    x = model.embed(random_tokens(2, 10)).detach().requires_grad_()
    (expected,) = torch.autograd.grad(model(None, embeds=x).square().sum(), x)
    caches = model.new_caches(2, 10)
    pieces = [model(None, caches=caches, embeds=part) for part in x.split(5, dim=1)]
    loss = torch.cat(pieces, dim=1).square().sum()
    try:
        (got,) = torch.autograd.grad(loss, x)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert_close(got, expected, rtol=1e-9, atol=1e-12)
