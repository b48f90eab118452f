"""Training, encoding, decoding, streaming: properties, and tokenizers as the oracle."""

import random
import subprocess
import sys
import unicodedata
from itertools import pairwise

import pytest
import tokenizers
from tokenizers import models, trainers
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as Steps

from minllama.architecture.added_tokens import AddedToken
from minllama.architecture.bpe import (
    LLAMA3_PATTERN,
    learn_merges,
    merge,
    merge_reference,
)
from minllama.architecture.tokenizer import SPECIAL_TOKENS, Tokenizer
from minllama.architecture.tokenizer_json import to_bytes

SAMPLES = [
    "",
    " ",
    "Hello world, y'all! I'VE seen 1234567 things; he'd say 'tis so.",
    "  leading and trailing  \n\n\ttabs\r\nlines \n ",
    "def f(x):\n    return {'a': x**2}  # ½ ² ٣\n\n\n\nclass A: pass",
    "über naïve Straße ŒUVRE İstanbul ẞ ǅ",
    "e\u0301 \u0301 a\u0308\u0304 \u1100\u1161 ﬁ Å \u212b",  # combining marks
    "Привет, мир! 你好，世界。こんにちは世界 안녕하세요 สวัสดี नमस्ते",
    "🦙 👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 \ufe0f",
    "\x00\x01\x1c\x1f\x7f\x85\xa0\u200b\u2028\u3000\ufeff\ufffd\U0010ffff",
    "▁x ▁▁ Ġthe <0x0A> </s> <s> <|eot_id|> [INST] <unk>",
    "a" * 300 + " " * 50 + "1" * 40 + "\n" * 20 + "!" * 30,
]


def sample_texts(seed: int = 0, n: int = 60) -> list[str]:
    """SAMPLES, mixtures of their pieces, and bytes that were no text."""
    rng = random.Random(seed)
    words = [text[i : i + rng.randrange(1, 9)] for text in SAMPLES for i in range(20)]
    mixed = ["".join(rng.choices(words, k=12)) for _ in range(n)]
    noise = [
        rng.randbytes(rng.randrange(40)).decode(errors="replace") for _ in range(n)
    ]
    old = [text for text in noise if all(map(is_old, text))]
    return SAMPLES + mixed + old


def is_old(char: str) -> bool:
    """Whether all Unicode versions agree on what kind of character this is."""
    return unicodedata.ucd_3_2_0.category(char) != "Cn"


CORPUS = [text for text in sample_texts(1) for _ in range(3)] + [
    "the cat sat on the mat and the rat ate the hat",
    "Съешь ещё этих мягких французских булок",
    "吾輩は猫である。名前はまだ無い。",
] * 5


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(CORPUS, vocab_size=600)


def test_merging_by_heap_equals_the_definition():
    rng = random.Random(0)
    for _ in range(300):
        merges = {}
        for new in range(4, 24):
            for _ in range(2):  # two ways to make a token, of equal rank
                merges[rng.randrange(new), rng.randrange(new)] = new, new
        ids = rng.choices(range(4), k=rng.randrange(40))
        assert merge(ids, merges) == merge_reference(ids, merges)


def test_learned_merges_are_the_most_frequent_pairs_counted_from_scratch():
    rng = random.Random(0)
    random_word = lambda: tuple(rng.choices(range(5), k=rng.randrange(1, 12)))
    words = {random_word(): rng.randrange(1, 5) for _ in range(60)}
    expected, split = [], [(list(word), count) for word, count in words.items()]
    for new in range(100, 140):
        counts = {}
        for word, count in split:
            for pair in pairwise(word):
                counts[pair] = counts.get(pair, 0) + count
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        expected.append(best)
        split = [(merge_reference(word, {best: (0, new)}), n) for word, n in split]
    assert learn_merges(words, n_merges=40, first_id=100) == expected


