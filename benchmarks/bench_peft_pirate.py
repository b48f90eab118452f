"""Teach a tiny model to talk like a pirate: what is learned, and what is forgotten?

    python benchmarks/bench_peft_pirate.py [--valid FILE] [--only METHOD …]

Each method trains on pirate.txt for the same steps. Its learning rate is the best one
on a slice of that text (every fifth tale, kept out of the sweep's training; one seed).
Three runs on all of the text with that rate are then scored, in nats per token:

    style     pirate_heldout.txt: what was to be learned
    stories   stories_en_heldout.txt: plain stories by the hands that wrote the tales
    own       stories that the model itself told before training: what rises here is its
              distance from what it was, KL(before | after) per token
    valid     with --valid, a file of the model's own training kind (TinyStories)

Full fine-tuning and LoRA are scored once more at half strength: half of the change,
which an adapter gives by a switch (set_adapter), full fine-tuning as a mean of models.

Writes peft_pirate.csv (every run, the sweep's too) and peft_spectrum.csv (the share of
a full fine-tune's change of each weight that lies in its first r directions).
"""

import argparse
import copy
import csv
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import record
from minllama import MinimalLlama, Tokenizer, generate
from minllama.architecture.data import PackedBatches, encode_documents, read_documents
from minllama.architecture.optim import make_adamw
from minllama.architecture.train import train, warmup_cosine
from minllama.peft import (
    adapter_names,
    add_dora,
    add_ia3,
    add_llama_adapter,
    add_lora,
    add_norm_tuning,
    add_pissa,
    add_prefix,
    add_prompt,
    set_adapter,
    trainable_parameters,
)
from minllama.peft.sft import held_out_loss, with_prompt

TEXTS = Path(__file__).parent.parent / "minllama" / "assets" / "texts"
SEQ_LEN, ROWS, STEPS, SEEDS = 256, 4, 60, (0, 1, 2)
PROMPT = 16  # tokens of prefix and prompt
HIGH, MIDDLE, LOW = (1e-2, 3e-2, 1e-1, 3e-1), (3e-4, 1e-3, 3e-3, 1e-2), (
    1e-5, 3e-5, 1e-4, 3e-4)  # fmt: skip

METHODS: dict[str, tuple[Callable, tuple[float, ...]]] = {
    "full": (lambda model: model, LOW),
    "lora r=2, all-linear": (lambda m: add_lora(m, 2, 4, "all-linear"), MIDDLE),
    "lora r=32, all-linear": (lambda m: add_lora(m, 32, 32, "all-linear"), MIDDLE),
    "lora r=8, q v": (lambda m: add_lora(m, 8, 16), MIDDLE),
    "dora r=1, all-linear": (lambda m: add_dora(m, 1, 2, "all-linear"), MIDDLE),
    "pissa r=2, all-linear": (lambda m: add_pissa(m, 2, 2, "all-linear"), MIDDLE),
    "ia3": (add_ia3, HIGH),
    "norms": (add_norm_tuning, HIGH),
    "prefix": (lambda m: add_prefix(m, PROMPT), HIGH),
    "prompt": (lambda m: add_prompt(m, PROMPT, words=range(256, 272)), HIGH),
    "llama-adapter": (lambda m: add_llama_adapter(m, 10), HIGH),
}


