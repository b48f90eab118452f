"""Added tokens: strings that have an id of their own, found before any merging.

Most are special: signals for the model such as "<|eot_id|>", which text must not become
by accident. The others are text that somebody wanted in one token, say "<think>".
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import regex


@dataclass(frozen=True)
class AddedToken:
    """A string and its id.

    Args:
        text: the string.
        id: its token.
        special: a signal, not text: encoded only where the caller allows it.
        lstrip: takes the white space before it along.
        rstrip: takes the white space behind it along.
        single_word: not where a letter, a digit or "_" touches it.
        normalized: how `Tokenizer.normalize` leaves it; then it is looked for after
            that step. None: looked for in the text as it came.
    """

    text: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: str | None = None


def cut(text: str, tokens: Mapping[str, AddedToken]) -> Iterator[str | int]:
    """Yield the stretches of plain text, and the ids of the tokens between them.

    Example:
        >>> list(cut("a<b>c", {"<b>": AddedToken("<b>", id=7)}))
        ['a', 7, 'c']
    """
    start = 0
    for match in any_of(tuple(tokens)).finditer(text) if tokens else ():
        token, at, end = tokens[match[0]], match.start(), match.end()
        touching = text[max(at - 1, 0) : at] + text[end : end + 1]
        if at < start or token.single_word and regex.search(r"\w", touching):
            continue
        plain = text[start:at]
        if token.lstrip:
            plain = regex.sub(r"(?r)\s+$", "", plain)  # (?r): from the end, in one pass
        if token.rstrip and (spaces := regex.compile(r"\s+").match(text, end)):
            end = spaces.end()
        if plain:
            yield plain
        yield token.id
        start = end
    if start < len(text):
        yield text[start:]


@lru_cache(maxsize=64)
def any_of(names: tuple[str, ...]) -> regex.Pattern:
    """Any of the names; where several begin, the longest."""
    longest_first = sorted(names, key=len, reverse=True)
    return regex.compile("|".join(map(regex.escape, longest_first)))
