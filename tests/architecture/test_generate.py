"""Choosing tokens, stopping, streaming."""

import math

import pytest
import torch
import torch.nn.functional as F

from minllama import MinimalLlama, Tokenizer, generate, stream
from minllama.architecture.generate import (
    Sampling,
    choose,
    decode,
    filter_logits,
    hold_back,
    keep_top_p,
    penalize,
)
from tests.conftest import tiny_config


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = MinimalLlama(tiny_config(max_seq_len=64, eos_ids=(5, 7)))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.5)
    return model.double().eval()


@pytest.fixture(scope="module")
def stories():
    return MinimalLlama.from_pretrained("stories-mini")


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.from_pretrained("stories-mini")


def prompts(model, *shape):
    return torch.randint(8, model.config.vocab_size, shape)  # no end token among them


def test_greedy_takes_the_likeliest_token_each_time(model):
    tokens = expected = prompts(model, 2, 6)
    with torch.no_grad():
        for _ in range(9):
            new = model(expected)[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, new], dim=1)
    assert torch.equal(generate(model, tokens, 9, stop_ids=()), expected)


def test_a_ragged_batch_gives_each_row_what_it_gets_alone(model):
    rows = [prompts(model, n) for n in (1, 7, 3)]
    together = generate(model, rows, 8, stop_ids=())
    for row, out in zip(rows, together):
        assert torch.equal(out, generate(model, row[None], 8, stop_ids=())[0])


def test_ragged_prompts_may_be_lists_of_ids(model):
    a, b = generate(model, [[9, 10], [11]], 3, stop_ids=())
    assert a.tolist()[:2] == [9, 10] and b.tolist()[:1] == [11] and len(b) == 4


def test_a_row_stops_at_its_stop_and_the_others_go_on(model):
    tokens = prompts(model, 4, 5)
    free = generate(model, tokens, 12, stop_ids=())
    stop = int(free[0, 7])  # the third new token of row 0
    out = generate(model, tokens, 12, stop_ids=[stop])
    for row, whole in zip(out, free):
        new = whole[5:].tolist()
        end = new.index(stop) + 1 if stop in new else len(new)
        kept = (new[:end] + [stop] * len(new))[: len(row) - 5]
        assert row[5:].tolist() == kept


def test_ragged_rows_are_cut_behind_their_own_stop(model):
    rows = [prompts(model, 3), prompts(model, 5)]
    free = generate(model, rows, 10, stop_ids=())
    stop = int(free[1][6])
    for out, whole, row in zip(generate(model, rows, 10, stop_ids=[stop]), free, rows):
        new = whole[len(row) :].tolist()
        end = new.index(stop) + 1 if stop in new else 10
        assert out[len(row) :].tolist() == new[:end]


def test_by_default_it_stops_at_the_models_own_end_of_text(stories, tok):
    tokens = torch.tensor([tok.encode("Once upon a time", bos=True)])
    out = generate(stories, tokens, 400, temperature=0.8, seed=1)
    assert out[0, -1] == tok.eos_id and out.size(1) < 400
    on = generate(stories, tokens, 400, temperature=0.8, seed=1, stop_ids=())
    assert on.size(1) == tokens.size(1) + 400


def test_prefill_computes_one_row_of_logits(model):
    widths = []
    hook = model.lm_head.register_forward_hook(
        lambda m, x, y: widths.append(y.shape[1])
    )
    generate(model, prompts(model, 2, 9), 3, stop_ids=())
    hook.remove()
    assert set(widths) == {1}


def test_what_was_generated_can_be_trained_on(model):
    out = generate(model, prompts(model, 2, 4), 3)
    model(out).sum().backward()  # an inference tensor would refuse
    model.zero_grad()


def test_a_cache_used_by_decode_serves_any_later_call(model):
    caches = model.new_caches(1, 20)
    first = next(decode(model, prompts(model, 1, 4), caches, Sampling()))
    with torch.no_grad():
        assert model(first[:, None], caches=caches).shape[1] == 1


