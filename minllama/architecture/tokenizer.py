"""Text to token ids and back: byte-level byte-pair encoding, as in Llama 3 and Qwen.

Since its alphabet is the 256 bytes, every text has an encoding, decoding gives exactly
that text back, and there is no unknown token. Two facts surprise. A token need not be
whole characters: a model may well emit half an emoji, so text is shown through a
`StreamDecoder`. And special tokens are not text: no string that a user types becomes
one, and `decode` shows none, unless the caller asks for it.

Beside this file: bpe.py makes tokens of words, chat.py text and special tokens of
conversations; sentencepiece.py is Llama 2's kind, tokenizer_files.py reads them all.
Paper: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners",
section 2.2.
"""

import codecs
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from minllama.architecture.added_tokens import AddedToken, cut
from minllama.architecture.bpe import (
    LLAMA3_PATTERN,
    Merges,
    compile_pattern,
    learn_merges,
    merge,
    split,
)
from minllama.architecture.chat import Special, chat_parts, format_of

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3)),  # free for your own use
)
BEGIN_TOKENS = ("<|begin_of_text|>", "<s>")  # the usual names, in this order
END_TOKENS = ("<|end_of_text|>", "</s>", "<|endoftext|>")
TURN_TOKENS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>")  # end a turn, not the text

UnicodeForm = Literal["NFC", "NFD", "NFKC", "NFKD"]
CACHED_WORDS, LONGEST_CACHED = 2**17, 64  # entries; characters


