"""Talk with a model: a session whose cache lives on from turn to turn.

A turn costs only its own tokens. The session compares what the conversation now reads,
token by token, with what stands in the cache, keeps the common beginning, and feeds the
rest; so a changed or shortened conversation needs no special case.

A model that was taught to converse gets its chat format. Any other, `stories` among
them, is a storyteller: it goes on from what you write, and you from what it writes.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from minllama.architecture.generate import Sampling, decode, read_out
from minllama.architecture.model import MinimalLlama
from minllama.architecture.tokenizer import TURN_TOKENS, Tokenizer
from minllama.recipes.devices import check_device
from minllama.recipes.generate import tokenizer_of

HELP = "/reset begins anew · /save FILE writes the text · /help · /quit"


class Session:
    """One conversation, or one story told by two.

    Args:
        model: gives the logits.
        tok: its tokenizer.
        how: how tokens are chosen.
        chat: use the tokenizer's chat format; False: plain continuation.
        system: what the assistant is told before the first turn (chat only).
        max_new_tokens: most tokens of an answer.
    """

    def __init__(
        self,
        model: MinimalLlama,
        tok: Tokenizer,
        how: Sampling,
        chat: bool,
        system: str | None = None,
        max_new_tokens: int = 256,
    ) -> None:
        self.model, self.tok, self.how, self.chat = model, tok, how, chat
        self.system, self.max_new_tokens = system, max_new_tokens
        self.context = model.config.max_seq_len
        self.caches = model.new_caches(1, self.context)
        self.reset()

    def reset(self) -> None:
        """Forget all but the system's words."""
        self.messages = []
        if self.system:
            self.messages.append({"role": "system", "content": self.system})
        self.story: list[int] = []  # ids, where there is no chat format
        self.text = ""  # of the story, as both wrote it
        self.cached: list[int] = []  # ids whose keys and values stand in the cache
        self.turns = 0

    def say(self, text: str) -> Iterator[str]:
        """Your turn; then the model's, piece by piece. Stop asking to interrupt it.

        Raises:
            ValueError: your text alone does not fit the context.
        """
        ids = self._read_turn(text)
        keep = min(common_prefix(self.cached, ids), len(ids) - 1)
        self.caches.length = keep  # what stood behind is written over
        self.cached = ids[:keep]
        device = self.model.embed_tokens.weight.device
        how = self.how
        if how.seed is not None:
            how = replace(how, seed=how.seed + self.turns)
        self.turns += 1
        new = torch.tensor([ids[keep:]], device=device)
        steps = decode(self.model, new, self.caches, how)
        answer: list[int] = []
        pieces: list[str] = []
        try:
            most = min(self.max_new_tokens, self.context - len(ids))
            fed = self._feed(steps, ids, answer, most)
            for piece in read_out(self.tok, fed, self._stops):
                pieces.append(piece)
                yield piece
        finally:
            self._write_turn(answer, "".join(pieces))

    @property
    def _stops(self) -> tuple[int, ...]:
        extra = self.tok.stop_ids if self.chat else ()
        return (*self.model.config.eos_ids, *extra)

    def _feed(
        self, steps: Iterator, ids: list[int], answer: list[int], most: int
    ) -> Iterator[int]:
        """Ids of the answer; each stands in the cache once the next was asked for."""
        for _ in range(most):
            token = int(next(steps))
            self.cached = ids + answer
            answer.append(token)
            yield token

    def _read_turn(self, text: str) -> list[int]:
        """Ids of the conversation up to where the model's turn begins."""
        if not self.chat:
            bos = not self.story and self.tok.bos_id is not None
            story = self.story + self.tok.encode(text, bos=bos)
            self._check_room(len(story), text)
            self.story, self.text = story, self.text + text
            return story[:]
        first = 1 if self.system else 0
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.tok.encode_chat(messages)
        while len(ids) >= self.context and len(messages) > first + 2:
            del messages[first : first + 2]  # the oldest question and its answer
            ids = self.tok.encode_chat(messages)
        self._check_room(len(ids), text)
        self.messages = messages
        return ids

    def _check_room(self, used: int, text: str) -> None:
        if used >= self.context:
            raise ValueError(
                f"{used} tokens leave no room in a context of {self.context}; begin "
                f"anew with /reset{'' if len(text) < 200 else ', and write less'}."
            )

    def _write_turn(self, answer: list[int], text: str) -> None:
        if self.chat:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.story += [token for token in answer if token not in self._stops]
            self.text += text

    def transcript(self) -> str:
        """What was said so far, to be read by a person."""
        if not self.chat:
            return self.text + "\n"
        lines = (f"{turn['role']}: {turn['content']}" for turn in self.messages)
        return "\n\n".join(lines) + "\n"


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many ids two lists begin with in common.

    Example:
        >>> common_prefix([5, 6, 7], [5, 6, 8, 9])
        2
    """
    pairs = enumerate(zip(a, b))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def converses(model: MinimalLlama, tok: Tokenizer) -> bool:
    """True if the model ends its turns: then it was taught a chat format."""
    ends = {tok.special_tokens.get(name) for name in TURN_TOKENS}
    return bool(ends & set(model.config.eos_ids))


def chat_with(
    model: str = "stories",
    how: Sampling | None = None,
    system: str | None = None,
    chat: bool = False,
    max_new_tokens: int = 256,
    device: str | None = None,
) -> None:
    """Read lines, answer them, until the end of input.

    Args:
        model: a shipped name or a folder.
        how: how tokens are chosen; None: temperature 0.8, top-p 0.95.
        system: what the assistant is told first.
        chat: use the chat format although the model's files do not say that it knows
            one (Llama 2 Chat).
        max_new_tokens: most tokens of an answer.
        device: None: the fastest there is.

    Raises:
        ValueError: no such model.
    """
    llama = MinimalLlama.from_pretrained(model, device=check_device(device))
    tok = tokenizer_of(model)
    talks = chat or converses(llama, tok)
    how = how or Sampling(temperature=0.8, top_p=0.95)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    session = Session(llama, tok, how, talks, system, max_new_tokens)
    if talks:
        print(f"{model}. {HELP}")
    else:
        print(f"{model} goes on from what you write. {HELP}")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.startswith("/"):
            if not run_command(session, line):
                return
        elif line:
            answer(session, line)


def answer(session: Session, line: str) -> None:
    """Print the model's turn; Ctrl-C ends it, not the session."""
    story = not session.chat and session.text[-1:] not in ("", "\n", " ")
    turn = session.say(" " + line if story else line)
    try:
        for piece in turn:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        turn.close()  # type: ignore[attr-defined]
    except ValueError as error:
        print(f"minllama: {error}", end="")
    print()


def run_command(session: Session, line: str) -> bool:
    """Do what a line that begins with / says; False ends the session."""
    name, _, argument = line.partition(" ")
    if name == "/quit":
        return False
    if name == "/reset":
        session.reset()
        print("begun anew")
    elif name == "/save" and argument.strip():
        path = Path(argument.strip()).expanduser()
        try:
            path.write_text(session.transcript(), encoding="utf-8")
            print(f"saved to {path}")
        except OSError as error:
            print(f"minllama: {path} was not written: {error.strerror}.")
    else:
        print(HELP)
    return True