# ------------------------------------------------------------------ sampling


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0])
def test_top_p_keeps_the_smallest_prefix_that_reaches_p(p):
    logits = torch.randn(50, 31, dtype=torch.float64) * 3
    kept = keep_top_p(logits, p).isfinite()
    for row, keep in zip(logits, kept):
        probs, total, expected = row.softmax(-1), 0.0, set()
        for token in row.argsort(descending=True).tolist():
            if total >= p:
                break
            expected.add(token)
            total += probs[token].item()
        assert set(keep.nonzero()[:, 0].tolist()) == expected


def test_top_k_and_min_p_keep_what_they_say():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    kept = filter_logits(logits, Sampling(temperature=1.0, top_k=2)).isfinite()
    assert kept.tolist() == [[False, True, False, True]]
    kept = filter_logits(logits, Sampling(temperature=1.0, min_p=math.exp(-1.5)))
    assert kept.isfinite().tolist() == [[False, True, False, True]]
    kept = filter_logits(logits, Sampling(temperature=2.0, min_p=math.exp(-1.01)))
    assert kept.isfinite().tolist() == [
        [False, True, True, True]
    ]  # flatter: three stay


def test_top_k_beyond_the_vocabulary_keeps_all():
    assert (
        filter_logits(torch.zeros(1, 4), Sampling(temperature=1, top_k=9))
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("how", [
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.7, top_k=5, seed=2),
    Sampling(temperature=1.3, top_p=0.8, seed=3),
])  # fmt: skip
def test_draws_follow_the_probabilities_by_chi_square(how):
    logits, n = torch.randn(1, 8) * 1.5, 20_000
    probs = filter_logits(logits, how).softmax(-1)[0]
    drawn = choose(logits.expand(n, -1), how, how.generator(torch.device("cpu")))
    counts = torch.bincount(drawn, minlength=8).float()
    assert counts[probs == 0].sum() == 0
    there = probs > 0
    chi2 = ((counts - n * probs).square() / (n * probs))[there].sum().item()
    freedom = int(there.sum()) - 1
    limit = freedom + 4.5 * math.sqrt(2 * freedom) + 6  # beyond the 0.9999 quantile
    assert chi2 < limit
    wrong = probs[there].flip(0)  # the same test rejects a wrong law
    if freedom:
        assert ((counts[there] - n * wrong).square() / (n * wrong)).sum() > limit


def test_the_same_seed_gives_the_same_text_and_another_seed_another(model):
    tokens = prompts(model, 2, 5)
    runs = [generate(model, tokens, 20, 1.0, seed=s, stop_ids=()) for s in (3, 3, 4)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_a_tiny_temperature_is_greedy_without_overflow(model):
    tokens = prompts(model, 1, 5)
    cold = generate(model, tokens, 10, temperature=1e-30, seed=0, stop_ids=())
    assert torch.equal(cold, generate(model, tokens, 10, stop_ids=()))


def test_repetition_penalty_equals_a_loop(model):
    tokens = prompts(model, 1, 6)
    expected = tokens[0].tolist()
    with torch.no_grad():
        for _ in range(12):
            logits = model(torch.tensor([expected]))[0, -1]
            for token in set(expected):
                logits[token] *= 1.7 if logits[token] < 0 else 1 / 1.7
            expected.append(int(logits.argmax()))
    out = generate(model, tokens, 12, repetition_penalty=1.7, stop_ids=())
    assert out[0].tolist() == expected
    ragged = generate(model, [tokens[0], [9]], 12, repetition_penalty=1.7, stop_ids=())
    assert ragged[0].tolist() == expected


def test_penalty_lowers_seen_tokens_whatever_their_sign():
    logits, seen = torch.tensor([[2.0, -2.0, 2.0]]), torch.tensor([[True, True, False]])
    assert penalize(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0]]


# ------------------------------------------------------------------ streaming


