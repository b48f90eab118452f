"""Train a Llama from scratch, or further, on text of one's own.

Reads documents, trains a tokenizer on them (or takes one), packs, trains, and writes a
folder that `MinimalLlama.from_pretrained` and transformers read. A run that was
stopped goes on where it was when the same command is given again, also on another
number of processes. On several GPUs:

    torchrun --nproc-per-node 4 -m minllama.recipes.train --data texts --out runs/mine
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch.profiler import profile

from minllama.architecture.accounting import count_parameters
from minllama.architecture.config import LlamaConfig
from minllama.architecture.data import (
    PackedBatches,
    encode_documents,
    read_documents,
)
from minllama.architecture.dropout import add_dropout, remove_dropout
from minllama.architecture.hooks import Curve, Progress, every
from minllama.architecture.model import MinimalLlama
from minllama.architecture.tokenizer import Tokenizer
from minllama.architecture.train import Run, next_token_loss, train, warmup_cosine
from minllama.dist_checkpoint import (
    consolidate,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from minllama.dist_run.mesh import is_first
from minllama.dist_run.timeline import save_trace
from minllama.dist_run.watch import Watch, install_sigterm, should_stop
from minllama.fast_ops import fast_loss, use_fast_ops
from minllama.recipes.evaluate import evaluate_file
from minllama.recipes.stopped import (
    CHECKPOINTS,
    OPTIONS,
    check_same,
    digest,
    make_folder,
    write_json,
)
from minllama.recipes.train_options import OPTIMIZERS, SAVE_DTYPES, TrainOptions
from minllama.recipes.workers import Workers, build_model, start_workers

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
FREE = (  # options that may change when a stopped run goes on
    "device", "valid", "save_every", "keep", "compile", "fast", "fresh", "out",
    "replicate", "shard", "tensor", "checkpointing", "max_skipped", "hang_after",
    "profile",
)  # fmt: skip


def run_training(options: TrainOptions) -> Run:
    """All of it: data, tokenizer, model, loop, files.

    Raises:
        ValueError: options that contradict each other or the data.
        SystemExit: the process was told to end (SIGTERM); the state is saved.
    """
    workers = start_workers(
        options.device, options.replicate, options.shard, options.tensor
    )
    out = Path(options.out).resolve()  # never mistaken for the name of a shipped model
    states = out / CHECKPOINTS
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    resumes = latest_checkpoint(states) is not None and (again or not options.fresh)
    if options.optimizer == "muon" and workers.mesh is not None:
        raise ValueError(
            "optimizer='muon' looks at whole matrices, and sharded ones are not; use "
            "adamw, or one process."
        )
    if options.tensor > 1 and (options.dropout or options.fast):
        raise ValueError(
            f"tensor={options.tensor} with dropout={options.dropout}, fast="
            f"{options.fast}: both want whole tensors; leave them out, or tensor."
        )
    torch.manual_seed(options.seed)
    documents = read_documents(options.data)
    if options.valid:
        read_documents(options.valid)  # a missing file is told now, not in the end
    facts = {**asdict(options), "data_sha256": digest(d.encode() for d in documents)}
    if resumes:
        check_same(facts, out, FREE)
    workers.first(lambda: make_folder(out, resumes))
    tok = _tokenizer(options, documents, resumes, workers)
    torch.manual_seed(options.seed)  # the same weights, however many processes
    model = _model(options, tok, workers)
    batches = PackedBatches(
        encode_documents(documents, tok),
        options.batch_size,
        options.seq_len,
        options.seed,
        workers.rank,
        workers.team.parts,
    )
    steps = options.steps
    if steps is None:
        whole = options.epochs * batches.batches_per_epoch() / options.accumulate
        steps = max(1, round(whole))
    optimizer = OPTIMIZERS[options.optimizer](model, options.lr, options.weight_decay)
    run = Run(model, optimizer, batches, steps)
    torch.manual_seed(options.seed + workers.rank)  # of dropout
    if resumes:
        load_checkpoint(states, run)
    if is_first():
        write_json(out / OPTIONS, facts)
        _greet(options, run, model.config, len(documents), workers, resumes)
    if options.compile:
        for block in model.layers:
            block.forward = torch.compile(block.forward)
    autocast = torch.bfloat16 if options.bf16 and workers.mesh is None else None

    def save(run: Run) -> None:
        save_checkpoint(states, run, keep=options.keep)

    with Watch(options.hang_after) as watch, LeaveOnSignal(save) as leave:
        train(
            model,
            optimizer,
            batches,
            steps,
            schedule=warmup_cosine(steps, min(options.warmup, steps), floor=0.0),
            accumulate=options.accumulate,
            autocast=autocast,
            loss=fast_loss if options.fast else next_token_loss,
            hooks=(
                *_lookers(options, model.config, out, workers),
                every(options.save_every, save),
                leave,
                watch,
            ),
            run=run,
            team=workers.team,
            max_skipped=options.max_skipped,
        )
    _finish(options, run, tok, workers)
    return run


def _greet(
    options: TrainOptions,
    run: Run,
    config: LlamaConfig,
    documents: int,
    workers: Workers,
    resumes: bool,
) -> None:
    if resumes:
        print(f"going on from step {run.step} of {run.steps}")
    rows = options.batch_size * options.accumulate
    words = [
        f"{count_parameters(config):,} parameters",
        f"{documents:,} documents",
        f"{run.steps} steps of {rows} x {options.seq_len} tokens",
        options.device or workers.device,
    ]
    if workers.mesh is not None:
        sizes = zip(workers.mesh.mesh_dim_names or (), workers.mesh.shape)
        words.append(", ".join(f"{axis} {size}" for axis, size in sizes))
    print(" · ".join(words))


def _lookers(
    options: TrainOptions, config: LlamaConfig, out: Path, workers: Workers
) -> list[Callable[[Run], None]]:
    """Progress and curve in one process; a step's timeline in all."""
    found: list[Callable[[Run], None]] = []
    if is_first():
        dtype = torch.bfloat16 if options.bf16 else None
        world = workers.world
        found.append(Progress(config, options.seq_len, world=world, dtype=dtype))
        found.append(Curve(out))
    if options.profile is not None:
        found.append(ProfileStep(options.profile, out))
    return found


