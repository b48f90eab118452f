"""tokenizer.json, read and written: equal to the tokenizers library id by id."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, trainers
from tokenizers import pre_tokenizers as cuts
from transformers import AutoTokenizer

from minllama.architecture.bpe import LLAMA3_PATTERN
from minllama.architecture.sentencepiece import SentencePieceTokenizer
from minllama.architecture.tokenizer import Tokenizer
from tests.architecture.test_tokenizer import CORPUS, sample_texts

QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
SPACE = "▁"


def isolated(pattern: str) -> cuts.PreTokenizer:
    return cuts.Split(Regex(pattern), "isolated")


def bytes_only(add_prefix_space=False) -> cuts.PreTokenizer:
    return cuts.ByteLevel(add_prefix_space, use_regex=False)


BYTE_LEVEL = {  # name: normalizer, pre-tokenizer
    "llama3": (None, cuts.Sequence([isolated(LLAMA3_PATTERN), bytes_only()])),
    "qwen2": (
        normalizers.NFC(),
        cuts.Sequence([isolated(QWEN2_PATTERN), bytes_only()]),
    ),
    "gpt2": (None, cuts.ByteLevel(add_prefix_space=False)),
    "roberta": (None, cuts.ByteLevel(add_prefix_space=True)),
    "smollm": (
        None,
        cuts.Sequence([cuts.Digits(individual_digits=True), cuts.ByteLevel(False)]),
    ),
    "starcoder": (
        normalizers.Sequence([normalizers.NFKC()]),
        cuts.Sequence([cuts.Digits(individual_digits=False), cuts.ByteLevel(False)]),
    ),
    "deepseek": (
        None,
        cuts.Sequence(
            [
                isolated(r"\p{N}{1,3}"),
                isolated(r"[一-龥぀-ゟ゠-ヿ]+"),
                cuts.Split("::", "isolated"),
                isolated(r"[!\"#]+[A-Za-z]+|\s?\p{L}+|\s+"),
                bytes_only(),
            ]
        ),
    ),
    "no pattern": (None, bytes_only()),
}
ESCAPE = normalizers.Replace(" ", SPACE)
CHARACTER_LEVEL = {
    "llama2": (normalizers.Sequence([normalizers.Prepend(SPACE), ESCAPE]), None),
    "mistral": (None, cuts.Metaspace(prepend_scheme="first", split=False)),
    "always": (None, cuts.Metaspace(prepend_scheme="always", split=False)),
    "never": (None, cuts.Metaspace(prepend_scheme="never", split=False)),
    "each space": (None, cuts.Metaspace(prepend_scheme="always", split=True)),
    "gemma": (ESCAPE, cuts.Split(" ", "merged_with_previous")),
}
ADDED = [  # beside the special ones; of all kinds of flags
    AddedToken("<think>", special=False, normalized=False),
    AddedToken("cat e\u0301", special=False, normalized=True),
    AddedToken("<mask>", special=True, lstrip=True, normalized=False),
    AddedToken("<|user|>", special=True, rstrip=True, normalized=False),
    AddedToken("the", special=False, single_word=True, normalized=False),
    AddedToken("<s>", special=True, normalized=True),
]


def trained(kind: str, name: str, vocab_size: int = 500) -> tokenizers.Tokenizer:
    """A tokenizer of the reference library with the pipeline of that name."""
    if kind == "byte":
        hf = tokenizers.Tokenizer(models.BPE())
        hf.normalizer, hf.pre_tokenizer = BYTE_LEVEL[name]
        alphabet, special = cuts.ByteLevel.alphabet(), []
    else:
        hf = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        hf.normalizer, hf.pre_tokenizer = CHARACTER_LEVEL[name]
        alphabet = list("▁abcdefghijklmnopqrstuvwxyz")
        special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size + len(special),
        show_progress=False,
        initial_alphabet=alphabet,
        special_tokens=special,
        limit_alphabet=60 if special else 1000,
    )
    hf.train_from_iterator(CORPUS, trainer)
    if special:  # bytes are no added tokens in the files of Llama 2
        data = json.loads(hf.to_str())
        data["added_tokens"] = data["added_tokens"][:1]
        hf = tokenizers.Tokenizer.from_str(json.dumps(data))
    hf.add_special_tokens([t for t in ADDED if t.special])
    hf.add_tokens([t for t in ADDED if not t.special])
    return hf


def texts_with(names: list[str]) -> list[str]:
    rng = random.Random(0)
    words = [*names, " ", "  ", "a", "_", "\t", "\n", "<", "é", "e\u0301"]
    pieces = [rng.choice(sample_texts())[:8] for _ in range(50)]
    return ["".join(rng.choices(words + pieces, k=9)) for _ in range(150)]


def assert_equal_ids(hf: tokenizers.Tokenizer, tok: Tokenizer) -> None:
    """Same ids for all texts: specials as text, and specials found."""
    hf.encode_special_tokens = True
    for text in sample_texts():
        ids = hf.encode(text, add_special_tokens=False).ids
        assert tok.encode(text) == ids, repr(text)
    hf.encode_special_tokens = False
    for text in texts_with([token.content for token in ADDED]):
        ids = hf.encode(text, add_special_tokens=False).ids
        assert tok.encode(text, allowed_special="all") == ids, repr(text)


def load(hf: tokenizers.Tokenizer, folder: Path, **changes) -> Tokenizer:
    """Our reading of the reference library's file, with some of its fields changed."""
    folder.mkdir(exist_ok=True)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(hf.to_str()) | changes))
    return Tokenizer.from_pretrained(folder)


