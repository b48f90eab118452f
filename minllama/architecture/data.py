"""Text to batches: documents, packed side by side with their borders.

    documents   [begin a b c end] [begin d e end] [begin f g h i end] …
    a row       begin a b c | begin f g h i | …     inputs (T)
                a b c end   | f g h i end   | …     targets (T), one token ahead
                0 1 2 3     | 0 1 2 3 4     | …     positions restart: `packed`

Rows are filled by best fit: a document goes where it leaves the smallest hole, so that
few are cut and little is padding. Only a document longer than a row is cut.
Paper: Ding et al. 2024, "Fewer truncations improve language modeling", 2404.10830.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minllama.architecture.layout import Layout, packed
from minllama.architecture.tokenizer import Tokenizer

SEPARATOR = "<|endoftext|>"
IGNORE = -100  # targets that do not count: padding, prompts
OPEN_ROWS = 512  # rows that wait for a document that fits
MARKED = np.dtype([("id", np.int64), ("learned", np.bool_)])  # a token of `mark`


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens, what follows each, and where it stands in its document."""

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64; IGNORE where nothing is learned
    positions: Tensor  # (B, T) int64

    @property
    def layout(self) -> Layout | None:
        """Who sees whom."""
        return packed(self.positions)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        parts = (self.tokens, self.targets, self.positions)
        return type(self)(*(part.to(device, non_blocking=True) for part in parts))

    def counted(self) -> Tensor:
        """How many targets count, as a 0-d tensor."""
        return (self.targets != IGNORE).sum()


class SingleBatch(Batch):
    """One document a row, from its first token on, and padding behind.

    So a plain triangle will do, for which attention is fastest: what padding sees
    changes no loss.
    """

    @property
    def layout(self) -> None:
        return None


def read_documents(path: str | Path) -> list[str]:
    """The documents of a UTF-8 file, or of all files in a folder, in order of names.

    `<|endoftext|>` separates documents within a file; blank ones are dropped.

    Raises:
        ValueError: nothing there, no UTF-8, or no text.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(
            f"{path} does not exist; give a text file or a folder of them."
        )
    files = _files(path) if path.is_dir() else [path]
    documents = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8-sig")  # Windows begins with a mark
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file} is no UTF-8 text (byte {error.start}); convert it, or leave "
                "it out of the folder."
            ) from None
        documents += [part.strip() for part in text.split(SEPARATOR) if part.strip()]
    if not documents:
        raise ValueError(
            f"{path} holds no text; give a file with at least one document."
        )
    return documents


def _files(folder: Path) -> list[Path]:
    """All files below a folder, but none that is hidden or in a hidden folder."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    seen = [path for path in found if not any(p.startswith(".") for p in path.parts)]
    return [folder / path for path in sorted(seen)]


def encode_documents(documents: Iterable[str], tok: Tokenizer) -> list[np.ndarray]:
    """Ids of each document, between its begin and its end token."""
    begin = [] if tok.bos_id is None else [tok.bos_id]
    end = [] if tok.eos_id is None else [tok.eos_id]
    return [np.array(begin + tok.encode(text) + end, np.int64) for text in documents]


def mark(ids: Sequence[int], learned: Sequence[bool]) -> np.ndarray:
    """A document of which only some tokens are targets. (n,), (n,) -> (n,) of MARKED.

    Example:
        >>> prompt, answer = [5, 6], [7, 8]
        >>> make_batch([[mark(prompt + answer, [False, False, True, True])]], 3).targets
        tensor([[-100,    7,    8]])
    """
    document = np.empty(len(ids), MARKED)
    document["id"], document["learned"] = ids, learned
    return document