class LeaveOnSignal:
    """A hook: told to end (SIGTERM, SIGUSR1), all processes save, then leave."""

    def __init__(self, save: Callable[[Run], object]) -> None:
        self.save = save

    def __enter__(self) -> "LeaveOnSignal":
        self.before = {number: signal.getsignal(number) for number in SIGNALS}
        self.stop = install_sigterm(SIGNALS)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __call__(self, run: Run) -> None:
        if run.step < run.steps and should_stop(self.stop):
            self.save(run)
            raise SystemExit(
                f"told to end: saved after step {run.step}; the same command goes on."
            )


class ProfileStep:
    """A hook: write the timeline of one step, as Perfetto and chrome://tracing read."""

    def __init__(self, step: int, out: Path) -> None:
        self.step, self.out = step, out
        self.prof: profile | None = None

    def __call__(self, run: Run) -> None:
        if run.step == self.step - 1:
            self.prof = profile()
            self.prof.start()
        elif self.prof is not None:
            self.prof.stop()
            rank = os.environ.get("RANK", "0")
            save_trace(self.prof, self.out / f"trace-step{run.step}-rank{rank}.json")
            self.prof = None


def _finish(options: TrainOptions, run: Run, tok: Tokenizer, workers: Workers) -> None:
    """The model's folder, from the whole model or from its last checkpoint."""
    out = Path(options.out).resolve()
    dtype = SAVE_DTYPES[options.save_dtype]
    if workers.mesh is None:
        remove_dropout(run.model).to(dtype)
        assert isinstance(run.model, MinimalLlama)
        run.model.save_pretrained(out)
    if is_first():
        if workers.mesh is not None:
            consolidate(out / CHECKPOINTS, out, dtype)
        tok.save_pretrained(out)
        shutil.rmtree(out / CHECKPOINTS)  # the run is complete
        print(f"the model is in {out}; continue a text with it:")
        print(f'  minllama generate "…" --model {out}')
    workers.end()
    if options.valid and int(os.environ.get("RANK", "0")) == 0:
        evaluate_file(options.valid, str(out), workers.device)


def _tokenizer(
    options: TrainOptions, documents: list[str], resumes: bool, workers: Workers
) -> Tokenizer:
    """The one that was named, that of the stopped run, or a new one."""
    out = Path(options.out).resolve()
    source = options.tokenizer or options.model
    if source is None:
        source = str(out)
        if not resumes:
            workers.first(lambda: _train_tokenizer(options, documents))
    return Tokenizer.from_pretrained(source)


def _train_tokenizer(options: TrainOptions, documents: list[str]) -> None:
    try:
        tok = Tokenizer.train(documents, vocab_size=options.vocab_size)
    except ValueError as error:
        raise ValueError(
            f"vocab_size={options.vocab_size} (--vocab-size): {error}"
        ) from None
    tok.save_pretrained(Path(options.out).resolve())


def _model(options: TrainOptions, tok: Tokenizer, workers: Workers) -> MinimalLlama:
    compute = torch.bfloat16 if options.bf16 else None
    build = partial(
        build_model,
        workers,
        dtype=torch.float32,
        compute=compute,
        checkpointing=options.checkpointing,
        change=partial(_prepare, options, tok),
    )
    if options.model is not None:
        return build(options.model)
    return build(
        LlamaConfig(
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
    )


def _prepare(options: TrainOptions, tok: Tokenizer, model: MinimalLlama) -> None:
    """What is done to a model before it is cut: its ends, and dropout."""
    if options.model is not None:
        _check_fits(options, tok, model.config)
        if options.tokenizer is not None:  # its ends are those that the data will hold
            ends = () if tok.eos_id is None else (tok.eos_id,)
            model.config = replace(model.config, bos_id=tok.bos_id, eos_ids=ends)
    if options.fast:
        use_fast_ops(model)
    if options.dropout:
        add_dropout(model, options.dropout)


def _check_fits(options: TrainOptions, tok: Tokenizer, config: LlamaConfig) -> None:
    if config.vocab_size < tok.vocab_size:
        raise ValueError(
            f"the tokenizer's vocab_size={tok.vocab_size} exceeds the model's "
            f"{config.vocab_size}; use the tokenizer that belongs to it."
        )
    if options.seq_len > config.max_seq_len:
        raise ValueError(
            f"seq_len={options.seq_len} exceeds the model's max_seq_len="
            f"{config.max_seq_len}; give --seq-len that number or less."
        )


if __name__ == "__main__":  # torchrun … -m minllama.recipes.train
    from minllama.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