def test_training_finds_the_vocabulary_that_tokenizers_finds():
    rng = random.Random(0)  # ASCII without the space: both break ties in the same order
    text = "".join(rng.choices("aabcdeefgh.,X", k=4000))
    ours = Tokenizer.train([text], vocab_size=400, special_tokens=[], pattern=r"\w+|\W")
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = Steps(
        [
            Split(tokenizers.Regex(r"\w+|\W"), "isolated"),
            ByteLevel(False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=ByteLevel.alphabet()
    )
    theirs.train_from_iterator([text], trainer)
    expected = sorted(theirs.get_vocab(), key=theirs.get_vocab().get)
    assert [*ours.tokens.values()][256:] == [*map(to_bytes, expected)][256:]


def test_training_is_the_same_in_another_process(tok):
    """Sets of strings are iterated in another order there."""
    code = (
        "from tests.architecture.test_tokenizer import CORPUS, Tokenizer;"
        "print(list(Tokenizer.train(CORPUS, vocab_size=600).merges))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.decode().strip() == str(list(tok.merges))


def test_special_tokens_come_last_and_count_within_the_vocabulary(tok):
    assert tok.vocab_size == 600 == len(tok.tokens)
    assert list(tok.special_tokens) == list(SPECIAL_TOKENS)
    assert list(tok.special_tokens.values()) == list(range(592, 600))
    assert tok.token_bytes(tok.bos_id) == b"<|begin_of_text|>"
    assert tok.token_bytes(tok.eos_id) == b"<|end_of_text|>"
    assert tok.stop_ids == (tok.eos_id, tok.special_tokens["<|eot_id|>"])


@pytest.mark.parametrize("seed", range(3))
def test_decoding_gives_the_text_back(tok, seed):
    for text in sample_texts(seed):
        assert tok.decode(tok.encode(text)) == text
        assert tok.decode(tok.encode(text, bos=True, eos=True)) == text


def test_every_trained_token_is_the_encoding_of_its_own_bytes(tok):
    for id in range(256, 592):
        text = tok.token_bytes(id).decode(errors="replace")
        if "\ufffd" not in text and len(list(tok.words(text, first=True))) == 1:
            assert tok.encode(text) == [id]


def test_words_longer_than_the_cache_takes_encode_alike(tok):
    word = "thecatsatonthemat" * 20
    assert tok.encode(word) == merge_reference(list(word.encode()), tok.merges)


def test_bos_and_eos_surround_the_text(tok):
    plain = tok.encode("Hello")
    assert tok.encode("Hello", bos=True, eos=True) == [tok.bos_id, *plain, tok.eos_id]


def test_special_tokens_in_text_stay_text(tok):
    for text in ("".join(SPECIAL_TOKENS), "a<|eot_id|>b", "<|begin_of_text|>"):
        ids = tok.encode(text)
        assert not set(ids) & set(tok.special_tokens.values())
        assert tok.decode(ids) == text


def test_only_allowed_special_tokens_are_encoded(tok):
    text = "Hi<|eot_id|><|end_of_text|>"
    eot, end = (tok.special_tokens[n] for n in ("<|eot_id|>", "<|end_of_text|>"))
    assert tok.encode(text, allowed_special="all")[-2:] == [eot, end]
    some = tok.encode(text, allowed_special=["<|eot_id|>"])
    assert some == [*tok.encode("Hi"), eot, *tok.encode("<|end_of_text|>")]
    assert tok.encode(text, allowed_special=iter(["<|eot_id|>"])) == some


def test_decoding_shows_special_tokens_only_if_asked(tok):
    ids = tok.encode("Hi", bos=True, eos=True)
    assert tok.decode(ids) == "Hi"
    shown = tok.decode(ids, skip_special=False)
    assert shown == "<|begin_of_text|>Hi<|end_of_text|>"
    assert tok.encode(shown, allowed_special="all") == ids


def test_damaged_bytes_decode_to_replacement_characters(tok):
    ids = tok.encode("🦙")[:-1] + tok.encode("x")
    data = b"".join(map(tok.token_bytes, ids))
    assert tok.decode(ids) == data.decode(errors="replace") != "🦙x"


@pytest.mark.parametrize("skip_special", [True, False])
def test_streamed_pieces_never_split_a_character_and_join_to_the_text(
    tok, skip_special
):
    text = "né 🦙👍🏽 世界<|eot_id|>!"
    ids = [tok.bos_id, *tok.encode(text, allowed_special="all"), tok.eos_id]
    decoder = tok.stream_decoder(skip_special)
    pieces = [decoder.feed(id) for id in ids] + [decoder.flush()]
    assert "".join(pieces) == tok.decode(ids, skip_special)
    assert not any("\ufffd" in piece for piece in pieces)


def test_flushing_shows_half_a_character_as_damaged(tok):
    decoder = tok.stream_decoder()
    assert decoder.feed(0xF0, 0x9F) == ""
    assert decoder.flush() == "\ufffd"


def test_ids_may_be_tensors(tok):
    torch = pytest.importorskip("torch")
    ids = tok.encode("any integers")
    assert tok.decode(torch.tensor(ids)) == "any integers"


def test_plain_added_tokens_are_found_in_any_text():
    added = [
        AddedToken("<think>", 256, special=False),
        AddedToken("<think>!", 257, special=False),  # the longer one wins
        AddedToken("X", 258, special=False, single_word=True),
        AddedToken("L", 259, special=False, lstrip=True),
        AddedToken("R", 260, special=False, rstrip=True),
    ]
    tok = Tokenizer({byte: bytes([byte]) for byte in range(256)}, {}, added)
    assert tok.encode("a<think>b") == [*b"a", 256, *b"b"]
    assert tok.encode("<think>!") == [257]
    assert tok.encode("X aX X") == [258, *b" aX ", 258]
    assert tok.encode("a \n L  b") == [*b"a", 259, *b"  b"]
    assert tok.encode("a R \t b") == [*b"a ", 260, *b"b"]


@pytest.mark.parametrize(
    "text", ["a" * 100_000, "🦙" * 100_000, " " * 100_000, "\n \n" * 30_000]
)
def test_the_worst_texts_are_not_quadratic(tok, text):
    """Each takes a second at most; quadratic work would take hours."""
    assert tok.decode(tok.encode(text)) == text


@pytest.mark.parametrize(
    "vocab_size, special", [(255, []), (263, SPECIAL_TOKENS), (-1, []), (256, ["<s>"])]
)
def test_a_vocabulary_without_room_for_the_bytes_is_refused(vocab_size, special):
    with pytest.raises(ValueError, match=f"vocab_size={vocab_size} has no room"):
        Tokenizer.train(["text"], vocab_size, special_tokens=special)


def test_a_text_with_too_few_pairs_is_refused():
    with pytest.raises(ValueError, match="n_merges=44 is more .* after 3 each"):
        Tokenizer.train(["abcd"], vocab_size=300, special_tokens=[])


@pytest.mark.parametrize("special", [["<s>", "<s>"], ["<s>", ""]])
def test_special_tokens_must_be_distinct_and_not_empty(special):
    with pytest.raises(ValueError, match="special_tokens=.*<s>"):
        Tokenizer.train(["text"], 300, special_tokens=special)


def test_one_text_is_no_list_of_texts():
    with pytest.raises(ValueError, match="texts='one text' is one text"):
        Tokenizer.train("one text", vocab_size=300)


def test_a_broken_pattern_is_refused():
    with pytest.raises(ValueError, match=r"pattern='\(\[' is no regular expression"):
        Tokenizer.train(["text"], vocab_size=300, pattern="([")


def test_half_a_surrogate_pair_is_refused(tok):
    for encode in (tok.encode, lambda text: Tokenizer.train([text], vocab_size=300)):
        with pytest.raises(ValueError, match=r"text\[2\]='\\ud83e'"):
            encode("ab\ud83e")


@pytest.mark.parametrize("id", [600, -1, 10**9])
def test_an_id_outside_the_vocabulary_is_refused(tok, id):
    with pytest.raises(ValueError, match=f"id={id} is none of the 600 tokens"):
        tok.decode([id])
    with pytest.raises(ValueError, match=f"id={id} "):
        tok.set_ends(id, None)


@pytest.mark.parametrize("allowed", ["<|eot_id|>", ["<|eot|>"], "ALL"])
def test_an_unknown_special_token_is_refused(tok, allowed):
    with pytest.raises(ValueError, match="allowed_special="):
        tok.encode("text", allowed_special=allowed)


def test_a_missing_bos_token_is_refused():
    tok = Tokenizer.train(["text"], vocab_size=256, special_tokens=[])
    for name in ("bos", "eos"):
        with pytest.raises(ValueError, match=f"{name}_id=None"):
            tok.encode("text", **{name: True})


def test_a_byte_without_a_token_is_refused():
    tok = Tokenizer({97: b"a"}, {})
    assert tok.encode("aa") == [97, 97]
    with pytest.raises(ValueError, match="needs the byte b'b'"):
        tok.encode("ab")


def test_the_pattern_is_llama_3s_own():
    own = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert LLAMA3_PATTERN == own
