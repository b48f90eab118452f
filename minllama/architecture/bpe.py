r"""Byte-pair encoding: cut a text into words, then join the best known pairs in each.

    "the theme"  ->  "the", " theme"            cut by a regular expression
                 ->  t h e, ␣ t h e m e         each word into its UTF-8 bytes
                 ->  (t, h) -> th, (th, e) -> the, ...     join a pair, and again
                 ->  [257, 259]                 until none is left that was learned

Training finds the pairs: join the most frequent one of the whole text, count again,
repeat. Encoding replays these merges in the order in which they were learned. The
surprising part is what it is not: no search for the fewest or the longest tokens. Both
would cut some words otherwise, and a model reads only the cut that it was trained on.

Paper: Sennrich et al. 2016, arXiv:1508.07909, section 3.2.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import AnyStr

import regex

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English endings: don|'t
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word, with the space or the sign before it
    r"|\p{N}{1,3}"  # digits, three at most
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # signs, with the line breaks after them
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"  # white space, but leave one space to the next word
)

Pair = tuple[int, int]
Merges = Mapping[Pair, tuple[float, int]]  # (left, right) -> (rank, joined)


def compile_pattern(pattern: str) -> regex.Pattern:
    """Compile a pattern, perhaps from a stranger's file; a bad one is a ValueError."""
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(
            f"pattern={pattern!r} is no regular expression ({error}); "
            "write it in the syntax of the regex package."
        ) from None


def split(text: str, pattern: regex.Pattern) -> Iterator[str]:
    """Cut `text` into the matches of `pattern` and what lies between; nothing is lost.

    Example:
        >>> list(split("don't stop", compile_pattern(LLAMA3_PATTERN)))
        ['don', "'t", ' stop']
    """
    end = 0
    for match in pattern.finditer(text):
        if match.start() > end:
            yield text[end : match.start()]
        if match[0]:
            yield match[0]
        end = match.end()
    if end < len(text):
        yield text[end:]


def merges_of_ranks(
    ids: Mapping[AnyStr, int],
    rank_of: Mapping[int, float],
    symbol: Callable[[AnyStr], int | None] | None = None,
) -> dict[Pair, tuple[float, int]]:
    """Any two tokens that make a third may be joined, with the rank of the third.

    This is what a vocabulary means that has ranks and lists no merges. `symbol` tells
    the id of a part of a token; by default the one in `ids`.

    Example:
        >>> merges_of_ranks({b"a": 0, b"b": 1, b"ab": 2}, {0: 0, 1: 1, 2: 2})
        {(0, 1): (2, 2)}
    """
    symbol, merges = symbol or ids.get, {}
    for token, id in ids.items():
        ranked = rank_of[id], id
        for cut in range(1, len(token)):
            left, right = symbol(token[:cut]), symbol(token[cut:])
            if left is not None and right is not None:
                merges[left, right] = ranked
    return merges


def merge_reference(ids: Sequence[int], merges: Merges) -> list[int]:
    """The definition: join the pair of lowest rank, the leftmost first; again.

    Example:
        >>> merge_reference([1, 2, 1, 2, 3], {(1, 2): (0, 4), (4, 3): (1, 5)})
        [4, 5]
    """
    ids = list(ids)
    while ranks := [
        (merges[pair][0], i) for i, pair in enumerate(pairwise(ids)) if pair in merges
    ]:
        _, i = min(ranks)
        ids[i : i + 2] = [merges[ids[i], ids[i + 1]][1]]
    return ids


def merge(ids: Sequence[int], merges: Merges) -> list[int]:
    """As `merge_reference`, in n log n steps: a heap of pairs over a linked list."""
    ids, n = list(ids), len(ids)
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))  # the neighbours
    heap: list[tuple[float, int, int]] = []  # rank, place, joined

    def consider(i: int, j: int) -> None:
        if i >= 0 and j < n and (found := merges.get((ids[i], ids[j]))):
            heappush(heap, (found[0], i, found[1]))

    for i in range(n - 1):
        consider(i, i + 1)
    while heap:
        _, i, joined = heappop(heap)
        j = after[i]
        if j == n or merges.get((ids[i], ids[j]), (0, -1))[1] != joined:
            continue  # one of the two was joined with its other neighbour since
        ids[i], ids[j] = joined, -1  # -1: no token any more
        after[i] = after[j]
        if after[i] < n:
            before[after[i]] = i
        consider(before[i], i)
        consider(i, after[i])
    return [token for token in ids if token >= 0]


def pairs(word: str) -> list[str]:
    """Each two neighbours: "abc" -> ["ab", "bc"]."""
    return [word[i : i + 2] for i in range(len(word) - 1)]


def join(word: str, pair: str, joined: str) -> tuple[str, list[str], list[str]]:
    """The word with the pair joined; the pairs it then lacks; those that it gains.

    Pairs away from the joined one do not change: a part is cut down to its two ends.

    Example:
        >>> join("banana", "an", "X")
        ('bXXa', ['ba', 'an', 'na', 'an', 'na'], ['bX', 'XX', 'Xa'])
    """
    parts = word.split(pair)
    ends = [part[:1] + part[-1:] if part[2:] else part for part in parts]
    return joined.join(parts), pairs(pair.join(ends)), pairs(joined.join(ends))


def learn_merges(
    words: Mapping[tuple[int, ...], int], n_merges: int, first_id: int
) -> list[Pair]:
    """Find the pairs to join; the k-th of them becomes the token `first_id + k`.

    Among equally frequent pairs the one with the smaller ids wins, so that the same
    words give the same merges on every machine. After a merge only the words that held
    the pair are counted anew.

    Args:
        words: each word as token ids, and how often it occurs.
        n_merges: how many pairs to find.
        first_id: the id of the first new token.

    Example:
        >>> learn_merges({(1, 2, 3): 5, (1, 2): 1, (2, 3): 4}, n_merges=2, first_id=10)
        [(2, 3), (1, 10)]
    """
    spelled = ["".join(map(chr, word)) for word in words]  # one character, one token:
    amounts = list(words.values())  # so that str.split finds a pair, and str.join joins
    counts, where = Counter(), defaultdict(set)  # of a pair: how often, in which words
    for i, word in enumerate(spelled):
        for pair in pairs(word):
            counts[pair] += amounts[i]
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapify(heap)
    merges: list[Pair] = []
    while heap and len(merges) < n_merges:
        count, pair = heappop(heap)
        if -count != counts[pair]:  # other merges took some of its occurrences since
            if counts[pair]:
                heappush(heap, (-counts[pair], pair))
            continue
        joined, fresh = chr(first_id + len(merges)), set()
        for i in where.pop(pair):
            spelled[i], lost, gained = join(spelled[i], pair, joined)
            for old in lost:
                counts[old] -= amounts[i]
            for new in gained:
                counts[new] += amounts[i]
                if joined in new:
                    where[new].add(i)
                    fresh.add(new)
        for new in fresh:
            heappush(heap, (-counts[new], new))
        merges.append((ord(pair[0]), ord(pair[1])))
    if len(merges) < n_merges:
        raise ValueError(
            f"n_merges={n_merges} is more than these words hold: after {len(merges)} "
            "each of them is one token; give more text, or ask for fewer tokens."
        )
    return merges
