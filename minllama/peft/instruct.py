"""Conversations to documents of which only the answers are learned.

    <|start_header_id|>user<|end_header_id|>  Why?  <|eot_id|>      read
    <|start_header_id|>assistant<|end_header_id|>                   read
    Because.  <|eot_id|>                                            learned

The questions are read but not learned: a model that learns to ask wastes its step on
text that a user will write. The token that ends a turn is learned with each answer, or
the model would never stop. Every answer of a conversation counts, not the last alone,
so a conversation of five turns costs one pass and not five.

A model that was never taught to converse knows no special tokens (their rows of the
embedding are as they were drawn, and adapters leave them so): the format "plain" says
the same in words, and ends an answer with the token that ends a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minllama.architecture.chat import FORMATS, format_of
from minllama.architecture.data import mark
from minllama.architecture.tokenizer import Tokenizer
from minllama.peft.records import Conversation, Messages, Preference

PLAIN = "plain"
LABELS = {"system": "", "user": "Question: ", "ipython": "Result: "}


@dataclass(frozen=True)
class Encoded:
    """Documents for `PackedBatches`, and what gave way to the length of a row."""

    documents: list  # of marked arrays; of pairs of them, for preferences
    cut: int = 0  # lost the end of an answer
    dropped: int = 0  # their questions alone fill a row


def check_format(format: str | None, tok: Tokenizer) -> str:
    """That format, if the tokenizer can write it; None: the one of its special tokens.

    Raises:
        ValueError: no such format.
    """
    format = format or format_of(tok.special_tokens) or PLAIN
    if format not in (PLAIN, *FORMATS):
        raise ValueError(
            f"format={format!r} must be one of {', '.join((PLAIN, *FORMATS))}."
        )
    return format


def encode_conversation(
    messages: Messages, tok: Tokenizer, format: str | None = None, since: int = 0
) -> np.ndarray:
    """One marked document: all of the conversation, its answers learned. (n,)

    Args:
        messages: with roles system, user, assistant, ipython.
        tok: its special tokens mark the turns.
        format: "plain" or a chat format; None: the one of the tokenizer.
        since: answers before this message are read, not learned.

    Example:
        >>> tok = Tokenizer.from_pretrained("stories-mini")
        >>> talk = [{"role": "user", "content": "Why?"},
        ...         {"role": "assistant", "content": "It rains."}]
        >>> document = encode_conversation(talk, tok, "plain")
        >>> tok.decode(document["id"][document["learned"]], skip_special=False)
        ' It rains.<|end_of_text|>'
    """
    format = check_format(format, tok)
    if format == PLAIN:
        return _encode_plain(messages, tok, since)
    ids = tok.encode_chat(messages, add_generation_prompt=False, format=format)
    learned = np.zeros(len(ids), np.bool_)
    for at, message in enumerate(messages):
        if message["role"] == "assistant" and at >= since:
            asked = tok.encode_chat(messages[:at], True, format)
            said = tok.encode_chat(messages[: at + 1], False, format)
            begin, end = _common(asked, ids), _common(said, ids)
            while end > begin and ids[end - 1] not in tok.stop_ids:
                end -= 1  # the line feed after ChatML's end of turn
            learned[begin:end] = True
    return mark(ids, learned)  # type: ignore[arg-type]


def _encode_plain(messages: Messages, tok: Tokenizer, since: int) -> np.ndarray:
    """Question: Why?⏎Answer: Because.<end>, and so on; a system message stands bare."""
    ids = [] if tok.bos_id is None else [tok.bos_id]
    learned = [False] * len(ids)
    end = [] if tok.eos_id is None else [tok.eos_id]
    for at, message in enumerate(messages):
        text = message["content"].strip()
        if message["role"] == "assistant":
            prompt, answer = tok.encode("Answer:"), tok.encode(" " + text) + end
        else:
            prompt, answer = tok.encode(f"{LABELS[message['role']]}{text}\n"), []
        ids += prompt + answer
        learned += [False] * len(prompt) + [at >= since] * len(answer)
    return mark(ids, learned)


def encode_conversations(
    conversations: Sequence[Conversation],
    tok: Tokenizer,
    seq_len: int,
    format: str | None = None,
) -> Encoded:
    """Marked documents of at most seq_len inputs each, so that no row cuts them.

    Raises:
        ValueError: a conversation that the format cannot express, with file and line;
            or every one of them is too long.
    """
    whole = []
    for talk in conversations:
        try:
            whole.append(encode_conversation(talk.messages, tok, format))
        except ValueError as error:
            raise ValueError(f"{talk.where}: {error}") from None
    fitted = [document[: seq_len + 1] for document in whole]
    kept = [document for document in fitted if document["learned"][1:].any()]
    if not kept:
        raise ValueError(
            f"seq_len={seq_len}: the questions of all {len(whole)} conversations are "
            "longer; give more room (--seq-len)."
        )
    shorter = sum(len(a) < len(b) for a, b in zip(fitted, whole))
    dropped = len(whole) - len(kept)
    return Encoded(kept, cut=shorter - dropped, dropped=dropped)


def encode_preferences(
    preferences: Sequence[Preference],
    tok: Tokenizer,
    seq_len: int,
    format: str | None = None,
) -> Encoded:
    """Pairs (chosen, rejected) of marked documents; only the answers are marked.

    Strings are texts as they stand, begin token in front and end token behind;
    messages get the format.

    Raises:
        ValueError: as `encode_conversations`.
    """
    pairs, cut = [], 0
    for preference in preferences:
        try:
            both = [
                _encode_answer(preference.prompt, answer, tok, format)
                for answer in (preference.chosen, preference.rejected)
            ]
        except ValueError as error:
            raise ValueError(f"{preference.where}: {error}") from None
        fitted = tuple(document[: seq_len + 1] for document in both)
        if all(document["learned"][1:].any() for document in fitted):
            pairs.append(fitted)
            cut += any(len(a) < len(b) for a, b in zip(fitted, both))
    if not pairs:
        raise ValueError(
            f"seq_len={seq_len}: the prompts of all {len(preferences)} preferences are "
            "longer; give more room (--seq-len)."
        )
    return Encoded(pairs, cut=cut, dropped=len(preferences) - len(pairs))


def _encode_answer(prompt, answer, tok: Tokenizer, format: str | None) -> np.ndarray:
    if not isinstance(prompt, str):
        return encode_conversation([*prompt, *answer], tok, format, since=len(prompt))
    begin = tok.encode(prompt, bos=tok.bos_id is not None)
    end = tok.encode(answer, eos=tok.eos_id is not None)
    return mark(begin + end, [False] * len(begin) + [True] * len(end))


def _common(a: list[int], b: list[int]) -> int:
    """How many ids two lists begin with in common."""
    pairs = enumerate(zip(a, b))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