ALL = [("byte", name) for name in BYTE_LEVEL] + [("char", n) for n in CHARACTER_LEVEL]


@pytest.mark.parametrize("kind, name", ALL)
def test_reading_and_writing_keep_the_ids_of_tokenizers(kind, name, tmp_path):
    hf = trained(kind, name)
    tok = load(hf, tmp_path)
    assert_equal_ids(hf, tok)
    tok.save_pretrained(tmp_path / "copy")
    copy = tokenizers.Tokenizer.from_file(str(tmp_path / "copy" / "tokenizer.json"))
    assert_equal_ids(copy, tok)
    assert_equal_ids(hf, Tokenizer.from_pretrained(tmp_path / "copy"))
    assert isinstance(tok, SentencePieceTokenizer) == (kind == "char")


@pytest.mark.parametrize("kind, name", ALL)
def test_decoding_equals_that_of_tokenizers(kind, name, tmp_path):
    hf = trained(kind, name)
    tok = load(hf, tmp_path)
    tok.save_pretrained(tmp_path)  # with a decoder
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in sample_texts():
        ids = tok.encode(text)
        assert tok.decode(ids) == hf.decode(ids), repr(text)
        if name in ("llama3", "gpt2", "smollm", "deepseek", "no pattern"):
            assert tok.decode(ids) == text
        elif name in ("llama2", "gemma") and "the" not in text:  # no added token
            assert tok.decode(ids) == text.replace(SPACE, " ")


def test_merges_may_be_strings_or_pairs(tmp_path):
    hf = trained("byte", "llama3")
    model = json.loads(hf.to_str())["model"]
    joined = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]
    ]
    split = [pair.split(" ") for pair in joined]
    for merges in (joined, split):
        tok = load(hf, tmp_path, model=model | {"merges": merges})
        assert_equal_ids(hf, tok)


