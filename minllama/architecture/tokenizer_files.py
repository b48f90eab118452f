"""Where tokenizers come from: shipped models, folders, the files of Meta and OpenAI.

One kind of vocabulary, spelled in many ways. GPT-2 and Hugging Face list the merges;
Llama 3 gives ranks and leaves the merges to be found, any two tokens that make a third;
Llama 2 gives scores, in a protobuf. All become the same two tables of a `Tokenizer`.

Files come from strangers. Nothing is executed or unpickled, large ones are refused
before they are read, and what cannot be followed exactly is an error, never a guess.
"""

import base64
import json
import re
import struct
from pathlib import Path

from minllama.architecture.added_tokens import AddedToken
from minllama.architecture.bpe import merges_of_ranks
from minllama.architecture.sentencepiece import read_sentencepiece
from minllama.architecture.tokenizer import Tokenizer
from minllama.architecture.tokenizer_json import Json, from_json

ASSETS = Path(__file__).parent.parent / "assets"
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "encoder.json")
MERGES_BESIDE = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
LARGEST_FILE = 256 * 2**20  # bytes; Llama 3's 128,256 tokens take 13 million
LLAMA3_RANKS = 128_000
DAMAGE = (LookupError, TypeError, AttributeError, UnicodeError, struct.error)
RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")


def read_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer of a shipped model, of a folder, or of a file."""
    path = find(name)
    try:
        tok = read_file(path)
        read_settings(tok, path.parent)
    except DAMAGE as error:
        raise ValueError(
            f"{path} is not built like the tokenizer file it is named for: {error!r}; "
            "fetch it again."
        ) from error
    return tok


def find(name: str | Path) -> Path:
    """The file to read. A shipped name goes before a folder of that name."""
    shipped = sorted(path.parent.name for path in ASSETS.glob("*/tokenizer.json"))
    path = ASSETS / name if name in shipped else Path(name)
    found = [path, *(path / file for file in FILES)]
    for file in found:
        if file.is_file():
            return file
    raise ValueError(
        f"{str(name)!r} is no shipped tokenizer ({', '.join(shipped) or 'none yet'}), "
        f"no file, and no folder with one of {', '.join(FILES)}."
    )


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, unless it is too large to be what it should be."""
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise ValueError(
            f"{path} has {size} bytes; a tokenizer file has at most {LARGEST_FILE}. Is "
            "it another file?"
        )
    return path.read_bytes()


def read_object(path: Path) -> Json:
    """The JSON object in a file; an empty one where there is no file."""
    try:
        data = json.loads(read_bytes(path)) if path.is_file() else {}
    except (json.JSONDecodeError, UnicodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); fetch it again.") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds {str(data)[:40]!r}, which is no JSON object.")
    return data


def read_file(path: Path) -> Tokenizer:
    """The tokenizer in a file, whose name or first line tells its kind."""
    if path.name in MERGES_BESIDE:
        return read_gpt2(path, path.with_name(MERGES_BESIDE[path.name]))
    if path.suffix == ".json":
        return from_json(read_object(path))
    data = read_bytes(path)
    if not RANK_LINE.match(data):
        return read_sentencepiece(data)
    params = read_object(path.with_name("params.json"))  # Meta's settings of the model
    is_first = params and "use_scaled_rope" not in params  # which came with 3.1
    return read_ranks(data, llama3_special_tokens("3.0" if is_first else "3.1"))


def llama3_special_tokens(version: str = "3.1") -> list[str]:
    """The names of the 256 tokens behind Llama 3's ranks, from id 128000 on.

    The file holds no names and is the same for all versions. 3.1 named three tokens
    that 3.0 had reserved, and so renumbered the others. Taken are the names of 3.1,
    which all later models have, unless a params.json tells that the model is 3.0.
    """
    named = {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        9: "<|eot_id|>",
    }
    if version != "3.0":
        named |= {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(256))
    return [named.get(i) or next(reserved) for i in range(256)]


def read_ranks(data: bytes, special_tokens: list[str]) -> Tokenizer:
    """Llama 3's tokenizer.model: on each line a token in base64, and its rank."""
    ids: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines()):
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except ValueError:
            raise ValueError(
                f"line {number + 1} is {line[:40]!r}, not a token in base64 and its "
                "rank; the file is damaged or incomplete, fetch it again."
            ) from None
        if ids.setdefault(token, rank) != number:
            raise ValueError(
                f"line {number + 1} gives {token!r} the rank {rank}; each token has "
                "one line and the ranks count from 0, so this file is not Llama 3's."
            )
    if len(ids) > LLAMA3_RANKS:
        raise ValueError(
            f"{len(ids)} ranks are more than Llama 3's {LLAMA3_RANKS}; another model "
            "has other special tokens and other words, so use its tokenizer.json."
        )
    return Tokenizer(
        {id: token for token, id in ids.items()},
        merges_of_ranks(ids, {id: id for id in ids.values()}),
        [AddedToken(name, id) for id, name in enumerate(special_tokens, len(ids))],
        ignore_merges=True,
    )


def read_gpt2(vocab: Path, merges: Path) -> Tokenizer:
    """GPT-2's pair: names and ids in JSON, and the merges, one on each line."""
    settings = read_object(vocab.with_name("tokenizer_config.json"))
    made_for = settings.get("tokenizer_class") or "GPT2"
    if not made_for.startswith("GPT2"):
        raise ValueError(
            f"tokenizer_class={made_for!r} says that {vocab} is not GPT-2's, so words "
            "may be cut otherwise; use its tokenizer.json."
        )
    if not merges.is_file():
        raise ValueError(f"{merges} is missing; {vocab.name} says nothing without it.")
    names = read_object(vocab)
    lines = read_bytes(merges).decode().split("\n")
    return from_json(
        {
            "added_tokens": [
                {"content": name, "id": names[name], "special": True}
                for name in names.keys() & {"<|endoftext|>"}
            ],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
            "model": {
                "vocab": names,
                "merges": [s for s in lines if s and not s.startswith("#version")],
            },
        }
    )


def read_settings(tok: Tokenizer, folder: Path) -> None:
    """Take the ends of a text from the files beside the tokenizer that state them."""
    ends = {"bos_token": tok.bos_id, "eos_token": tok.eos_id}
    ids: dict[str | None, int] = {token.text: token.id for token in tok.added}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        data = read_object(folder / file)
        for key in ends.keys() & data.keys():
            name = data[key]["content"] if isinstance(data[key], dict) else data[key]
            if name is not None and name not in ids:
                raise ValueError(
                    f"{key}={name!r} of {folder / file} is no added token of the "
                    "tokenizer; the files are not of one model."
                )
            ends[key] = ids.get(name)
    stop_ids = read_object(folder / "generation_config.json").get("eos_token_id") or []
    stop_ids = [stop_ids] if isinstance(stop_ids, int) else stop_ids
    tok.set_ends(ends["bos_token"], ends["eos_token"], stop_ids)
