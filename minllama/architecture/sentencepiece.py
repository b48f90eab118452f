"""SentencePiece's byte-pair encoding, as in Llama 2 and Mistral.

The other way to leave no text without tokens: the alphabet is the characters, and one
that the vocabulary lacks is spelled in 256 byte tokens, <0x00> to <0xFF>. Spaces are
ordinary characters (files write "▁" for them), and a text gets one in front, so that a
word is the same token at the start as in the middle; `decode` takes it away.

There is no regular expression: a merge could run through the whole text. Only the
vocabulary tells that none does. As long as no token has a space behind another
character, each word may be encoded for itself, and that makes it fast.

Papers: Kudo and Richardson 2018, arXiv:1808.06226; the bytes: Touvron et al. 2023,
arXiv:2302.13971, section 2.1.
"""

import struct
from collections.abc import Iterable, Mapping
from typing import Any

from minllama.architecture.added_tokens import AddedToken
from minllama.architecture.bpe import Merges, merge, merges_of_ranks
from minllama.architecture.tokenizer import Tokenizer

SPACE = "▁"  # U+2581, how the files write a space
WORD, WORD_OF_ONE_SPACE = r" *[^ ]+", r" [^ ]*"
GHOST = 2**32  # plus a code point: the id, while merging, of what is no token itself

