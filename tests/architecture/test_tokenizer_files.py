"""Files of Meta and OpenAI against tiktoken, sentencepiece and tokenizers; settings."""

import base64
import io
import json
import random
import re
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers

from minllama.architecture import tokenizer_files
from minllama.architecture.bpe import LLAMA3_PATTERN
from minllama.architecture.tokenizer import Tokenizer
from minllama.architecture.tokenizer_files import LARGEST_FILE, llama3_special_tokens
from tests.architecture.test_tokenizer import CORPUS, sample_texts


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    lines = [
        base64.b64encode(data) + f" {rank}\n".encode() for data, rank in ranks.items()
    ]
    path.write_bytes(b"".join(lines))
    return path


def random_ranks(seed: int) -> dict[bytes, int]:
    """All bytes, and tokens each of which joins two others; most in several ways."""
    rng = random.Random(seed)
    ranks = {bytes([byte]): byte for byte in range(256)}
    tokens = [b"a", b"b", b" "]
    while len(tokens) < 60:
        token = rng.choice(tokens) + rng.choice(tokens)
        if token not in ranks:
            ranks[token] = len(ranks)
            tokens.append(token)
    return ranks


def trained_ranks() -> dict[bytes, int]:
    tok = Tokenizer.train(CORPUS, vocab_size=600, special_tokens=[])
    return {data: id for id, data in tok.tokens.items()}


def test_ranks_give_the_ids_of_tiktoken(tmp_path):
    ranks = trained_ranks()
    tok = Tokenizer.from_pretrained(write_ranks(tmp_path / "tokenizer.model", ranks))
    oracle = tiktoken.Encoding(
        "test",
        pat_str=LLAMA3_PATTERN,
        mergeable_ranks=ranks,
        special_tokens=tok.special_tokens,
    )
    for text in sample_texts():
        assert tok.encode(text) == oracle.encode_ordinary(text)
        assert tok.decode(tok.encode(text)) == text
    text = "Hi<|eot_id|><|end_of_text|>\n<|begin_of_text|>"
    ids = tok.encode(text, allowed_special="all")
    assert ids == oracle.encode(text, allowed_special="all")


