"""Hugging Face's tokenizer.json, read. (tokenizer_save.py writes it.)

The file is a pipeline: a normalizer changes the text, a pre-tokenizer cuts it into
words, a model merges within each, a post-processor adds special tokens. Many pipelines
are possible; read here are those of Llama, Mistral, Qwen, GPT-2 and their like. A step
that cannot be followed exactly is an error, never a guess.

Byte-level files spell a byte as a printable character, as GPT-2 did, so that a token is
a string that one can read: "Ġthe" is " the".
"""

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, get_args

import regex

from minllama.architecture.added_tokens import AddedToken
from minllama.architecture.bpe import Merges
from minllama.architecture.sentencepiece import SPACE, SentencePieceTokenizer
from minllama.architecture.tokenizer import Tokenizer, UnicodeForm

GPT2_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
SHOWN = [byte for byte in range(256) if chr(byte).isprintable() and byte != 32]
HIDDEN = [byte for byte in range(256) if byte not in SHOWN]  # spelled from U+0100 on
BYTE_OF = {chr(b): b for b in SHOWN} | {chr(256 + i): b for i, b in enumerate(HIDDEN)}

PREPEND = {"type": "Prepend", "prepend": SPACE}
ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
COLLAPSE = [
    {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "},
    {"type": "Replace", "pattern": {"Regex": r"\A | \z"}, "content": ""},
]
METASPACE_PREFIX = {"always": "missing", "first": "first", "never": None}
LARGEST_ID = 2**24

Json = dict[str, Any]


def from_json(data: Json) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes."""
    check_model(data["model"])
    steps = list(flat(data.get("pre_tokenizer"), "pretokenizers"))
    is_byte_level = any(step["type"] == "ByteLevel" for step in steps)
    tok = byte_level(data, steps) if is_byte_level else character_level(data, steps)
    for step in flat(data.get("post_processor"), "processors"):
        if step["type"] == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            name = step["single"][0]["SpecialToken"]["id"]
            tok.set_ends(tok.special_tokens.get(name, tok.bos_id), tok.eos_id)
    return tok


def check_model(model: Json) -> None:
    """Refuse what is no plain byte-pair encoding."""
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise ValueError(
            f"model type {kind!r} is not supported; only 'BPE' is, which Llama, "
            "Mistral, Qwen and GPT-2 have."
        )
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(
                f"{name}={model[name]!r} is not supported; Llama, Mistral, Qwen and "
                "GPT-2 have none."
            )


def flat(node: Json | None, key: str) -> Iterator[Json]:
    """The steps of a pipeline, with those inside a "Sequence"."""
    if node and node["type"] == "Sequence":
        for step in node[key]:
            yield from flat(step, key)
    elif node:
        yield node


def unsupported(part: str, step: Json) -> ValueError:
    """An error that shows the step."""
    return ValueError(
        f"{part} {str(step)[:200]} is not supported here; those of Llama, Mistral, "
        "Qwen and GPT-2 are."
    )


def byte_level(data: Json, steps: list[Json]) -> Tokenizer:
    """A tokenizer whose alphabet is the bytes."""
    model, form = data["model"], None
    for step in flat(data.get("normalizer"), "normalizers"):
        if step["type"] not in get_args(UnicodeForm) or form:
            raise unsupported("normalizer", step)
        form = step["type"]
    vocab = checked_vocab(model["vocab"])
    normalize = lambda text: unicodedata.normalize(form, text) if form else text
    added = list(read_added(data, vocab, normalize))
    patterns, prefix_space = read_splits(steps)
    return Tokenizer(
        ordinary(vocab, added, to_bytes),
        read_merges(model["merges"], vocab, added),
        added,
        patterns,
        ignore_merges=bool(model.get("ignore_merges")),
        unicode_form=form,
        prefix_space=prefix_space,
    )


def to_bytes(name: str) -> bytes:
    """What GPT-2's spelling stands for.

    Example:
        >>> to_bytes("Ġthe")
        b' the'
    """
    try:
        return bytes([BYTE_OF[char] for char in name])
    except KeyError:  # spelled in other characters: no text leads to this token
        return name.encode()


def read_splits(steps: list[Json]) -> tuple[list[str], bool]:
    """The patterns of byte-level steps, and whether they put a space in front."""
    patterns, prefix_space = [], False
    for step in steps:
        kind = step["type"]
        isolated = step.get("behavior") == "Isolated" and not step.get("invert")
        is_last = step is steps[-1] and not (step.get("add_prefix_space") and patterns)
        if kind == "Split" and isolated:
            [(syntax, pattern)] = step["pattern"].items()
            patterns.append(pattern if syntax == "Regex" else regex.escape(pattern))
        elif kind == "Digits":
            patterns.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
        elif kind == "ByteLevel" and is_last:
            prefix_space = step["add_prefix_space"]
            patterns += [GPT2_PATTERN] * step.get("use_regex", True)
        else:
            raise unsupported("pre_tokenizer", step)
    return patterns, prefix_space


def character_level(data: Json, steps: list[Json]) -> Tokenizer:
    """A tokenizer whose alphabet is characters, with "▁" for the space."""
    model = data["model"]
    prefix, collapse, cut_spaces = read_spaces(data, steps)
    vocab = checked_vocab(model["vocab"])
    normalize = lambda text: " " * (prefix == "every") + text.replace(SPACE, " ")
    added = list(read_added(data, vocab, normalize))
    for token in added:
        if token.normalized and (token.lstrip or token.rstrip):  # is "▁" white space?
            raise ValueError(
                f"added token {token.text!r} with normalized=true strips white space; "
                f"this is not supported beside {SPACE!r}, set normalized=false."
            )
    byte_ids = {
        byte: vocab[f"<0x{byte:02X}>"]
        for byte in range(256)
        if model.get("byte_fallback") and f"<0x{byte:02X}>" in vocab
    }
    tokens = ordinary(vocab, added, lambda name: name.replace(SPACE, " ").encode())
    return SentencePieceTokenizer(
        tokens | {id: bytes([byte]) for byte, id in byte_ids.items()},
        read_merges(model["merges"], vocab, added),
        added,
        byte_ids=byte_ids,
        unk_id={**vocab, **{t.text: t.id for t in added}}.get(model.get("unk_token")),
        fuse_unk=bool(model.get("fuse_unk")),
        prefix=prefix,
        collapse_spaces=collapse,
        cut_spaces=cut_spaces,
        ignore_merges=bool(model.get("ignore_merges")),
    )


def read_spaces(data: Json, steps: list[Json]) -> tuple[str | None, bool, bool]:
    """`prefix`, `collapse_spaces` and `cut_spaces` of a SentencePieceTokenizer."""
    prefix, escaped, cut_spaces = None, False, False
    normalizers = list(flat(data.get("normalizer"), "normalizers"))
    collapse = normalizers[:2] == COLLAPSE
    for step in normalizers[2 * collapse :]:
        if step not in (PREPEND, ESCAPE):
            raise unsupported("normalizer", step)
        prefix = "every" if step == PREPEND else prefix
        escaped = escaped or step == ESCAPE
    for step in steps:
        if step["type"] == "Metaspace" and step["replacement"] == SPACE and not prefix:
            old = "always" if step.get("add_prefix_space", True) else "never"
            prefix = METASPACE_PREFIX[step.get("prepend_scheme", old)]
            escaped, cut_spaces = True, step.get("split", True)
        elif not escaped or step.get("pattern") != {"String": " "}:  # none is left
            raise unsupported("pre_tokenizer", step)
    if not escaped:
        raise ValueError(
            f"pre_tokenizer {data.get('pre_tokenizer')} has neither ByteLevel nor "
            f"Metaspace, and no normalizer makes spaces {SPACE!r}; it is not supported."
        )
    return prefix, collapse, cut_spaces


def checked_vocab(vocab: Mapping[str, int]) -> Mapping[str, int]:
    """`vocab`, if each token has an id of its own."""
    names: dict[int, str] = {}
    for name, id in vocab.items():
        if type(id) is not int or not 0 <= id < LARGEST_ID:
            raise ValueError(
                f"token {name!r} has the id {id!r}; ids are whole numbers from 0 to "
                f"{LARGEST_ID - 1}."
            )
        if names.setdefault(id, name) != name:
            raise ValueError(
                f"tokens {names[id]!r} and {name!r} share the id {id}; each needs one "
                "of its own."
            )
    return vocab


def read_added(
    data: Json, vocab: Mapping[str, int], normalize: Callable[[str], str]
) -> Iterator[AddedToken]:
    """The added tokens, if they agree with the vocabulary."""
    names = {id: name for name, id in vocab.items()}
    for entry in data.get("added_tokens") or ():
        text, id = entry["content"], entry["id"]
        checked_vocab({text: id})
        if names.setdefault(id, text) != text or vocab.get(text, id) != id or not text:
            raise ValueError(
                f"added token {text!r} has the id {id}, but that is {names[id]!r}, and "
                f"in the vocabulary {text!r} is {vocab.get(text)}; each needs one id."
            )
        yield AddedToken(
            text,
            id,
            special=bool(entry.get("special")),
            lstrip=bool(entry.get("lstrip")),
            rstrip=bool(entry.get("rstrip")),
            single_word=bool(entry.get("single_word")),
            normalized=normalize(text) if entry.get("normalized") else None,
        )


def ordinary(
    vocab: Mapping[str, int], added: Iterable[AddedToken], spelled: Callable
) -> dict[int, bytes]:
    """The bytes of the tokens that are text, by their spelling in the file."""
    special = {token.id for token in added if token.special}
    return {id: spelled(name) for name, id in vocab.items() if id not in special}


def read_merges(
    merges: Iterable[str | list[str]],
    vocab: Mapping[str, int],
    added: Iterable[AddedToken],
) -> Merges:
    """The pairs in order of rank, whether written "a b" or ["a", "b"].

    One that would make a special token is left out: no text may become one.
    """
    special = {token.id for token in added if token.special}
    found = {}
    for rank, pair in enumerate(merges):
        try:
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            joined = vocab[left + right]
            if joined not in special:
                found[vocab[left], vocab[right]] = rank, joined
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"merge {rank} is {pair!r}, but must be two tokens of the vocabulary "
                "that make a third; vocabulary and merges are not of one model."
            ) from None
    return found
