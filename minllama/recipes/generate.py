"""Continue a text, and show it as it comes."""

import io
import sys
import time
from pathlib import Path
from typing import TextIO

from minllama.architecture.config import LlamaConfig
from minllama.architecture.generate import stream
from minllama.architecture.tokenizer import Tokenizer
from minllama.architecture.weights import open_weights
from minllama.dist_run.mesh import is_first
from minllama.dist_run.tensor import undivided
from minllama.recipes.devices import check_device  # noqa: F401
from minllama.recipes.workers import build_model, start_workers, world_size


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
    sharded: bool = False,
    out: TextIO | None = None,
) -> str:
    """Print the prompt and its continuation piece by piece; return the continuation.

    Started by torchrun, the processes share the model, and the first one prints:

        torchrun --nproc-per-node 2 -m minllama.recipes.generate "Once upon a time"

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
        sharded: torchrun: cut the model by FSDP, which fits where heads do not divide,
            and gathers each block for each token. False: by tensor parallelism.
        out: where the text goes; None: standard output. A line of statistics goes to
            standard error.

    Raises:
        ValueError: as `stream`; or the processes do not divide the heads.
    """
    if world_size() > 1 and not sharded:
        _check_shared(open_weights(model).config, world_size())
    workers = start_workers(device, **({} if sharded else {"tensor": world_size()}))
    to = (out or sys.stdout) if is_first() else io.StringIO()
    llama = build_model(workers, model, sequence=False, sharded=sharded).eval()
    if seed is None and workers.mesh is not None:
        seed = 0  # all ranks must draw the same
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
    if is_first():
        print(f"\n{new} tokens, {new / seconds:.0f} tokens/s", file=sys.stderr)
    del llama, text
    workers.end()
    return "".join(pieces)


def _check_shared(config: LlamaConfig, n: int) -> None:
    whole = undivided(config, n)
    if whole:
        fewer = [str(k) for k in range(1, n) if not undivided(config, k)]
        raise ValueError(
            f"{whole} does not divide by the {n} processes that torchrun started; take "
            f"--nproc-per-node {' or '.join(fewer)}, or --sharded, which does not cut "
            "heads."
        )


if __name__ == "__main__":  # torchrun … -m minllama.recipes.generate
    from minllama.cli import main

    sys.exit(main(["generate", *sys.argv[1:]]))