class Bench:
    """A base model, its texts, and what it scores before training."""

    def __init__(self, name: str, valid: str | None, smoke: bool) -> None:
        self.name, self.steps = name, 3 if smoke else STEPS
        self.tok = Tokenizer.from_pretrained(name)
        self.tales = self.read(TEXTS / "pirate.txt")
        self.texts = {
            "style": self.read(TEXTS / "pirate_heldout.txt"),
            "stories": self.read(TEXTS / "stories_en_heldout.txt"),
            "own": own_stories(self.fresh(), self.tok, 2 if smoke else 24),
        }
        if valid:
            self.texts["valid"] = self.read(Path(valid))[:60]
        if smoke:
            self.texts = {name: docs[:2] for name, docs in self.texts.items()}
        self.before = self.score(self.fresh(), "before", self.texts)

    def fresh(self) -> MinimalLlama:
        return MinimalLlama.from_pretrained(self.name, dtype=torch.float32)

    def read(self, path: Path) -> list[np.ndarray]:
        return encode_documents(read_documents(path), self.tok)

    def score(self, model: MinimalLlama, method: str, texts: dict) -> dict[str, float]:
        return {
            name: held_out_loss(model, self.prompted(model, method, docs), SEQ_LEN)
            for name, docs in texts.items()
        }

    def prompted(self, model: MinimalLlama, method: str, docs: list) -> list:
        """A learned prompt stands before each text, in training and in scoring."""
        if method != "prompt":
            return docs
        return with_prompt(model, docs, SEQ_LEN - PROMPT)

    def run(
        self, method: str, lr: float, seed: int, tales: list, texts: dict
    ) -> tuple[MinimalLlama, dict]:
        """Train one model; the model and its row of the table."""
        torch.manual_seed(seed)
        start, model = time.perf_counter(), self.fresh()
        whole = sum(p.numel() for p in model.parameters())
        METHODS[method][0](model)
        count = trainable_parameters(model)
        tales = self.prompted(model, method, tales)
        batches = PackedBatches(tales, ROWS, SEQ_LEN, seed)
        schedule = warmup_cosine(self.steps, min(3, self.steps), floor=0.0)
        optimizer = make_adamw(model, lr, weight_decay=0.0)
        run = train(model, optimizer, batches, self.steps, schedule)
        seconds = time.perf_counter() - start
        row = {
            "model": self.name, "method": method, "seed": seed, "parameters": count,
            "share": f"{count / whole:.3%}", "lr": lr, "steps": self.steps,
            "train_loss": f"{run.loss:.4f}",
        }  # fmt: skip
        row["seconds"] = f"{seconds:.1f}"
        return model, {**row, **self.told(model, method, texts)}

    def told(self, model: MinimalLlama, method: str, texts: dict) -> dict:
        """What the texts lost before training and lose now."""
        row = {}
        for name, after in self.score(model, method, texts).items():
            if name in self.before:
                row[f"{name}_before"] = f"{self.before[name]:.4f}"
            row[f"{name}_after"] = f"{after:.4f}"
        return row


@torch.no_grad()
def halve(model: MinimalLlama, before: MinimalLlama) -> None:
    """Half of what was learned: the adapter's strength, or the mean of two models."""
    if adapter_names(model):
        set_adapter(model, {"default": 0.5})
        return
    for new, old in zip(model.parameters(), before.parameters()):
        new.lerp_(old, 0.5)


def own_stories(model: MinimalLlama, tok: Tokenizer, count: int) -> list[np.ndarray]:
    """Stories that the model tells at temperature 1, ends included."""
    begin = torch.full((count, 1), tok.bos_id)
    told = generate(model, begin, 160, temperature=1.0, seed=0).tolist()
    ends = [
        ids.index(tok.eos_id) + 1 if tok.eos_id in ids else len(ids) for ids in told
    ]
    return [np.array(ids[:end]) for ids, end in zip(told, ends)]


def choose_rate(bench: Bench, method: str, rates: tuple) -> tuple[float, list[dict]]:
    """The rate with the lowest loss on every fifth tale, trained on the others."""
    slice_, rest = bench.tales[::5], [t for i, t in enumerate(bench.tales) if i % 5]
    texts = {"slice": slice_, "own": bench.texts["own"]}
    rows, found = [], []
    for lr in rates:
        _, row = bench.run(method, lr, 0, rest, texts)
        rows.append({"part": "sweep", **row})
        found.append(float(row["slice_after"]))
    return rates[int(np.argmin(found))], rows


