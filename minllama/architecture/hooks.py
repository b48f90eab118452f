"""What looks on while a model trains: progress, the curve, checkpoints.

A hook is anything that can be called with a `Run`. These three are enough for every
chapter; a chapter that wants more writes its own, a few lines each.
"""

import csv
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch

from minllama.architecture.accounting import (
    matmul_rate,
    peak_flops,
    training_flops,
)
from minllama.architecture.config import LlamaConfig
from minllama.architecture.train import Run


class Progress:
    """A line now and then: loss, rate, tokens/s, share of the peak (MFU), time left.

    On a GPU also the most memory that this process held at once.

    The peak is the datasheet's bf16 rate where the GPU is known, else what this
    machine's matrix products reach in a short measurement.

    Args:
        config: of the model, for its FLOPs.
        seq_len: tokens of a row.
        every: seconds between lines.
        world: processes that train together: MFU is of all their peaks.
        dtype: of the matrix products that are measured; None: the weights'.
        out: where lines go.
    """

    def __init__(
        self,
        config: LlamaConfig,
        seq_len: int,
        every: float = 5.0,
        world: int = 1,
        dtype: torch.dtype | None = None,
        out: TextIO | None = None,
    ) -> None:
        self.flops, self.every, self.world = (
            training_flops(config, seq_len),
            every,
            world,
        )
        self.dtype, self.out = dtype, out or sys.stdout
        self.peak: float | None = None
        self.since: tuple[float, int, int] | None = None  # seconds, step, tokens

    def __call__(self, run: Run) -> None:
        if self.peak is None:
            weight = next(run.model.parameters())
            measured = self.dtype or weight.dtype
            self.peak = peak_flops(weight.device) or matmul_rate(
                weight.device, measured
            )
        now = time.perf_counter()
        if self.since is None:  # the first step compiles and warms up: not counted
            self.since = (now, run.step, run.tokens)
            if run.step < run.steps:
                return
        seconds = now - self.since[0]
        if seconds < self.every and run.step < run.steps:
            return
        rate = (run.tokens - self.since[2]) / max(seconds, 1e-9)
        left = (run.steps - run.step) * seconds / max(run.step - self.since[1], 1)
        words = [
            f"step {run.step}/{run.steps}",
            f"loss {run.loss:.3f}",
            f"lr {run.lr:.1e}",
            f"{rate:,.0f} tokens/s",
            f"MFU {rate * self.flops / (self.world * self.peak):.1%}",
            *_memory(next(run.model.parameters()).device),
            f"{left // 60:.0f}:{left % 60:02.0f} left",
        ]
        print(" · ".join(words), file=self.out, flush=True)
        self.since = (now, run.step, run.tokens)


def _memory(device: torch.device) -> list[str]:
    if device.type != "cuda":
        return []
    return [f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"]


class Curve:
    """`curve.csv`, a row a step, and at the end `curve.png`.

    A resumed run goes on with the rows up to its step and drops later ones.
    """

    fields = ("step", "tokens", "loss", "lr", "grad_norm", "seconds")

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "curve.csv"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.started = False

    def __call__(self, run: Run) -> None:
        if not self.started:
            self._begin(run.step)
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(
                [run.step, run.tokens, f"{run.loss:.5f}", f"{run.lr:.4e}",
                 f"{run.grad_norm:.4f}", f"{run.seconds:.4f}"]
            )  # fmt: skip
        if run.step == run.steps:
            draw_curve(self.path)

    def _begin(self, step: int) -> None:
        kept = []
        if self.path.exists() and step > 1:
            with self.path.open(newline="") as file:
                kept = [row for row in csv.reader(file) if row[:1] != ["step"]]
            kept = [row for row in kept if row and int(row[0]) < step]
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerows([self.fields, *kept])
        self.started = True


def draw_curve(path: str | Path) -> Path:
    """The loss of a `curve.csv` against tokens, as a PNG beside it."""
    from matplotlib.figure import Figure  # no global state, no display

    path = Path(path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    tokens = [int(row["tokens"]) for row in rows]
    loss = [float(row["loss"]) for row in rows]
    width = max(1, len(loss) // 50)
    mean = [
        sum(loss[max(0, i - width + 1) : i + 1]) / min(i + 1, width)
        for i in range(len(loss))
    ]
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(tokens, loss, color="#999999", linewidth=0.6)
    axes.plot(tokens, mean, color="#0072B2", linewidth=1.6)
    axes.set_xlabel("tokens learned from")
    axes.set_ylabel("training loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    return path.with_suffix(".png")


def every(steps: int, hook: Callable[[Run], None]) -> Callable[[Run], None]:
    """Call `hook` at each multiple of `steps` and at the end."""

    def call(run: Run) -> None:
        if run.step % steps == 0 or run.step == run.steps:
            hook(run)

    return call


def save_training_state(run: Run, path: str | Path) -> None:
    """All that a run needs to go on bit for bit, in one file.

    Weights, optimizer, random numbers, and the place in the batches. Written to a
    temporary name and renamed, so that the file is never half a state.
    """
    device = next(run.model.parameters()).device
    state = {
        "step": run.step,
        "tokens": run.tokens,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "batches": run.batches.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_training_state(run: Run, path: str | Path) -> Run:
    """Put a saved state into a run made with the same model, optimizer and batches.

    Raises:
        ValueError: the file is no training state, or of another model.
    """
    device = next(run.model.parameters()).device
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        step = state["step"]
    except Exception as error:
        raise ValueError(
            f"{path} is no training state ({type(error).__name__}); give the file that "
            "save_training_state wrote, or start anew without it."
        ) from error
    try:
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{path} belongs to another model: {error}") from error
    run.batches.load_state_dict(state["batches"])
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"], device)
    run.step, run.tokens = step, state["tokens"]
    return run
