"""Train a Llama from scratch, or further, on text of one's own.

Reads documents, trains a tokenizer on them (or takes one), packs, trains, and writes a
folder that `MinimalLlama.from_pretrained` and transformers read. A run that was
stopped goes on where it was when the same command is given again.
"""

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from minllama.architecture.accounting import count_parameters
from minllama.architecture.config import LlamaConfig
from minllama.architecture.data import (
    PackedBatches,
    encode_documents,
    read_documents,
)
from minllama.architecture.dropout import add_dropout, remove_dropout
from minllama.architecture.hooks import (
    Curve,
    Progress,
    every,
    load_training_state,
    save_training_state,
)
from minllama.architecture.model import MinimalLlama
from minllama.architecture.optim import make_adamw, make_muon
from minllama.architecture.tokenizer import Tokenizer
from minllama.architecture.train import Run, train, warmup_cosine
from minllama.recipes.evaluate import evaluate_file
from minllama.recipes.generate import check_device

OPTIMIZERS = {"adamw": make_adamw, "muon": make_muon}
SAVE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What `minllama train` takes; each field is a flag of that name.

    The defaults train a model of 1.2 million parameters, on a laptop in minutes.

    Args:
        data: a UTF-8 file, or a folder of them; <|endoftext|> separates documents
        out: folder for the model, its tokenizer and its curve
        valid: a text to score in the end
        model: train this one further: a shipped name or a folder
        tokenizer: a shipped name or a folder; else the model's, or a new one
        vocab_size: entries of a new tokenizer
        dim: width of a new model
        n_layers: blocks of a new model
        n_heads: query heads of a new model
        n_kv_heads: key/value heads of a new model
        ffn_dim: inner width of the feed-forward; else 8/3 of dim
        rope_theta: base of the rotary angles of a new model
        seq_len: tokens of a row, and the context of a new model
        epochs: passes over the data
        steps: in place of epochs
        batch_size: rows of a batch
        accumulate: batches of a step
        optimizer: adamw or muon
        lr: peak learning rate
        weight_decay: of matrices, times the rate
        warmup: steps until the peak
        dropout: share of channels dropped, in training only
        seed: of weights, shuffles and dropout
        device: cpu, cuda, mps; the fastest if not given
        bf16: compute matrix products in bfloat16
        compile: compile each block with torch.compile
        save_every: steps between training states, from which a stopped run goes on
        save_dtype: of the weights in the end: float32, bfloat16 or float16
        fresh: begin anew though a stopped run is there
    """

    data: str
    out: str
    valid: str | None = None
    model: str | None = None
    tokenizer: str | None = None
    vocab_size: int = 2048
    dim: int = 128
    n_layers: int = 5
    n_heads: int = 4
    n_kv_heads: int = 2
    ffn_dim: int | None = None
    rope_theta: float = 10000.0
    seq_len: int = 512
    epochs: float = 4.0
    steps: int | None = None
    batch_size: int = 16
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 3e-3
    weight_decay: float = 0.1
    warmup: int = 50
    dropout: float = 0.0
    seed: int = 0
    device: str | None = None
    bf16: bool = False
    compile: bool = False
    save_every: int = 200
    save_dtype: str = "float32"
    fresh: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("optimizer", tuple(OPTIMIZERS)),
            ("save_dtype", tuple(SAVE_DTYPES)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"{name}={value!r} must be one of {', '.join(allowed)}."
                )
        for name in (
            "epochs",
            "batch_size",
            "accumulate",
            "seq_len",
            "save_every",
            "lr",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value} must be a number above 0.")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1.")
        for name in ("warmup", "seed"):
            if not 0 <= getattr(self, name) < 2**63:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0.")


def run_training(options: TrainOptions) -> Run:
    """All of it: data, tokenizer, model, loop, files.

    Raises:
        ValueError: options that contradict each other or the data.
    """
    device = check_device(options.device)
    out = Path(options.out).resolve()  # never mistaken for the name of a shipped model
    state = out / "training_state.pt"
    resumes = state.exists() and not options.fresh
    torch.manual_seed(options.seed)
    documents = read_documents(options.data)
    if options.valid:
        read_documents(options.valid)  # a missing file is told now, not in the end
    facts = {**asdict(options), "data_sha256": _digest(documents)}
    if resumes:
        _check_same(facts, out)
    out.mkdir(parents=True, exist_ok=True)
    tok = _tokenizer(options, documents, resumes)
    model = _model(options, tok).to(device)
    batches = PackedBatches(
        encode_documents(documents, tok),
        options.batch_size,
        options.seq_len,
        options.seed,
    )
    steps = options.steps
    if steps is None:
        whole = options.epochs * batches.batches_per_epoch() / options.accumulate
        steps = max(1, round(whole))
    optimizer = OPTIMIZERS[options.optimizer](model, options.lr, options.weight_decay)
    run = Run(model, optimizer, batches, steps)
    if resumes:
        load_training_state(run, state)
        print(f"going on from step {run.step} of {steps} ({state})")
    _write_json(out / "options.json", facts)
    print(
        f"{count_parameters(model.config):,} parameters · {len(documents):,} documents "
        f"· {steps} steps of {options.batch_size * options.accumulate} x "
        f"{options.seq_len} tokens · {device}"
    )
    if options.dropout:
        add_dropout(model, options.dropout)
    if options.compile:
        for layer in model.layers:
            layer.compile()
    autocast = torch.bfloat16 if options.bf16 else None
    train(
        model,
        optimizer,
        batches,
        steps,
        schedule=warmup_cosine(steps, min(options.warmup, steps), floor=0.0),
        accumulate=options.accumulate,
        autocast=autocast,
        hooks=(
            Progress(model.config, options.seq_len, dtype=autocast),
            Curve(out),
            every(options.save_every, lambda run: save_training_state(run, state)),
        ),
        run=run,
    )
    remove_dropout(model).to(SAVE_DTYPES[options.save_dtype])
    model.save_pretrained(out)
    tok.save_pretrained(out)
    state.unlink()  # the run is complete
    print(f"the model is in {out}; continue a text with it:")
    print(f'  minllama generate "…" --model {out}')
    if options.valid:
        evaluate_file(options.valid, str(out), device)
    return run


def _tokenizer(options: TrainOptions, documents: list[str], resumes: bool) -> Tokenizer:
    """The one that was named, that of the stopped run, or a new one."""
    out = Path(options.out).resolve()
    source = options.tokenizer or options.model
    if source is None and resumes:
        source = str(out)
    if source is not None:
        return Tokenizer.from_pretrained(source)
    try:
        tok = Tokenizer.train(documents, vocab_size=options.vocab_size)
    except ValueError as error:
        raise ValueError(
            f"vocab_size={options.vocab_size} (--vocab-size): {error}"
        ) from None
    tok.save_pretrained(out)
    return tok


def _model(options: TrainOptions, tok: Tokenizer) -> MinimalLlama:
    if options.model is not None:
        model = MinimalLlama.from_pretrained(options.model, dtype=torch.float32)
        if model.config.vocab_size < tok.vocab_size:
            raise ValueError(
                f"the tokenizer's vocab_size={tok.vocab_size} exceeds the model's "
                f"{model.config.vocab_size}; use the tokenizer that belongs to it."
            )
        if options.seq_len > model.config.max_seq_len:
            raise ValueError(
                f"seq_len={options.seq_len} exceeds the model's max_seq_len="
                f"{model.config.max_seq_len}; give --seq-len that number or less."
            )
        if options.tokenizer is not None:  # its ends are those that the data will hold
            ends = () if tok.eos_id is None else (tok.eos_id,)
            model.config = replace(model.config, bos_id=tok.bos_id, eos_ids=ends)
        return model
    config = LlamaConfig(
        vocab_size=tok.vocab_size,
        dim=options.dim,
        n_layers=options.n_layers,
        n_heads=options.n_heads,
        n_kv_heads=options.n_kv_heads,
        ffn_dim=options.ffn_dim,  # type: ignore[arg-type]
        rope_theta=options.rope_theta,
        max_seq_len=options.seq_len,
        tie_embeddings=True,
        bos_id=tok.bos_id,
        eos_ids=() if tok.eos_id is None else (tok.eos_id,),
        model_type="llama",
    )
    return MinimalLlama(config)


def _digest(documents: list[str]) -> str:
    """Tells whether a stopped run goes on with the text it was started with."""
    whole = hashlib.sha256()
    for document in documents:
        whole.update(document.encode() + b"\0")
    return whole.hexdigest()


def _check_same(now: dict, out: Path) -> None:
    """A stopped run goes on only under the options and data it was started with."""
    path = out / "options.json"
    if not path.exists():
        raise ValueError(f"{path} is missing beside a stopped run; begin with --fresh.")
    before = json.loads(path.read_text())
    free = ("device", "valid", "save_every", "compile", "fresh", "out")  # may change
    changed = [key for key in now if key not in free and now[key] != before.get(key)]
    if changed:
        words = ", ".join(f"{key}: {before.get(key)} -> {now[key]}" for key in changed)
        raise ValueError(
            f"{out} holds a stopped run with other options ({words}); give the same "
            "ones to go on, or --fresh to begin anew."
        )


def _write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(part, path)
