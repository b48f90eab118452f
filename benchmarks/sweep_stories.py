"""Which recipe for the shipped models? Train variants on a slice, score the rest of it.

    python benchmarks/sweep_stories.py DATA [--only NAME …] [--epochs N]

450 stories of the training file are held out, by a fixed shuffle; the validation file
is not touched. One GPU takes a minute or so a variant. Writes training_sweep.csv.
"""

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import record
from minllama.architecture.config import LlamaConfig
from minllama.architecture.data import PackedBatches, encode_documents, read_documents
from minllama.architecture.dropout import add_dropout, remove_dropout
from minllama.architecture.evaluate import score_documents
from minllama.architecture.model import MinimalLlama
from minllama.architecture.tokenizer import Tokenizer
from minllama.architecture.train import train, warmup_cosine
from minllama.recipes.train import OPTIMIZERS


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One recipe."""

    vocab_size: int = 2048
    shape: tuple[int, int, int, int, int] = (256, 8, 8, 4, 768)  # D, N, H, K, F
    optimizer: str = "muon"
    lr: float = 6e-3
    weight_decay: float = 1.0
    dropout: float = 0.2
    rows: int = 64
    epochs: float = 30


BASE = Variant()
MINI = Variant(shape=(128, 4, 4, 2, 320), dropout=0.05)
V4096 = Variant(vocab_size=4096, shape=(224, 8, 7, 7, 640))
VARIANTS = {
    "adamw-2e-3-decay-0.1": replace(BASE, optimizer="adamw", lr=2e-3, weight_decay=0.1),
    "muon-3e-3-decay-0.1": replace(BASE, lr=3e-3, weight_decay=0.1),
    "muon-3e-3-decay-1": replace(BASE, lr=3e-3),
    "muon-6e-3-decay-0.3": replace(BASE, weight_decay=0.3),
    "muon-6e-3-decay-1": BASE,
    "muon-6e-3-decay-2": replace(BASE, weight_decay=2.0),
    "muon-1e-2-decay-1": replace(BASE, lr=1e-2),
    "dropout-0.1": replace(BASE, dropout=0.1),
    "dropout-0.3": replace(BASE, dropout=0.3),
    "32-rows-25-epochs": replace(BASE, rows=32, epochs=25),
    "vocabulary-1024": replace(BASE, vocab_size=1024, lr=3e-3, weight_decay=0.3),
    "vocabulary-4096": V4096,
    "vocabulary-4096-3e-3-decay-0.3": replace(V4096, lr=3e-3, weight_decay=0.3),
    "mini-decay-0.1": replace(MINI, weight_decay=0.1),
    "mini-decay-1": MINI,
    "mini-1e-2-decay-0.5": replace(MINI, lr=1e-2, weight_decay=0.5, dropout=0.0),
}


def run(name: str, v: Variant, texts: list[str], held: list[str], device: str) -> dict:
    """Train one variant and score it."""
    torch.manual_seed(0)
    start = time.perf_counter()
    tok = Tokenizer.train(texts, vocab_size=v.vocab_size)
    dim, n_layers, n_heads, n_kv_heads, ffn_dim = v.shape
    config = LlamaConfig(
        vocab_size=v.vocab_size, dim=dim, n_layers=n_layers, n_heads=n_heads,
        n_kv_heads=n_kv_heads, ffn_dim=ffn_dim, max_seq_len=512, tie_embeddings=True,
    )  # fmt: skip
    model = add_dropout(MinimalLlama(config).to(device), v.dropout)
    if device == "cuda":
        for layer in model.layers:
            layer.compile()
    batches = PackedBatches(encode_documents(texts, tok), v.rows, 512)
    steps = max(1, int(v.epochs * batches.batches_per_epoch()))
    optimizer = OPTIMIZERS[v.optimizer](model, v.lr, v.weight_decay)
    schedule = warmup_cosine(steps, min(100, steps // 4), floor=0.0)
    train(model, optimizer, batches, steps, schedule, autocast=torch.bfloat16)
    score = score_documents(remove_dropout(model), tok, held, batch_size=50)
    return {
        "variant": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "held_out_bits_per_byte": f"{score.bits_per_byte:.4f}",
        "seconds": f"{time.perf_counter() - start:.0f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", help="tinystories_en_train.txt")
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--epochs", type=float, help="in place of each variant's own")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    texts = read_documents(options.data)
    order = np.random.default_rng(123).permutation(len(texts))
    held, rest = [texts[i] for i in order[:450]], [texts[i] for i in order[450:]]
    rows = []
    for name in options.only:
        variant = VARIANTS[name]
        if options.epochs:
            variant = replace(variant, epochs=options.epochs)
        rows.append(run(name, variant, rest, held, device))
        print(record.table(rows[-1:]), flush=True)
    print(f"written to {record.write('training_sweep', rows, device).name}")


if __name__ == "__main__":
    main()