class Tokenizer:
    """Text to token ids and back.

    Example:
        >>> tok = Tokenizer.train(["low lower lowest"] * 9, vocab_size=256 + 3 + 8)
        >>> [tok.token_bytes(id) for id in tok.encode("lower")]
        [b'low', b'e', b'r']
        >>> tok.decode(tok.encode("über 🦙"))
        'über 🦙'

    Args:
        tokens: the bytes of each ordinary token by its id.
        merges: the pairs to join, with rank and result; equal ranks go left to right.
        added: special tokens, and others that are found before merging.
        patterns: each cuts what the one before left, into its matches and the rest.
        ignore_merges: a word that is a token becomes that token, merges or not.
        unicode_form: "NFC", "NFKC", ...: applied first, so decoding gives that form.
        prefix_space: a text gets a space in front if it has none.
    """

    def __init__(
        self,
        tokens: Mapping[int, bytes],
        merges: Merges,
        added: Iterable[AddedToken] = (),
        patterns: Iterable[str] = (LLAMA3_PATTERN,),
        *,
        ignore_merges: bool = False,
        unicode_form: UnicodeForm | None = None,
        prefix_space: bool = False,
    ) -> None:
        self.added = tuple(added)
        self.tokens = {**tokens, **{t.id: t.text.encode() for t in self.added}}
        self.special_tokens = {t.text: t.id for t in self.added if t.special}
        self.merges, self.patterns = merges, tuple(patterns)
        self.ignore_merges, self.prefix_space = ignore_merges, prefix_space
        self.unicode_form: UnicodeForm | None = unicode_form
        self.vocab_size = max(self.tokens, default=-1) + 1  # rows of an embedding
        self.set_ends(self._known(BEGIN_TOKENS), self._known(END_TOKENS))
        self._ids = {data: id for id, data in tokens.items()}
        self._splitters = [compile_pattern(pattern) for pattern in self.patterns]
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special_tokens: Iterable[str] = SPECIAL_TOKENS,
        pattern: str = LLAMA3_PATTERN,
    ) -> "Tokenizer":
        """Learn a vocabulary: the 256 bytes, the merges, and last the special tokens.

        The special tokens count within `vocab_size`. Take them out of the texts: here
        they would be learned like any other word.
        """
        special_tokens = tuple(special_tokens)
        n_merges = vocab_size - 256 - len(special_tokens)
        if n_merges < 0:
            raise ValueError(
                f"vocab_size={vocab_size} has no room for 256 bytes and "
                f"{len(special_tokens)} special tokens; ask for at least "
                f"{256 + len(special_tokens)}."
            )
        if len(set(special_tokens)) < len(special_tokens) or "" in special_tokens:
            raise ValueError(
                f"special_tokens={special_tokens} must be distinct and not empty."
            )
        if isinstance(texts, str):
            raise ValueError(f"texts={texts[:20]!r} is one text; give a list of them.")
        splitter, words = compile_pattern(pattern), Counter()
        for text in texts:
            words.update(split(checked(text), splitter))
        spelled = {tuple(word.encode()): count for word, count in words.items()}
        tokens, merges = {byte: bytes([byte]) for byte in range(256)}, {}
        for rank, (a, b) in enumerate(learn_merges(spelled, n_merges, first_id=256)):
            tokens[256 + rank] = tokens[a] + tokens[b]
            merges[a, b] = rank, 256 + rank
        added = [AddedToken(t, i) for i, t in enumerate(special_tokens, len(tokens))]
        return cls(tokens, merges, added, [pattern])

    @staticmethod
    def from_pretrained(name: str | Path) -> "Tokenizer":
        """Read the tokenizer of a shipped model ("stories"), of a folder, or of a file.

        Known are `tokenizer.json` (Hugging Face: Llama, Mistral, Qwen, GPT-2),
        `tokenizer.model` (Meta: Llama 3's ranks, Llama 2's SentencePiece), and GPT-2's
        pair `vocab.json` and `merges.txt`, or `encoder.json` and `vocab.bpe`.
        """
        from minllama.architecture.tokenizer_files import read_tokenizer

        return read_tokenizer(name)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, which `tokenizers` and `transformers` read as well.

        As with Llama 3's file, their `encode` begins with the bos token; ours if asked.
        """
        from minllama.architecture.tokenizer_save import write_tokenizer

        write_tokenizer(self, folder)

    def set_ends(
        self, bos_id: int | None, eos_id: int | None, stop_ids: Iterable[int] = ()
    ) -> None:
        """State which tokens begin and end a text, where their names do not tell.

        `stop_ids` end it as well, as do all tokens that are named like an end.
        """
        for id in (bos_id, eos_id, *stop_ids):
            if id is not None:
                self.token_bytes(id)
        by_name = map(self.special_tokens.get, END_TOKENS + TURN_TOKENS)
        self.bos_id, self.eos_id = bos_id, eos_id
        self.stop_ids = tuple(sorted({*stop_ids, eos_id, *by_name} - {None}))

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for; of a special one, those of its name."""
        try:
            return self.tokens[int(id)]
        except KeyError:
            raise ValueError(
                f"id={int(id)} is none of the {len(self.tokens)} tokens, whose largest "
                f"id is {self.vocab_size - 1}; is this the tokenizer of the model?"
            ) from None

    def encode(
        self,
        text: str,
        bos: bool = False,
        eos: bool = False,
        allowed_special: Iterable[str] = (),
    ) -> list[int]:
        """Text to ids.

        Args:
            text: special tokens that it spells are plain text, so that no user can
                forge a turn.
            bos: begin with the token that begins a text.
            eos: end with the token that ends one.
            allowed_special: names of special tokens that `text` may spell, or "all".
        """
        everything = self.special_tokens.keys()
        allowed = everything if allowed_special == "all" else {*allowed_special}
        if allowed - everything:
            raise ValueError(
                f"allowed_special={allowed_special!r} holds what is no special token; "
                f'give "all" or some of {list(self.special_tokens)[:20]}.'
            )
        ids = [self._required("bos_id")] if bos else []
        ids += self._encode_text(text, allowed)
        return ids + [self._required("eos_id")] if eos else ids

    def encode_chat(
        self,
        messages: Iterable[Mapping[str, str]],
        add_generation_prompt: bool = True,
        format: str | None = None,
    ) -> list[int]:
        """A conversation to ids, in a format of chat.py.

        Args:
            messages: {"role": "user", "content": "..."} and so on.
            add_generation_prompt: end where the assistant's answer begins.
            format: "llama2", "llama3" or "chatml". None: what the special tokens say.
        """
        format = format or format_of(self.special_tokens)
        ids: list[int] = []
        for part in chat_parts(messages, add_generation_prompt, format):
            if not isinstance(part, Special):
                ids += self._encode_text(part, first=not ids)
            elif part in self.special_tokens:
                ids.append(self.special_tokens[part])
            else:
                raise ValueError(
                    f"format={format!r} needs {str(part)!r}, which is none of the "
                    f"special tokens {list(self.special_tokens)[:20]}; use the format "
                    "that the model was trained on."
                )
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Ids to text. Special tokens are left out, or shown by name.

        Bytes that are no UTF-8 become U+FFFD, the replacement character.
        """
        decoder = self.stream_decoder(skip_special)
        return decoder.feed(*ids) + decoder.flush()

    def stream_decoder(self, skip_special: bool = True) -> "StreamDecoder":
        """A decoder to feed token by token, as a model generates them."""
        return StreamDecoder(self, skip_special)

    def normalize(self, text: str) -> str:
        """Seam: what happens to a stretch of text before it is cut into words."""
        form = self.unicode_form
        return unicodedata.normalize(form, text) if form else text

    def words(self, text: str, first: bool) -> Iterable[str]:
        """Seam: cut text into the words that no merge crosses.

        `first` says that nothing comes before this text, no token either.
        """
        pieces = [" " + text if self.prefix_space and text[:1] != " " else text]
        for splitter in self._splitters:
            pieces = [word for piece in pieces for word in split(piece, splitter)]
        return pieces

    def encode_word(self, word: str) -> list[int]:
        """Seam: the ids of one word."""
        data = word.encode()
        if self.ignore_merges and data in self._ids:
            return [self._ids[data]]
        try:
            ids = [self._ids[data[i : i + 1]] for i in range(len(data))]
        except KeyError as missing:
            raise ValueError(
                f"word={word[:40]!r} needs the byte {missing}, which this vocabulary "
                "lacks; only one with all 256 bytes can encode every text."
            ) from None
        return merge(ids, self.merges)

    def first_text(self, text: str) -> str:
        """Seam: the beginning of a decoded text, less what encoding put there."""
        return text

    def _encode_text(
        self, text: str, allowed: Iterable[str] = (), first: bool = True
    ) -> list[int]:
        """Ids of a text in which the `allowed` special tokens may occur."""
        wanted = [t for t in self.added if not t.special or t.text in allowed]
        typed = {t.text: t for t in wanted if t.normalized is None}
        normal = {t.normalized: t for t in wanted if t.normalized is not None}
        ids: list[int] = []
        for stretch in cut(checked(text), typed):
            if isinstance(stretch, int):
                ids.append(stretch)
                continue
            for piece in cut(self.normalize(stretch), normal):
                if isinstance(piece, int):
                    ids.append(piece)
                    continue
                for word in self.words(piece, first and not ids):
                    ids += self._cache.get(word) or self._remember(word)
        return ids

    def _remember(self, word: str) -> list[int]:
        """`encode_word`, kept: most words of a text have occurred in it before."""
        ids = self.encode_word(word)
        if len(word) <= LONGEST_CACHED:
            if len(self._cache) >= CACHED_WORDS:
                self._cache.clear()
            self._cache[word] = ids
        return ids

    def _known(self, names: Iterable[str]) -> int | None:
        """The first of these names that is a special token here."""
        found = [
            self.special_tokens[name] for name in names if name in self.special_tokens
        ]
        return found[0] if found else None

    def _required(self, name: str) -> int:
        id = getattr(self, name)
        if id is None:
            raise ValueError(
                f"{name}=None: this tokenizer has no such token; encode without it."
            )
        return id


class StreamDecoder:
    """Text from tokens as they come, never in the middle of a character.

    All pieces joined, `flush` included, are what `decode` gives for all ids at once.

    Example:
        >>> tok = Tokenizer.train([""], vocab_size=256, special_tokens=[])
        >>> decoder = tok.stream_decoder()
        >>> [decoder.feed(byte) for byte in "né".encode()], decoder.flush()
        (['n', '', 'é'], '')
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        special = tokenizer.special_tokens.values()
        self.tokenizer, self.first = tokenizer, True
        self.skipped = frozenset(special if skip_special else ())
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, *ids: int) -> str:
        """The characters that these tokens complete."""
        shown = [id for id in map(int, ids) if id not in self.skipped]
        return self._text(b"".join(map(self.tokenizer.token_bytes, shown)))

    def flush(self) -> str:
        """What is left at the end: half a character becomes U+FFFD."""
        return self._text(b"", final=True)

    def _text(self, data: bytes, final: bool = False) -> str:
        text = self.utf8.decode(data, final)
        if self.first and text:
            self.first, text = False, self.tokenizer.first_text(text)
        return text


def checked(text: str) -> str:
    """`text`, if it is text: half a surrogate pair has no UTF-8, hence no tokens."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text[{error.start}]={text[error.start]!r} is half a surrogate pair, "
            'which has no UTF-8; repair it: text.encode("utf-16", "surrogatepass")'
            '.decode("utf-16", "replace").'
        ) from None
    return text
