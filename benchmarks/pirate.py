"""Runs of the pirate experiment: methods, their rates, texts, and one run.

`bench_peft_pirate.py` says what is measured, runs all of them and writes the tables.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks import record
from minllama import MinimalLlama, Tokenizer, generate
from minllama.architecture.data import PackedBatches, encode_documents, read_documents
from minllama.architecture.optim import make_adamw
from minllama.architecture.train import train, warmup_cosine
from minllama.peft import (
    Plan,
    adapter_names,
    add_ia3,
    add_llama_adapter,
    add_lora,
    add_norm_tuning,
    add_prefix,
    add_prompt,
    set_adapter,
    trainable_parameters,
)
from minllama.peft.accounting import adapter_parameters
from minllama.peft.sft import held_out_loss, with_prompt

TEXTS = Path(__file__).parent.parent / "minllama" / "assets" / "texts"
SEQ_LEN, ROWS, SEEDS, STEPS = 256, 4, (0, 1, 2), (8, 15, 30, 60)
BUDGET = 0.02  # of the model's numbers: an adapter stays below it
PROMPT = 16  # tokens of prefix and prompt
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def rates(low: float, high: float, each: int = 4) -> list[float]:
    """So many in a decade, both ends included.

    Example:
        >>> rates(0.01, 0.1)
        [0.01, 0.018, 0.032, 0.056, 0.1]
    """
    count = round(each * np.log10(high / low))
    return [float(f"{low * 10 ** (k / each):.1e}") for k in range(count + 1)]


def lora(
    targets: tuple[str, ...], rank: int | None = None, upper: bool = False, **how
) -> Callable:
    """LoRA of this rank, or of the largest below BUDGET; alpha is twice the rank."""

    def add(model: MinimalLlama) -> None:
        count = model.config.n_layers
        layers = range(count // 2 if upper else 0, count)
        method = "dora" if "dora" in how else "lora"
        fits = rank or fitting_rank(model, method, targets, len(layers))
        add_lora(model, fits, 2.0 * fits, targets, layers_to_transform=layers, **how)

    return add


def fitting_rank(
    model: MinimalLlama, method: str, targets: tuple[str, ...], layers: int
) -> int:
    """The largest rank whose adapter is smaller than BUDGET of the model."""
    limit = BUDGET * sum(p.numel() for p in model.parameters())
    config = replace(model.config, n_layers=layers)

    def count(rank: int) -> int:
        return adapter_parameters(
            config, Plan(method=method, rank=rank, targets=targets)
        )

    return max(rank for rank in range(1, 65) if count(rank) < limit)


LOW, MIDDLE, HIGH = rates(1e-5, 1e-3), rates(1e-4, 1e-2), rates(1e-2, 1.0, each=2)
METHODS: dict[str, tuple[Callable, list[float]]] = {
    "full": (lambda model: None, LOW),
    "lora, all-linear": (lora(ATTENTION + MLP), MIDDLE),
    "lora, upper half": (lora(ATTENTION + MLP, upper=True), MIDDLE),
    "lora, attention": (lora(ATTENTION), MIDDLE),
    "lora, mlp": (lora(MLP), MIDDLE),
    "lora, q v": (lora(("q_proj", "v_proj")), MIDDLE),
    "lora, dropout 0.1": (lora(ATTENTION + MLP, dropout=0.1), MIDDLE),
    "lora, r = 1": (lora(ATTENTION + MLP, 1), MIDDLE),
    "lora, r = 32": (lora(ATTENTION + MLP, 32), MIDDLE),
    "dora": (lora(ATTENTION + MLP, dora=True), MIDDLE),
    "pissa": (lora(ATTENTION + MLP, init="pissa"), MIDDLE),
    "ia3": (add_ia3, HIGH),
    "norms": (add_norm_tuning, HIGH),
    "prefix": (lambda m: add_prefix(m, PROMPT), HIGH),
    "prompt": (lambda m: add_prompt(m, PROMPT, words=range(256, 272)), HIGH),
    "llama-adapter": (lambda m: add_llama_adapter(m, 10), HIGH),
}
SMOKE = {"full": [1e-4], "lora, all-linear": [1e-3], "prompt": [0.1]}
Job = tuple[str, float, int, int]  # method, rate, steps, seed


class Bench:
    """A base model and its texts, on a device. Learns and scores."""

    def __init__(self, name: str, device: str, texts: dict) -> None:
        self.name, self.texts = name, texts
        base = MinimalLlama.from_pretrained(name, dtype=torch.float32)
        self.base = base.to(device)
        self.origin = {
            "machine": record.machine(device),
            "torch": torch.__version__,
            "commit": record.commit(),
        }

    def score(self, model: MinimalLlama, method: str) -> dict[str, float]:
        """Nats a token of every text but the one that is learned."""
        scored = {text: docs for text, docs in self.texts.items() if text != "tales"}
        return {
            text: round(held_out_loss(model, prompted(model, method, docs), SEQ_LEN), 4)
            for text, docs in scored.items()
        }

    def learn(self, job: Job) -> tuple[MinimalLlama, float]:
        """The model after a run, and the loss of its last step."""
        method, lr, steps, seed = job
        torch.manual_seed(seed)
        model = copy.deepcopy(self.base)
        METHODS[method][0](model)
        tales = prompted(model, method, self.texts["tales"])
        batches = PackedBatches(tales, ROWS, SEQ_LEN, seed)
        schedule = warmup_cosine(steps, 3, floor=0.0)
        optimizer = make_adamw(model, lr, weight_decay=0.0)
        return model, train(model, optimizer, batches, steps, schedule).loss

    def run(self, job: Job) -> list[dict]:
        """Train once; a row at full strength, and one at half if there is a dial."""
        start = time.perf_counter()
        model, loss = self.learn(job)
        seconds = time.perf_counter() - start
        rows = [self.row(model, job, 1.0, loss, seconds)]
        if job[0].startswith(("full", "lora")):
            self.halve(model)
            rows.append(self.row(model, job, 0.5, loss, seconds))
        return rows

    def row(
        self, model: MinimalLlama, job: Job, strength: float, loss=0.0, seconds=0.0
    ) -> dict:
        """A line of the table."""
        method, lr, steps, seed = job
        whole = sum(p.numel() for p in self.base.parameters())
        count = trainable_parameters(model) if steps else 0
        ranks = [len(p) for name, p in model.named_parameters() if name.endswith(".a")]
        return {
            "model": self.name, "method": method, "rank": max(ranks, default=""),
            "parameters": count, "share": f"{count / whole:.3%}", "lr": lr,
            "steps": steps, "seed": seed, "strength": strength,
            "train": round(loss, 4), **self.score(model, method),
            "seconds": round(seconds, 1), **self.origin,
        }  # fmt: skip

    @torch.no_grad()
    def halve(self, model: MinimalLlama) -> None:
        """Half of what was learned: the adapter's strength, or the mean of models."""
        if adapter_names(model):
            set_adapter(model, {"default": 0.5})
            return
        for new, old in zip(model.parameters(), self.base.parameters()):
            new.lerp_(old, 0.5)