def test_streamed_pieces_join_to_the_generated_text(stories, tok):
    prompt = "Once upon a time"
    pieces = list(stream(stories, tok, prompt, 40, temperature=0.9, seed=5))
    tokens = torch.tensor([tok.encode(prompt, bos=True)])
    out = generate(stories, tokens, 40, temperature=0.9, seed=5)
    assert "".join(pieces) == tok.decode(out[0, tokens.size(1) :].tolist())
    assert len(pieces) > 10


def test_a_stream_never_ends_a_piece_within_a_character(tok):
    class Speaker:  # says what it is told, one byte token at a time
        config = tiny_config(vocab_size=tok.vocab_size, max_seq_len=512)
        embed_tokens = torch.nn.Embedding(1, 1)

        def __init__(self, ids):
            self.ids = iter(ids)

        def new_caches(self, *sizes):
            return None

        def __call__(self, tokens, caches=None, at=None):
            return F.one_hot(torch.tensor([[next(self.ids)]]), tok.vocab_size).float()

    text = "naïve 🦙 — 日本"
    ids = list(text.encode()) + [tok.eos_id]
    pieces = list(stream(Speaker(ids), tok, "x", 100, stop_ids=[tok.eos_id]))
    assert "".join(pieces) == text and all("\ufffd" not in piece for piece in pieces)


def test_stop_strings_cut_the_text_before_them(stories, tok):
    whole = "".join(stream(stories, tok, "Once upon a time", 60))
    for stop in (". ", "little", "e"):
        cut = stream(stories, tok, "Once upon a time", 60, stop_strings=[stop])
        assert "".join(cut) == whole[: whole.index(stop)]


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_stop_string_is_found_however_the_text_is_cut(cut):
    text = "ab</s></x>"
    pieces = [text[i : i + cut] for i in range(0, len(text), cut)]
    assert "".join(hold_back(pieces, ["</x>", "zz"])) == "ab</s>"
    assert "".join(hold_back(pieces, ["</xx"])) == text


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("name, value", [
    ("temperature", -0.1), ("temperature", math.nan), ("top_k", 0), ("top_p", 0.0),
    ("top_p", 1.5), ("min_p", -1.0), ("repetition_penalty", 0.0),
])  # fmt: skip
def test_sampling_numbers_outside_their_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Sampling(**{name: value})


def test_a_prompt_beyond_the_context_is_refused(model):
    with pytest.raises(
        ValueError, match=r"60 prompt tokens .* = 65 exceed max_seq_len=64"
    ):
        generate(model, prompts(model, 1, 60), 5)
    generate(model, prompts(model, 1, 60), 4)  # exactly full


def test_ids_of_another_vocabulary_are_refused(model):
    V = model.config.vocab_size
    with pytest.raises(ValueError, match=f"token {V} is outside vocab_size={V}"):
        generate(model, torch.tensor([[3, V]]))
    with pytest.raises(ValueError, match="token -1 is outside"):
        generate(model, torch.tensor([[-1]]))


@pytest.mark.parametrize("tokens, words", [
    (torch.zeros(1, 0, dtype=torch.long), r"shape \(1, 0\)"),
    (torch.zeros(3, dtype=torch.long), r"shape \(3,\)"),
    (torch.zeros(1, 3), "float32"),
    ([], "shapes"),
    ([[1], []], r"\(0,\)"),
])  # fmt: skip
def test_what_is_no_prompt_is_refused(model, tokens, words):
    with pytest.raises(ValueError, match=words):
        generate(model, tokens)


def test_no_new_tokens_are_refused(model):
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        generate(model, prompts(model, 1, 3), max_new_tokens=0)


def test_a_stream_refuses_at_the_call_and_not_at_the_first_piece(stories, tok):
    with pytest.raises(ValueError, match="exceed max_seq_len=512"):
        stream(stories, tok, "Once", max_new_tokens=512)
    with pytest.raises(ValueError, match="stop_strings holds ''"):
        stream(stories, tok, "Once", stop_strings=[""])