@pytest.mark.parametrize("seed", range(4))
def test_equal_ranks_are_joined_from_the_left_as_in_tiktoken(seed, tmp_path):
    ranks = random_ranks(seed)
    tok = Tokenizer.from_pretrained(write_ranks(tmp_path / "tokenizer.model", ranks))
    oracle = tiktoken.Encoding(
        "test", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    rng = random.Random(seed)
    for _ in range(200):
        text = "".join(rng.choices("aab ", k=rng.randrange(30)))
        assert tok.encode(text) == oracle.encode_ordinary(text), text


def test_ranks_survive_as_tokenizer_json(tmp_path):
    path = write_ranks(tmp_path / "tokenizer.model", trained_ranks())
    tok = Tokenizer.from_pretrained(path)
    tok.save_pretrained(tmp_path)  # beside tokenizer.model, and read before it
    copy = Tokenizer.from_pretrained(tmp_path)
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    hf.encode_special_tokens = True
    assert copy.special_tokens == tok.special_tokens
    assert (copy.bos_id, copy.stop_ids) == (tok.bos_id, tok.stop_ids)
    for text in sample_texts():
        ids = tok.encode(text)
        assert copy.encode(text) == ids
        assert hf.encode(text, add_special_tokens=False).ids == ids


def test_llama_3_has_its_special_tokens_where_meta_put_them():
    new, old = llama3_special_tokens(), llama3_special_tokens("3.0")
    for names in (new, old):
        assert len(set(names)) == len(names) == 256
        assert names[:2] == ["<|begin_of_text|>", "<|end_of_text|>"]
        assert names[6:8] == ["<|start_header_id|>", "<|end_header_id|>"]
        assert names[9] == "<|eot_id|>"
    assert new[4] == "<|finetune_right_pad_id|>"
    assert new[5] == "<|reserved_special_token_2|>"
    assert (new[8], new[10]) == ("<|eom_id|>", "<|python_tag|>")
    assert new[255] == "<|reserved_special_token_247|>"
    assert old[4] == "<|reserved_special_token_2|>"
    assert old[8] == "<|reserved_special_token_4|>"
    assert old[255] == "<|reserved_special_token_250|>"


@pytest.mark.parametrize(
    "params, has_eom",
    [(None, True), ({"use_scaled_rope": True}, True), ({"dim": 8}, False)],
)
def test_params_json_tells_the_version_of_llama_3(params, has_eom, tmp_path):
    write_ranks(tmp_path / "tokenizer.model", random_ranks(0))
    if params:
        (tmp_path / "params.json").write_text(json.dumps(params))
    tok = Tokenizer.from_pretrained(tmp_path)
    assert ("<|eom_id|>" in tok.special_tokens) == has_eom
    assert len(tok.stop_ids) == 2 + has_eom


@pytest.mark.parametrize(
    "text, message",
    [
        ("IQ== 0\n!!!! 1\n", r"line 2 is b'!!!! 1'"),
        ("IQ== 0\nIg= 1\n", r"line 2 is b'Ig= 1'"),
        ("IQ== 0\nIg== x\n", r"line 2 is b'Ig== x'"),
        ("IQ== 0\nIg==\n", r"line 2 is b'Ig=='"),
        ("IQ== 0\nIg== 2\n", r"line 2 gives b'\"' the rank 2"),
        ("IQ== 0\nIQ== 1\n", r"line 2 gives b'!' the rank 1"),
        ("IQ== 1\n", r"line 1 gives b'!' the rank 1"),
    ],
)
def test_a_damaged_rank_file_is_refused(text, message, tmp_path):
    (tmp_path / "tokenizer.model").write_text(text)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(tmp_path)


def test_more_ranks_than_llama_3_has_are_refused(tmp_path):
    """Llama 4's file looks the same, but cuts words otherwise."""
    ranks = {i.to_bytes(3, "big"): i for i in range(128_001)}
    path = write_ranks(tmp_path / "tokenizer.model", ranks)
    with pytest.raises(ValueError, match="128001 ranks are more than Llama 3's 128000"):
        Tokenizer.from_pretrained(path)


def train_sentencepiece(**options) -> bytes:
    """A SentencePiece model file, trained as Llama 2's was unless told otherwise."""
    words = "".join(CORPUS).split()
    sentences = [" ".join(words[i : i + 9]) for i in range(0, len(words), 9)]
    settings = {
        "vocab_size": 600,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 0.98,
        "minloglevel": 2,
    }
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=out, **{**settings, **options}
    )
    return out.getvalue()


SENTENCEPIECE = {
    "llama2": {},
    "digits": {"split_digits": True},
    "no space in front": {"add_dummy_prefix": False},
    "collapsed spaces": {"remove_extra_whitespaces": True},
    "collapsed, no space": {
        "remove_extra_whitespaces": True,
        "add_dummy_prefix": False,
    },
    "rows of spaces": {"allow_whitespace_only_pieces": True},
    "across words": {"split_by_whitespace": False, "split_by_unicode_script": False},
    "no bytes": {"byte_fallback": False, "vocab_size": 350},
    "own symbols": {"user_defined_symbols": ["the▁cat", "the", "<b>", "▁x"]},
    "no bos": {"bos_id": -1, "eos_id": 1, "pad_id": 2},
}


@pytest.fixture(scope="module")
def llama2() -> bytes:
    return train_sentencepiece()


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_pieces_give_the_ids_of_sentencepiece(name, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_sentencepiece(**SENTENCEPIECE[name]))
    tok = Tokenizer.from_pretrained(path)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert tok.vocab_size == oracle.vocab_size()
    ends = [id if id >= 0 else None for id in (oracle.bos_id(), oracle.eos_id())]
    assert [tok.bos_id, tok.eos_id] == ends
    extra = [" the  cat <b>x x<b>the", "the cat", "  ", "x", "in the end of the day"]
    for text in sample_texts() + extra:
        ids = oracle.encode(text)
        assert tok.encode(text) == ids, repr(text)
        if tok.byte_ids and not (tok.collapse_spaces and "▁" in text):
            assert tok.decode(ids) == oracle.decode(ids), repr(text)


def test_a_character_that_is_no_piece_still_merges_into_one(llama2, tmp_path):
    """SentencePiece joins by text: "th" from t and h, although no piece is "t"."""
    piece = lambda code: bytes([10, 1, code])  # of one ASCII character
    free = next(code for code in range(1, 127) if piece(code) not in llama2)
    model = llama2.replace(piece(ord("t")), piece(free))
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model)
    tok = Tokenizer.from_pretrained(path)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert "t" not in {oracle.id_to_piece(id) for id in range(oracle.vocab_size())}
    for text in ("the cat sat", "tt t", *sample_texts()):
        assert tok.encode(text) == oracle.encode(text), repr(text)