def spectrum(before: MinimalLlama, after: MinimalLlama) -> list[dict]:
    """Share of |dW|^2 in the first r directions, per weight; and of a random matrix."""
    rows, old = [], dict(before.named_parameters())
    for name, weight in after.named_parameters():
        if weight.dim() < 2:
            continue
        change = (weight - old[name]).detach().double()
        random = torch.randn(
            change.shape, dtype=torch.double, generator=torch.Generator().manual_seed(0)
        )
        energy, noise = (energy_shares(x) for x in (change, random))
        rank = int((energy < 0.9).sum()) + 1
        row = {
            "weight": name,
            "kind": name.split(".")[-2],
            "shape": "x".join(map(str, change.shape)),
            "change": f"{change.norm() / old[name].double().norm():.4f}",
            "rank_of_90_percent": rank,
        }
        for r in (1, 2, 4, 8, 16, 32):
            at = min(r, len(energy)) - 1
            row[f"first_{r}"] = f"{energy[at]:.4f}"
            row[f"random_{r}"] = f"{noise[at]:.4f}"
        rows.append(row)
    return rows


def energy_shares(matrix: torch.Tensor) -> torch.Tensor:
    """Cumulative share of the squared singular values. (m, n) -> (min(m, n),)"""
    squares = torch.linalg.svdvals(matrix).square()
    return squares.cumsum(0) / squares.sum()


def summary(rows: list[dict]) -> list[dict]:
    """Mean and spread over the seeds: what was learned, what was lost."""
    told = []
    kinds = dict.fromkeys(
        (r["method"], r["part"]) for r in rows if r["part"] != "sweep"
    )
    for method, part in sorted(kinds, key=lambda kind: kind[1]):
        mine = [r for r in rows if (r["method"], r["part"]) == (method, part)]
        name = method if part == "final" else f"{method}, half"
        line = {"method": name, "share": mine[0]["share"], "lr": mine[0]["lr"]}
        for text in ("style", "stories", "own", "valid"):
            if f"{text}_after" in mine[0]:
                change = [
                    float(r[f"{text}_after"]) - float(r[f"{text}_before"]) for r in mine
                ]
                line[text] = f"{np.mean(change):+.3f} ({np.ptp(change):.3f})"
        told.append(line)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="stories-mini")
    parser.add_argument("--valid", help="a TinyStories file: its first 60 are scored")
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--smoke", action="store_true", help="seconds, writes nothing")
    options = parser.parse_args()
    only = ["full", "lora r=2, all-linear"] if options.smoke else options.only
    bench = Bench(options.model, options.valid, options.smoke)
    for method in only:
        rates = METHODS[method][1]
        lr, rows = choose_rate(bench, method, rates[1:2] if options.smoke else rates)
        for seed in SEEDS[:1] if options.smoke else SEEDS:
            model, row = bench.run(method, lr, seed, bench.tales, bench.texts)
            rows.append({"part": "final", **row})
            if method.startswith(("full", "lora")):
                half = copy.deepcopy(model)
                halve(half, bench.fresh())
                told = bench.told(half, method, bench.texts)
                rows.append({"part": "half", **row, **told})
            if method == "full" and seed == 0 and not options.smoke:
                write("peft_spectrum", spectrum(bench.fresh(), model), options.model)
        if not options.smoke:
            write("peft_pirate", rows, options.model)
        print(record.table(summary(rows)), flush=True)
    if not options.smoke:
        print("change of the loss, nats per token: mean over the seeds (spread)")
        print(record.table(summary(read("peft_pirate", options.model))))


def file_name(name: str, model: str) -> str:
    return name if model == "stories-mini" else f"{name}_{model}"


def read(name: str, model: str) -> list[dict]:
    """The rows that were written before, if any."""
    path = record.RESULTS / f"{file_name(name, model)}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(name: str, rows: list[dict], model: str) -> None:
    """Each method as soon as it is done; its rows replace those of an earlier run."""
    methods = {row.get("method") for row in rows}
    kept = [r for r in read(name, model) if r.get("method") not in methods]
    rows = kept + rows if "method" in rows[0] else rows
    keys = dict.fromkeys(key for row in rows for key in row)
    record.write(
        file_name(name, model),
        [{key: row.get(key, "") for key in keys} for row in rows],
        "cpu",
    )


if __name__ == "__main__":
    main()