def prompted(model: MinimalLlama, method: str, docs: list) -> list:
    """A learned prompt stands before each text, in training and in scoring."""
    return with_prompt(model, docs, SEQ_LEN - PROMPT) if method == "prompt" else docs


def read_texts(name: str, valid: str | None, own=24) -> dict[str, list[np.ndarray]]:
    """The tales that are learned, and all texts that score."""
    tok = Tokenizer.from_pretrained(name)

    def read(path: Path) -> list[np.ndarray]:
        return encode_documents(read_documents(path), tok)

    tales = read(TEXTS / "pirate.txt")
    texts = {
        "tales": [tale for at, tale in enumerate(tales) if at % 5],
        "slice": tales[::5],
        "style": read(TEXTS / "pirate_heldout.txt"),
        "stories": read(TEXTS / "stories_en_heldout.txt"),
        "own": own_stories(name, tok, own),
    }
    return {**texts, "valid": read(Path(valid))[:60]} if valid else texts


def own_stories(name: str, tok: Tokenizer, count: int) -> list[np.ndarray]:
    """Stories that the model tells at temperature 1, ends included."""
    model = MinimalLlama.from_pretrained(name, dtype=torch.float32)
    begin = torch.full((count, 1), tok.bos_id)
    told = generate(model, begin, 160, temperature=1.0, seed=0).tolist()
    ends = [
        ids.index(tok.eos_id) + 1 if tok.eos_id in ids else len(ids) for ids in told
    ]
    return [np.array(ids[:end]) for ids, end in zip(told, ends)]