@pytest.mark.parametrize("name", ["llama2", "no space in front", "collapsed spaces"])
def test_pieces_survive_as_tokenizer_json(name, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(
        train_sentencepiece(**SENTENCEPIECE[name])
    )
    tok = Tokenizer.from_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    copy = Tokenizer.from_pretrained(tmp_path)
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    hf.encode_special_tokens = True
    assert (copy.bos_id, copy.stop_ids) == (tok.bos_id, tok.stop_ids) == (1, (2,))
    for text in sample_texts():
        ids = tok.encode(text)
        assert copy.encode(text) == ids
        assert hf.encode(text, add_special_tokens=False).ids == ids
        assert copy.decode(ids) == hf.decode(ids) == tok.decode(ids)


def test_own_symbols_of_sentencepiece_cannot_be_written_as_json(tmp_path):
    model = train_sentencepiece(user_defined_symbols=["<b>"])
    (tmp_path / "tokenizer.model").write_bytes(model)
    tok = Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="token '<b>' is looked for behind the space"):
        tok.save_pretrained(tmp_path)


def test_streaming_drops_the_space_that_encoding_put_in_front(llama2, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(llama2)
    tok = Tokenizer.from_pretrained(tmp_path)
    for text in ("the cat", "  the 🦙 cat", "🦙"):
        ids = tok.encode(text, bos=True)
        decoder = tok.stream_decoder()
        pieces = [decoder.feed(id) for id in ids] + [decoder.flush()]
        assert "".join(pieces) == text == tok.decode(ids)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"model_type": "unigram", "byte_fallback": False, "vocab_size": 350},
            "'unigram'",
        ),
        ({"model_type": "char", "byte_fallback": False, "vocab_size": 170}, "'char'"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizer 'nmt_nfkc'"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix=true"),
    ],
)
def test_a_sentencepiece_model_that_we_cannot_follow_is_refused(
    options, message, tmp_path
):
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(**options))
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name, kind", [("unused", 5), ("▁a b", 1), ("a b", 4), ("t", 1)]
)
def test_a_piece_that_we_cannot_follow_is_refused(llama2, name, kind, tmp_path):
    text = (
        name.encode()
    )  # as protobuf: field 1, its length, the text; field 3, the type
    piece = bytes([10, len(text)]) + text + bytes([24, kind])
    (tmp_path / "tokenizer.model").write_bytes(llama2 + bytes([10, len(piece)]) + piece)
    with pytest.raises(ValueError, match=f"piece 600='{name}' is marked unused"):
        Tokenizer.from_pretrained(tmp_path)


def test_every_cut_of_a_sentencepiece_file_is_refused_or_read(llama2, tmp_path):
    """Never another error, and never for ever."""
    path, rng = tmp_path / "tokenizer.model", random.Random(0)
    outcomes = set()
    for _ in range(60):
        data = bytearray(llama2[: rng.randrange(1, len(llama2))])
        data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            Tokenizer.from_pretrained(path)
            outcomes.add("read")
        except ValueError as error:
            outcomes.add(str(error)[:4])
    assert "byte" in outcomes  # "byte 17 of 4711 is no protobuf"


@pytest.mark.parametrize("data", [b"", b"\x00\x01", b"\x0a\xff\xff\xff", b"\xff" * 20])
def test_what_is_no_protobuf_is_refused(data, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"byte \d+ of \d+|model_type='unigram'"):
        Tokenizer.from_pretrained(path)


def write_gpt2(
    folder: Path, names=("vocab.json", "merges.txt")
) -> tokenizers.Tokenizer:
    hf = tokenizers.ByteLevelBPETokenizer()
    hf.train_from_iterator(
        CORPUS, 400, show_progress=False, special_tokens=["<|endoftext|>"]
    )
    hf.save_model(str(folder))
    for old, new in zip(("vocab.json", "merges.txt"), names):
        (folder / old).rename(folder / new)
    return hf


