"""Bits per byte, in the protocol of the model card."""

import math

import pytest
import torch

from minllama import MinimalLlama, Tokenizer
from minllama.architecture.evaluate import Score, score_documents
from tests.conftest import tiny_config

TEXTS = ["Once upon a time, there was a cat.", "Ünï 🦙.", "A dog ran. " * 30]


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.from_pretrained("stories-mini")


@pytest.fixture(scope="module")
def model():
    return MinimalLlama.from_pretrained("stories-mini")


def by_hand(model, tok, texts, most):
    """The protocol, a token at a time."""
    nats, size = 0.0, 0
    for text in texts:
        ids = tok.encode(text)[:most]
        logits = model(torch.tensor([[tok.bos_id, *ids[:-1]]]))[0].double()
        for row, token in zip(logits.log_softmax(-1), ids):
            nats -= row[token].item()
            size += len(tok.token_bytes(token))
    return nats / math.log(2) / size


@pytest.mark.parametrize("most", [512, 20])
def test_the_score_follows_the_protocol(model, tok, most):
    with torch.no_grad():
        expected = by_hand(model, tok, TEXTS, most)
    for batch_size in (1, 2, 16):  # padding and order change nothing
        score = score_documents(model, tok, TEXTS, most, batch_size)
        assert score.bits_per_byte == pytest.approx(expected, rel=1e-5)


def test_a_model_that_knows_nothing_pays_the_log_of_the_vocabulary(tok):
    model = MinimalLlama(tiny_config(vocab_size=tok.vocab_size))
    torch.nn.init.zeros_(model.lm_head.weight)
    score = score_documents(model, tok, TEXTS[:1])
    size, count = len(TEXTS[0].encode()), len(tok.encode(TEXTS[0]))
    expected = count * math.log2(tok.vocab_size) / size
    assert score.bits_per_byte == pytest.approx(expected)
    assert score.perplexity == pytest.approx(tok.vocab_size)
    assert (score.tokens, score.bytes) == (count, size)


def test_bits_per_byte_of_one_nat_a_byte():
    assert Score(nats=10.0, tokens=2, bytes=10).bits_per_byte == 1 / math.log(2)


def test_nothing_to_score_is_refused(model, tok):
    with pytest.raises(ValueError, match="no document to score"):
        score_documents(model, tok, [])
    nameless = Tokenizer.train(["aa"], vocab_size=257, special_tokens=())
    with pytest.raises(ValueError, match="no bos_id"):
        score_documents(model, nameless, TEXTS)
