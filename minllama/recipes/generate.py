"""Continue a text, and show it as it comes."""

import sys
import time
from pathlib import Path
from typing import TextIO

import torch

from minllama.architecture.generate import stream
from minllama.architecture.model import MinimalLlama
from minllama.architecture.tokenizer import Tokenizer


def best_device() -> str:
    """The fastest device that torch can see: cuda, then mps, then cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(name: str | None) -> str:
    """That device if torch can use it; None: the fastest.

    Raises:
        ValueError: torch knows no such device here.
    """
    if name is None:
        return best_device()
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={name!r} cannot be used here ({str(error).splitlines()[0]}); this "
            f"machine's fastest is {best_device()!r}."
        ) from None
    return name


def tokenizer_of(model: str) -> Tokenizer:
    """The tokenizer that lies beside a model's weights, or ships with it."""
    path = Path(model)
    return Tokenizer.from_pretrained(path.parent if path.is_file() else model)


def generate_text(
    prompt: str,
    model: str = "stories",
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: tuple[str, ...] = (),
    seed: int | None = None,
    device: str | None = None,
    out: TextIO | None = None,
) -> str:
    """Print the prompt and its continuation piece by piece; return the continuation.

    Args:
        prompt: plain text.
        model: a shipped name or a folder.
        max_new_tokens: at most; None: as many as the context holds, 256 at most.
        temperature: see `Sampling`; so are the next four.
        top_k: see `Sampling`.
        top_p: see `Sampling`.
        min_p: see `Sampling`.
        repetition_penalty: see `Sampling`.
        stop: end before the first of these strings.
        seed: see `Sampling`.
        device: None: the fastest there is.
        out: where the text goes; None: standard output. A line of statistics goes to
            standard error.

    Raises:
        ValueError: as `stream`.
    """
    to = out or sys.stdout
    llama = MinimalLlama.from_pretrained(model, device=check_device(device))
    tok = tokenizer_of(model)
    if max_new_tokens is None:
        used = len(tok.encode(prompt)) + (tok.bos_id is not None)
        max_new_tokens = max(1, min(256, llama.config.max_seq_len - used))
    pieces, start = [], time.perf_counter()
    text = stream(
        llama, tok, prompt, max_new_tokens, temperature, top_k, top_p, min_p,
        repetition_penalty, stop_strings=stop, seed=seed,
    )  # fmt: skip
    to.write(prompt)
    for piece in text:
        pieces.append(piece)
        to.write(piece)
        to.flush()
    seconds = time.perf_counter() - start
    to.write("\n")
    new = len(tok.encode("".join(pieces)))
    print(f"\n{new} tokens, {new / seconds:.0f} tokens/s", file=sys.stderr)
    return "".join(pieces)