@pytest.mark.parametrize(
    "names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")]
)
def test_the_pair_of_gpt2_gives_the_ids_of_tokenizers(names, tmp_path):
    hf = write_gpt2(tmp_path, names)
    tok = Tokenizer.from_pretrained(tmp_path)
    hf._tokenizer.encode_special_tokens = True
    for text in sample_texts():
        assert tok.encode(text) == hf.encode(text).ids
        assert tok.decode(tok.encode(text)) == text
    assert tok.bos_id is None
    assert tok.stop_ids == (tok.eos_id,) == (hf.token_to_id("<|endoftext|>"),)


def test_a_pair_of_another_model_is_refused(tmp_path):
    write_gpt2(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(ValueError, match="tokenizer_class='Qwen2Tokenizer'"):
        Tokenizer.from_pretrained(tmp_path)
    settings.write_text('{"tokenizer_class": "GPT2TokenizerFast"}')
    assert Tokenizer.from_pretrained(tmp_path).encode("the cat")
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(ValueError, match="merges.txt is missing"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved tokenizer with the special tokens of Llama 3, and two of ChatML."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<bos>"]
    tok = Tokenizer.train(CORPUS, vocab_size=300, special_tokens=special)
    tok.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    return tmp_path


def test_settings_beside_state_the_ends_of_a_text(folder):
    tok = Tokenizer.from_pretrained(folder)
    end, start, turn, bos = tok.special_tokens.values()
    assert (tok.bos_id, tok.eos_id, tok.stop_ids) == (None, end, (end, turn))
    write = lambda name, data: (folder / name).write_text(json.dumps(data))
    write("special_tokens_map.json", {"eos_token": {"content": "<|im_start|>"}})
    assert Tokenizer.from_pretrained(folder).eos_id == start
    write("tokenizer_config.json", {"bos_token": "<bos>", "eos_token": "<|im_end|>"})
    tok = Tokenizer.from_pretrained(folder / "tokenizer.json")
    assert (tok.bos_id, tok.eos_id) == (bos, turn)
    write("generation_config.json", {"eos_token_id": 5})
    assert Tokenizer.from_pretrained(folder).stop_ids == (5, end, turn)
    write("generation_config.json", {"eos_token_id": [5, 7]})
    assert Tokenizer.from_pretrained(folder).stop_ids == (5, 7, end, turn)
    write("tokenizer_config.json", {"bos_token": None, "eos_token": None})
    tok = Tokenizer.from_pretrained(folder)
    assert (tok.bos_id, tok.eos_id, tok.stop_ids) == (None, None, (5, 7, end, turn))


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("tokenizer_config.json", {"bos_token": "<none>"}, "bos_token='<none>'"),
        ("tokenizer_config.json", {"bos_token": 5}, "bos_token=5"),
        ("tokenizer_config.json", {"eos_token": {"text": "x"}}, "is not built like"),
        ("special_tokens_map.json", [], r"holds '\[\]'"),
        ("generation_config.json", {"eos_token_id": 999}, "id=999"),
        ("generation_config.json", {"eos_token_id": ["a"]}, "'a'"),
    ],
)
def test_settings_that_contradict_the_tokenizer_are_refused(
    name, data, message, folder
):
    (folder / name).write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(folder)


def test_shipped_names_are_found_and_others_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "ASSETS", folder.parent)
    assert Tokenizer.from_pretrained(folder.name).vocab_size == 300
    with pytest.raises(ValueError, match=f"'storys' is no shipped .*{folder.name}"):
        Tokenizer.from_pretrained("storys")
    monkeypatch.setattr(tokenizer_files, "ASSETS", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="'storys' is no shipped .*none yet"):
        Tokenizer.from_pretrained("storys")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no folder with one of tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json"])
def test_a_file_too_large_is_refused_before_it_is_read(name, tmp_path):
    with open(tmp_path / name, "wb") as file:
        file.truncate(LARGEST_FILE + 1)  # a hole: no bytes on the disk
    (tmp_path / "merges.txt").touch()
    with pytest.raises(ValueError, match=f"has {LARGEST_FILE + 1} bytes"):
        Tokenizer.from_pretrained(tmp_path)


def test_nothing_is_ever_unpickled():
    """Neither the module nor a loader that uses it is named in the code."""
    package = Path(tokenizer_files.__file__).parent
    names = ["added_tokens", "bpe", "chat", "sentencepiece", "tokenizer"]
    names += ["tokenizer_files", "tokenizer_json", "tokenizer_save"]
    for name in names:
        words = re.findall(r"\w+", (package / f"{name}.py").read_text())
        assert not {"pickle", "torch", "eval", "exec"} & set(words)