class PackedBatches:
    """Endless batches of packed documents; the order of each epoch is its seed's.

    Iterating goes on where it stopped: `state_dict` and `load_state_dict` make a run
    resume with the very batch that would have come.

    Args:
        documents: ids of each, begin and end tokens included (`encode_documents`); or
            marked ones (`mark`), of which only the marked tokens are learned.
        batch_size: rows of a batch, B, over all ranks together.
        seq_len: tokens of a row, T.
        seed: of the shuffles.
        rank: this process takes rows rank, rank + world, … of each batch.
        world: number of processes; batch_size must be a multiple of it.

    Raises:
        ValueError: no document of two tokens, or sizes that do not fit.
    """

    def __init__(
        self,
        documents: list[np.ndarray],
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.documents = [ids for ids in documents if len(ids) > 1]
        if not self.documents:
            raise ValueError(
                "no document has two tokens, so there is nothing to predict; give text."
            )
        if batch_size < 1 or seq_len < 1:
            raise ValueError(
                f"batch_size={batch_size} and seq_len={seq_len} must be at least 1."
            )
        if batch_size % world:
            raise ValueError(
                f"batch_size={batch_size} is no multiple of world={world}; each "
                "process takes the same number of rows."
            )
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed
        self.rank, self.world = rank, world
        self.epoch, self.batch = 0, 0  # of the batch that comes next
        self._rows: tuple[int, list] | None = None

    def state_dict(self) -> dict:
        """Where the iteration stands."""
        return {"epoch": self.epoch, "batch": self.batch, "seed": self.seed}

    def load_state_dict(self, state: dict) -> None:
        """Go on from there.

        Raises:
            ValueError: the state was made with another seed.
        """
        if state["seed"] != self.seed:
            raise ValueError(
                f"state has seed={state['seed']}, these batches seed={self.seed}; "
                "resume with the seed that the run was started with."
            )
        self.epoch, self.batch = state["epoch"], state["batch"]

    def batches_per_epoch(self) -> int:
        """Batches of the present epoch; rows are packed anew, so epochs may differ."""
        rows = self._epoch_rows()
        return max(1, len(rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield next(self)

    def __next__(self) -> Batch:
        rows = self._epoch_rows()
        at = self.batch * self.batch_size
        taken = [rows[(at + i) % len(rows)] for i in range(self.batch_size)]
        self.batch += 1
        if self.batch >= self.batches_per_epoch():
            self.epoch, self.batch = self.epoch + 1, 0
        return self.lay_out(taken[self.rank :: self.world])

    def arrange(self, documents: list[np.ndarray]) -> Iterable[list[np.ndarray]]:
        """Seam: which documents share a row."""
        return best_fit(documents, self.seq_len)

    def lay_out(self, rows: list[list[np.ndarray]]) -> Batch:
        """Seam: rows to tensors."""
        return make_batch(rows, self.seq_len)

    def _epoch_rows(self) -> list[list[np.ndarray]]:
        """All rows of the epoch, each a list of documents. Made once an epoch."""
        if self._rows is None or self._rows[0] != self.epoch:
            order = np.random.default_rng([self.seed, self.epoch])
            shuffled = [
                self.documents[i] for i in order.permutation(len(self.documents))
            ]
            rows = list(self.arrange(shuffled))
            order.shuffle(rows)  # type: ignore[arg-type]
            self._rows = (self.epoch, rows)
        return self._rows[1]


def best_fit(
    documents: Iterable[np.ndarray], seq_len: int
) -> Iterator[list[np.ndarray]]:
    """Rows of documents, each with at most seq_len inputs.

    A document of n tokens has n - 1 inputs. Longer ones are cut; the cut pieces share
    a token, so that no target is lost.

    Example:
        >>> docs = [np.arange(n) for n in (5, 4, 3)]
        >>> [[len(d) - 1 for d in row] for row in best_fit(docs, 6)]
        [[4, 2], [3]]
    """
    rows: list[list[np.ndarray]] = []
    space: list[tuple[int, int]] = []  # (free inputs, row), sorted
    for document in documents:
        for start in range(0, len(document) - 1, seq_len):
            piece = document[start : start + seq_len + 1]
            at = bisect_left(space, (len(piece) - 1, -1))
            if at < len(space):
                free, row = space.pop(at)
            else:
                free, row = seq_len, len(rows)
                rows.append([])
            rows[row].append(piece)
            if free > len(piece) - 1:
                insort(space, (free - len(piece) + 1, row))
            if len(space) > OPEN_ROWS:
                space.pop(0)  # the fullest row will wait no longer
    yield from rows


def make_batch(rows: list[list[np.ndarray]], seq_len: int) -> Batch:
    """Lay rows of documents out as tensors; what is left of a row is padding."""
    tokens = np.zeros((len(rows), seq_len), np.int64)
    targets = np.full((len(rows), seq_len), IGNORE, np.int64)
    positions = np.zeros((len(rows), seq_len), np.int64)
    for row, documents in enumerate(rows):
        at = 0
        for document in documents:
            ids, learned = _unmark(document)
            end = at + len(ids) - 1
            tokens[row, at:end] = ids[:-1]
            targets[row, at:end] = np.where(learned[1:], ids[1:], IGNORE)
            positions[row, at:end] = np.arange(end - at)
            at = end
        positions[row, at:] = np.arange(seq_len - at)
    parts = (torch.from_numpy(part) for part in (tokens, targets, positions))
    alone = all(len(documents) == 1 for documents in rows)
    return (SingleBatch if alone else Batch)(*parts)


def _unmark(document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids, and which of them are learned: all, if nothing is said."""
    if document.dtype == MARKED:
        return document["id"], document["learned"]
    return document, np.ones(len(document), np.bool_)