@pytest.mark.parametrize("kind, name", [("byte", "llama3"), ("char", "llama2")])
@pytest.mark.parametrize("ignore_merges", [True, False])
def test_ignore_merges_takes_whole_words(kind, name, ignore_merges, tmp_path):
    data = json.loads(trained(kind, name).to_str())
    data["model"]["merges"] = data["model"]["merges"][:40]  # most tokens: out of reach
    data["model"]["ignore_merges"] = ignore_merges
    hf = tokenizers.Tokenizer.from_str(json.dumps(data))
    tok = load(hf, tmp_path)
    assert_equal_ids(hf, tok)
    tok.save_pretrained(tmp_path)
    assert_equal_ids(hf, Tokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize("fuse_unk", [True, False])
def test_without_byte_tokens_the_unknown_token_stands_for_a_character(
    fuse_unk, tmp_path
):
    data = json.loads(trained("char", "llama2").to_str())
    data["model"] |= {"byte_fallback": False, "fuse_unk": fuse_unk}
    hf = tokenizers.Tokenizer.from_str(json.dumps(data))
    assert_equal_ids(hf, load(hf, tmp_path))


def test_a_character_without_any_token_is_refused(tmp_path):
    data = json.loads(trained("char", "llama2").to_str())
    data["model"] |= {"byte_fallback": False, "unk_token": None}
    tok = load(tokenizers.Tokenizer.from_str(json.dumps(data)), tmp_path)
    with pytest.raises(ValueError, match="needs '🦙', which is no token"):
        tok.encode("a 🦙")


def test_a_merge_across_words_is_found(tmp_path):
    """No cut at spaces where a token holds one in its middle."""
    hf = tokenizers.Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    hf.normalizer = ESCAPE
    trainer = trainers.BpeTrainer(
        vocab_size=200, show_progress=False, special_tokens=["<unk>"]
    )
    hf.train_from_iterator(["in the end of the day in the end"] * 5, trainer)
    tok = load(hf, tmp_path)
    assert tok.patterns == ()
    for text in ("in the end", "at the end of the day in", "the  end in  the"):
        assert tok.encode(text) == hf.encode(text, add_special_tokens=False).ids


def test_no_text_becomes_a_special_token_by_merging(tmp_path):
    """Some files have merges that lead to one, and `tokenizers` follows them."""
    hf = trained("byte", "no pattern")
    data = json.loads(hf.to_str())
    text = max(
        filter(str.isalpha, filter(str.isascii, data["model"]["vocab"])), key=len
    )
    id = data["model"]["vocab"][text]
    data["added_tokens"] = [{"id": id, "content": text, "special": True}]
    tok = load(hf, tmp_path, **data)
    assert hf.encode(text).ids == [id]
    assert id not in tok.encode(text)
    assert tok.decode(tok.encode(text)) == text


def test_the_post_processor_names_the_bos_token(tmp_path):
    hf = trained("byte", "llama3")
    template = tokenizers.processors.TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", hf.token_to_id("<|user|>"))]
    )
    hf.post_processor = tokenizers.processors.Sequence(
        [tokenizers.processors.ByteLevel(), template]
    )
    tok = load(hf, tmp_path)
    assert tok.encode("the cat", bos=True) == hf.encode("the cat").ids


def test_new_tokens_behind_the_special_ones_can_be_written(tmp_path):
    """`tokenizers` numbers special tokens by itself unless the vocabulary has them."""
    old = Tokenizer.train(CORPUS, vocab_size=400)
    new_id = old.vocab_size
    pair = old.encode("the")[0], old.encode("q")[0]
    assert pair not in old.merges
    tokens = {id: data for id, data in old.tokens.items() if id < 392}
    tokens[new_id] = old.token_bytes(pair[0]) + old.token_bytes(pair[1])
    tok = Tokenizer(tokens, {**old.merges, pair: (len(old.merges), new_id)}, old.added)
    tok.save_pretrained(tmp_path)
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert_equal_ids(hf, tok)
    assert_equal_ids(hf, Tokenizer.from_pretrained(tmp_path))
    assert new_id in tok.encode(tok.token_bytes(new_id).decode())


@pytest.mark.parametrize("model_type", [None, "llama", "mistral", "qwen3"])
def test_transformers_reads_what_we_write(model_type, tmp_path):
    tok = Tokenizer.train(CORPUS, vocab_size=500)
    tok.save_pretrained(tmp_path)
    if model_type:  # as in the folder of a model
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tok.bos_id, tok.eos_id)
    for text in sample_texts():
        if "<|" not in text:
            ids = tok.encode(text)
            assert theirs.encode(text) == [tok.bos_id, *ids]
            assert theirs.encode(text, add_special_tokens=False) == ids
            assert theirs.decode(ids) == text


