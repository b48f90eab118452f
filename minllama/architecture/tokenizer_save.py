"""A tokenizer written as tokenizer.json, which other libraries read as well.

The ids are the same in `tokenizers` and `transformers`. One habit differs: where there
is a bos token, the file asks for it in front of every text, as that of Llama 3 does. So
their `encode(text)` is our `encode(text, bos=True)`, and our `encode(text)` is their
`encode(text, add_special_tokens=False)`. And beside a config.json of a "qwen2",
`AutoTokenizer` cuts words as Qwen 2 does, whatever the file says; use
`PreTrainedTokenizerFast` there.
"""

import json
import os
from pathlib import Path
from typing import Any

from minllama.architecture.added_tokens import AddedToken
from minllama.architecture.chat import TEMPLATES, format_of
from minllama.architecture.sentencepiece import SPACE, SentencePieceTokenizer
from minllama.architecture.tokenizer import Tokenizer
from minllama.architecture.tokenizer_json import (
    BYTE_OF,
    COLLAPSE,
    ESCAPE,
    GPT2_PATTERN,
    METASPACE_PREFIX,
    PREPEND,
    Json,
)

CHAR_OF = {byte: char for char, byte in BYTE_OF.items()}
UNESCAPE = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}

Parts = tuple[
    dict[int, str], Json, Json
]  # names of tokens; steps; options of the model


def write_tokenizer(tok: Tokenizer, folder: str | Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name_of = names_of(tok.special_tokens)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name_of.get(tok.bos_id),
        "eos_token": name_of.get(tok.eos_id),
        "clean_up_tokenization_spaces": False,
    }
    if chat_format := format_of(tok.special_tokens):
        config["chat_template"] = TEMPLATES[chat_format]
    write_json(folder / "tokenizer.json", to_json(tok))
    write_json(folder / "tokenizer_config.json", config)


def names_of(ids: dict[str, int]) -> dict[int | None, str]:
    """Names by id, for an id that may be None."""
    return {id: name for name, id in ids.items()}


def write_json(path: Path, data: Any) -> None:
    """Write under another name, then rename, so that nobody ever sees half a file."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    text = json.dumps(data, ensure_ascii=False, indent=1)
    unfinished.write_text(text + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def to_json(tok: Tokenizer) -> Json:
    """A tokenizer in the layout of tokenizer.json."""
    if isinstance(tok, SentencePieceTokenizer):
        names, steps, options = character_level_parts(tok)
    else:
        names, steps, options = byte_level_parts(tok)
    added = {token.id: token.text for token in tok.added}
    if sorted(added) != list(range(len(names), len(names) + len(added))):
        names |= added  # `tokenizers` numbers those outside the vocabulary by itself
    vocab = {names[id]: id for id in sorted(names)}
    if len(vocab) < len(names):
        twice = next(name for id, name in names.items() if vocab[name] != id)
        raise ValueError(
            f"two tokens would be {twice!r} in a tokenizer.json, which cannot hold "
            "such a vocabulary; keep its original file."
        )
    ranked = sorted(tok.merges, key=lambda pair: (tok.merges[pair][0], pair))
    merges = [[names[left], names[right]] for left, right in ranked]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_json(t) for t in sorted(tok.added, key=lambda t: t.id)],
        **steps,
        "post_processor": begin_json(tok),
        "model": {"type": "BPE", **options, "vocab": vocab, "merges": merges},
    }


def byte_level_parts(tok: Tokenizer) -> Parts:
    """What a tokenizer.json says of a tokenizer whose alphabet is the bytes."""
    added = {token.id for token in tok.added}
    names = {
        id: "".join(CHAR_OF[byte] for byte in data)
        for id, data in tok.tokens.items()
        if id not in added
    }
    isolated = {"type": "Split", "behavior": "Isolated", "invert": False}
    cuts = [isolated | {"pattern": {"Regex": pattern}} for pattern in tok.patterns]
    spell = {"type": "ByteLevel", "trim_offsets": True, "use_regex": False}
    if tok.prefix_space:
        if tok.patterns not in ((GPT2_PATTERN,), ()):
            raise ValueError(
                f"prefix_space=True with patterns={tok.patterns} cannot be said in a "
                "tokenizer.json, only with GPT-2's pattern or with none."
            )
        cuts, spell["use_regex"] = [], bool(tok.patterns)
    spell["add_prefix_space"] = tok.prefix_space
    steps = {
        "normalizer": {"type": tok.unicode_form} if tok.unicode_form else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, spell]},
        "decoder": spell,
    }
    return names, steps, {"ignore_merges": tok.ignore_merges}


def character_level_parts(tok: SentencePieceTokenizer) -> Parts:
    """What a tokenizer.json says of a tokenizer whose alphabet is characters."""
    for token in tok.added:
        if token.normalized not in (None, tok.normalize(token.text)):
            raise ValueError(
                f"token {token.text!r} is looked for behind the space in front, which "
                "cannot be said in a tokenizer.json; keep the tokenizer.model."
            )
    byte_names = {id: f"<0x{byte:02X}>" for byte, id in tok.byte_ids.items()}
    added = {token.id: token.text for token in tok.added}
    names = {
        id: data.decode().replace(" ", SPACE)
        for id, data in tok.tokens.items()
        if id not in added and id not in byte_names
    }
    names |= byte_names
    known: dict[int | None, str] = {**names, **added}
    scheme = {prefix: name for name, prefix in METASPACE_PREFIX.items()}.get(tok.prefix)
    normalizers = COLLAPSE * tok.collapse_spaces
    normalizers = normalizers + [PREPEND, ESCAPE] * (tok.prefix == "every")
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme}
    decoders = [UNESCAPE, {"type": "ByteFallback"}, {"type": "Fuse"}]
    decoders += [STRIP] * (tok.prefix is not None)
    steps = {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": metaspace | {"split": tok.cut_spaces} if scheme else None,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }
    options = {
        "unk_token": known.get(tok.unk_id),
        "fuse_unk": tok.fuse_unk,
        "byte_fallback": bool(tok.byte_ids),
        "ignore_merges": tok.ignore_merges,
    }
    return names, steps, options


def added_json(token: AddedToken) -> Json:
    """An entry of "added_tokens"."""
    return {
        "id": token.id,
        "content": token.text,
        "single_word": token.single_word,
        "lstrip": token.lstrip,
        "rstrip": token.rstrip,
        "normalized": token.normalized is not None,
        "special": token.special,
    }


def begin_json(tok: Tokenizer) -> Json | None:
    """The post-processor that puts the bos token in front."""
    name = names_of(tok.special_tokens).get(tok.bos_id)
    if name is None:
        return None
    bos = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": id, "type_id": 0}} for id in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, bos, second],
        "special_tokens": {name: {"id": name, "ids": [tok.bos_id], "tokens": [name]}},
    }