MODELS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
SIZES = {1: 8, 5: 4}  # bytes of a protobuf value, by the way it is written
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer whose alphabet is characters, with bytes for those that it lacks.

    Args:
        tokens: the bytes of each ordinary token by its id, with a space for "▁".
        merges: the pairs to join, with rank and result.
        added: special tokens, and others that are found before merging.
        byte_ids: the token of each byte; empty where the vocabulary has none.
        unk_id: the token for a character that has no bytes either.
        fuse_unk: one `unk_id` for a row of such characters.
        prefix: where a space goes in front: "every" stretch of text between added
            tokens; "missing": each that has none; "first": the first if it has none.
        collapse_spaces: a row of spaces is one, and none stays at the ends.
        cut_spaces: each space begins a word, so that no token holds two.
        ignore_merges: a word that is a token becomes that token, merges or not.
    """

    def __init__(
        self,
        tokens: Mapping[int, bytes],
        merges: Merges,
        added: Iterable[AddedToken] = (),
        *,
        byte_ids: Mapping[int, int],
        unk_id: int | None = None,
        fuse_unk: bool = True,
        prefix: str | None = "every",
        collapse_spaces: bool = False,
        cut_spaces: bool = False,
        ignore_merges: bool = False,
    ) -> None:
        texts = {id: tokens[id].decode() for id in tokens.keys() - byte_ids.values()}
        self._chars = {text: id for id, text in texts.items() if len(text) == 1}
        joined = [texts[id].lstrip(" ") for id in {id for _, id in merges.values()}]
        patterns = [WORD_OF_ONE_SPACE] if cut_spaces else [WORD]
        if not cut_spaces and (ignore_merges or any(" " in text for text in joined)):
            patterns = []  # the text is one word
        super().__init__(tokens, merges, added, patterns, ignore_merges=ignore_merges)
        self.byte_ids, self.unk_id, self.fuse_unk = byte_ids, unk_id, fuse_unk
        self.prefix, self.collapse_spaces = prefix, collapse_spaces
        self.cut_spaces = cut_spaces

    def normalize(self, text: str) -> str:
        if self.collapse_spaces:
            text = " ".join(filter(None, text.split(" ")))
        text = text.replace(SPACE, " ")  # the files cannot tell one from the other
        return " " + text if self.prefix == "every" and text else text

    def words(self, text: str, first: bool) -> Iterable[str]:
        if self.prefix == "missing" or self.prefix == "first" and first:
            text = text if text.startswith(" ") else " " + text
        return super().words(text, first)

    def encode_word(self, word: str) -> list[int]:
        if self.ignore_merges and word.encode() in self._ids:
            return [self._ids[word.encode()]]
        symbols = [self._chars.get(char, GHOST + ord(char)) for char in word]
        ids: list[int] = []
        for id in merge(symbols, self.merges):
            data = chr(id - GHOST).encode() if id >= GHOST else b""
            if not data:
                ids.append(id)
            elif self.byte_ids.keys() >= set(data):
                ids += [self.byte_ids[byte] for byte in data]
            elif self.unk_id is None:
                raise ValueError(
                    f"word={word[:40]!r} needs {chr(id - GHOST)!r}, which is no token, "
                    "and there are neither byte tokens nor an unknown token to stand "
                    "for it; use a vocabulary that has them."
                )
            elif not (self.fuse_unk and ids[-1:] == [self.unk_id]):
                ids.append(self.unk_id)
        return ids

    def first_text(self, text: str) -> str:
        return text.removeprefix(" ") if self.prefix else text


def read_sentencepiece(data: bytes) -> SentencePieceTokenizer:
    """The tokenizer in a SentencePiece model file, as Llama 2's tokenizer.model.

    Control pieces become special tokens. SentencePiece never finds one in a text; where
    `encode` is allowed to, each stretch between two gets its own space in front.
    """
    model = fields(data)
    trainer, normalizer = (fields(b"".join(model.get(n, []))) for n in (2, 3))
    check_specification(trainer, normalizer)
    ids, ranks, byte_ids, added, unk_id = {}, {}, {}, [], None
    for id, piece in enumerate(map(fields, model.get(1, []))):
        name, kind = last(piece, 1, b"").decode(), last(piece, 3, NORMAL)
        text = name.replace(SPACE, " ")
        if kind == UNUSED or text in ids or " " in name:
            raise ValueError(
                f"piece {id}={name!r} is marked unused, is there twice or has a space, "
                "which is not supported; train the model without."
            )
        if kind == NORMAL:
            ids[text], ranks[id] = id, -struct.unpack("<f", last(piece, 2, bytes(4)))[0]
        elif kind == BYTE:
            byte_ids[int(name[1:-1], 16)] = id  # <0x0A>
        elif kind == USER_DEFINED:
            added.append(AddedToken(text, id, special=False, normalized=text))
        else:
            added.append(AddedToken(name, id))
            unk_id = id if kind == UNKNOWN else unk_id
    tokens = {id: text.encode() for text, id in ids.items()}
    symbol = lambda part: ids.get(part, GHOST + ord(part) if len(part) == 1 else None)
    tok = SentencePieceTokenizer(
        tokens | {id: bytes([byte]) for byte, id in byte_ids.items()},
        merges_of_ranks(ids, ranks, symbol),
        added,
        byte_ids=byte_ids,
        unk_id=unk_id,
        prefix="every" if last(normalizer, 3, 1) else None,
        collapse_spaces=bool(last(normalizer, 4, 1)),
    )
    special = tok.special_tokens.values()  # a negative id says that there is none
    bos_id, eos_id = last(trainer, 41, 1), last(trainer, 42, 2)
    tok.set_ends(
        bos_id if bos_id in special else None, eos_id if eos_id in special else None
    )
    return tok


def check_specification(
    trainer: Mapping[int, list], normalizer: Mapping[int, list]
) -> None:
    """Refuse a model that needs more than byte-pair encoding of the text as it is."""
    kind = MODELS.get(last(trainer, 3, 1))
    if kind != "bpe":
        raise ValueError(
            f"model_type={kind!r} of the SentencePiece model is not supported; only "
            "'bpe' is, which Llama 2 and Mistral have."
        )
    if last(normalizer, 2, b""):
        raise ValueError(
            f"normalizer {last(normalizer, 1, b'').decode()!r} of the SentencePiece "
            "model is not supported; only 'identity' is, as in Llama 2 and Mistral."
        )
    if last(trainer, 24, 0) or not last(normalizer, 5, 1):
        raise ValueError(
            "treat_whitespace_as_suffix=true or escape_whitespaces=false of the "
            "SentencePiece model is not supported; Llama 2 and Mistral have neither."
        )


def fields(data: bytes) -> dict[int, list]:
    """The fields of a protobuf message by number: integers as such, the rest as bytes.

    A message is a row of keys and values. A key holds the number of the field and, in
    its three lowest bits, how the value is written.

    Example:
        >>> fields(bytes([1 << 3 | 0, 0x96, 0x01, 2 << 3 | 2, 2]) + b"hi")
        {1: [150], 2: [b'hi']}
    """
    found: dict[int, list] = {}
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        if key & 7 == 0:
            value, at = varint(data, at)
        else:
            size, at = varint(data, at) if key & 7 == 2 else (SIZES.get(key & 7), at)
            if size is None or at + size > len(data):
                raise ValueError(
                    f"byte {at} of {len(data)} is no protobuf: the file is damaged or "
                    "no SentencePiece model; fetch it again."
                )
            value, at = data[at : at + size], at + size
        found.setdefault(key >> 3, []).append(value)
    return found


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at a place, in groups of 7 bits, lowest first; and where it ends."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, at + i + 1
    raise ValueError(
        f"byte {at} of {len(data)} begins a protobuf number without end: the file is "
        "damaged or no SentencePiece model; fetch it again."
    )


def last(message: Mapping[int, list], number: int, default: Any) -> Any:
    """The value of a field; of several, the last one counts."""
    return message.get(number, [default])[-1]