def test_saving_leaves_nothing_but_whole_files(tmp_path):
    tok = Tokenizer.train(CORPUS, vocab_size=300)
    for _ in range(2):  # the second time over the first
        tok.save_pretrained(tmp_path / "new" / "folder")
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert names == ["tokenizer.json", "tokenizer_config.json"]


def test_what_a_file_cannot_say_is_refused(tmp_path):
    tok = Tokenizer.train(CORPUS, vocab_size=300)
    spaced = Tokenizer(tok.tokens, tok.merges, prefix_space=True)
    with pytest.raises(ValueError, match="prefix_space=True with patterns="):
        spaced.save_pretrained(tmp_path)
    twice = Tokenizer({0: b"a", 1: b"a"}, {})
    with pytest.raises(ValueError, match="two tokens would be 'a'"):
        twice.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


UNSUPPORTED = {
    "'Unigram'": {"model": {"type": "Unigram", "vocab": [["a", -1.0]]}},
    "'WordPiece'": {"model": {"type": "WordPiece", "vocab": {"a": 0}}},
    "dropout=0.1": {"model": {"type": "BPE", "dropout": 0.1}},
    "end_of_word_suffix='</w>'": {
        "model": {"type": "BPE", "end_of_word_suffix": "</w>"}
    },
    "'Whitespace'": {"pre_tokenizer": {"type": "Whitespace"}},
    "'Removed'": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Removed"},
                {"type": "ByteLevel", "add_prefix_space": False},
            ],
        }
    },
    "'Lowercase'": {"normalizer": {"type": "Lowercase"}},
    "'StripAccents'": {
        "normalizer": {"type": "StripAccents"},
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE},
    },
    "pre_tokenizer None": {"pre_tokenizer": None},
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_a_step_that_we_cannot_follow_is_refused_by_name(message, tmp_path):
    hf = trained("byte", "gpt2", vocab_size=260)
    with pytest.raises(ValueError, match=message):
        load(hf, tmp_path, **UNSUPPORTED[message])


def entry(text: str, id: int, **flags) -> dict:
    return {"content": text, "id": id, "special": True, **flags}


BROKEN = {
    "merge 1 is 'a zz'": {"merges": ["a b", "a zz"]},
    "merge 0 is 'a b c'": {"merges": ["a b c"]},
    r"merge 0 is \['a'\]": {"merges": [["a"]]},
    "merge 0 is 5": {"merges": [5]},
    "merge 0 is 'b a'": {"merges": ["b a"]},
    "tokens 'a' and 'c' share the id 0": {"vocab": {"a": 0, "c": 0}},
    "token 'a' has the id -1": {"vocab": {"a": -1}},
    "token 'a' has the id True": {"vocab": {"a": True}},
    "token 'a' has the id '0'": {"vocab": {"a": "0"}},
    "token 'a' has the id 1000000000000": {"vocab": {"a": 10**12}},
    "added token 'c' has the id 0, but that is 'a'": {"added": [entry("c", 0)]},
    "added token 'a' has the id 7.* 'a' is 0": {"added": [entry("a", 7)]},
    "added token '' has the id 7": {"added": [entry("", 7)]},
    "'<x>' with normalized=true strips": {
        "added": [entry("<x>", 7, lstrip=True, normalized=True)]
    },
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_vocabulary_is_refused(message, tmp_path):
    changes = dict(BROKEN[message])
    added = changes.pop("added", [])
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": []} | changes
    data = {
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE},
        "model": model,
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data | {"added_tokens": added}))
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is no JSON"),
        ("\udcff", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[1, 2]", r"holds '\[1, 2\]', which is no JSON object"),
        ("{}", "is not built like .*'model'"),
        ('{"model": 5}', "is not built like"),
        ('{"model": {"type": "BPE", "vocab": [], "merges": []}}', "pre_tokenizer None"),
        (
            '{"model": {"type": "BPE", "vocab": [5]}, "pre_tokenizer": '
            '{"type": "ByteLevel", "add_prefix_space": false}}',
            "is not built like",
        ),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(text, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(tmp_path)
