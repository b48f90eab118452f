"""Fine-tune a model on text, instructions, conversations or preferences.

A small adapter learns beside the frozen model (or all of it does, with --method full);
the folder then holds the adapter in the PEFT library's format. What is held out is
scored before and after. A run that was stopped goes on where it was when the same
command is given again.
"""

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from minllama.architecture.data import (
    Batch,
    PackedBatches,
    encode_documents,
    read_documents,
)
from minllama.architecture.hooks import Curve, Progress, every
from minllama.architecture.model import MinimalLlama
from minllama.architecture.tokenizer import Tokenizer
from minllama.architecture.train import Run, next_token_loss, train, warmup_cosine
from minllama.dist_checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from minllama.dist_run import checkpoint_activations
from minllama.fast_ops import fast_loss, use_fast_ops
from minllama.peft import merge, save_adapter, trainable_parameters
from minllama.peft.dpo import (
    PairBatches,
    PreferenceLoss,
    dpo_loss,
    ipo_loss,
    score_preferences,
)
from minllama.peft.instruct import (
    PLAIN,
    Encoded,
    check_format,
    encode_conversations,
    encode_preferences,
)
from minllama.peft.records import is_records, read_conversations, read_preferences
from minllama.peft.sft import held_out_loss, with_prompt
from minllama.recipes.chat import converses
from minllama.recipes.finetune_options import DTYPES, METHODS, FinetuneOptions
from minllama.recipes.generate import check_device, tokenizer_of
from minllama.recipes.stopped import (
    CHECKPOINTS,
    OPTIONS,
    check_same,
    digest,
    make_folder,
    write_json,
)

FREE = (  # options that may change when a stopped run goes on
    "device", "save_every", "merge", "fresh", "out", "fast", "compile", "checkpointing",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What is learned and how it is scored: texts and answers, or preferences."""

    learn: list  # documents, or pairs of them
    held: list
    row: int  # tokens of a row
    loss: Callable
    batches: type[PackedBatches]
    score: Callable[[MinimalLlama], dict[str, float]]


def run_finetuning(options: FinetuneOptions) -> Run:
    """All of it: data, model, adapter, score, loop, score, files.

    Raises:
        ValueError: options that contradict each other, the model or the data.
    """
    device = check_device(options.device)
    out = Path(options.out).resolve()
    states = out / CHECKPOINTS
    resumes = latest_checkpoint(states) is not None and not options.fresh
    model = MinimalLlama.from_pretrained(options.model, dtype=DTYPES[options.dtype])
    tok = tokenizer_of(options.model)
    _check_length(options, model)
    read = [_read(path, options, model, tok) for path in _files(options)]
    facts = {**asdict(options), "data_sha256": digest(_bytes(read))}
    if resumes:
        check_same(facts, out, FREE)
    torch.manual_seed(options.seed)  # adapters are drawn alike when a run goes on
    METHODS[options.method].add(model.to(device), options)
    _prepare(options, model)
    task = _task(options, model, read)
    run = _new_run(options, model, task)
    _tell(options, run, task, device)
    before = task.score(model)
    print(f"before: {_words(before)}")
    if resumes:
        load_checkpoint(states, run, strict=False)  # of what learns
        print(f"going on from step {run.step} of {run.steps}")
    make_folder(out, resumes)
    write_json(out / OPTIONS, facts)
    _train(options, run, task, states)
    after = task.score(model)
    print(f"after:  {_words(after)}")
    write_json(out / "scores.json", {"before": before, "after": after})
    if any(in_turns for _, in_turns in read):  # it was taught to end its turns
        ends = sorted({*model.config.eos_ids, *tok.stop_ids})
        model.config = replace(model.config, eos_ids=tuple(ends))
    _save(options, model, tok, out)
    shutil.rmtree(states)  # the run is complete
    return run


def _prepare(options: FinetuneOptions, model: MinimalLlama) -> None:
    """How the model computes from here on, adapter and all."""
    if options.fast:
        use_fast_ops(model)
    if options.checkpointing:
        checkpoint_activations(model, options.checkpointing)
    if options.compile:
        for block in model.layers:
            block.forward = torch.compile(block.forward)


def _new_run(options: FinetuneOptions, model: MinimalLlama, task: Task) -> Run:
    """The run at its beginning."""
    batches = task.batches(task.learn, options.batch_size, task.row, options.seed)
    steps = options.steps
    if steps is None:
        whole = options.epochs * batches.batches_per_epoch() / options.accumulate
        steps = max(1, round(whole))
    method = METHODS[options.method]
    lr = options.lr or method.lr / (3 if options.dpo else 1)
    return Run(model, method.optimizer(model, options, lr, steps), batches, steps)


def _train(options: FinetuneOptions, run: Run, task: Task, states: Path) -> None:
    """The hub's loop, with a checkpoint of what learns now and then."""

    def save(run: Run) -> None:
        save_checkpoint(states, run, parts="trainable", keep=1)

    autocast = torch.bfloat16 if options.bf16 else None
    train(
        run.model,
        run.optimizer,
        run.batches,
        run.steps,
        schedule=warmup_cosine(run.steps, round(options.warmup * run.steps), floor=0.0),
        loss=_with_penalty(options, task.loss),
        accumulate=options.accumulate,
        autocast=autocast,
        hooks=(
            Progress(run.model.config, options.seq_len, dtype=autocast),  # type: ignore[arg-type]
            Curve(states.parent),
            every(options.save_every, save),
        ),
        run=run,
    )


def _with_penalty(
    options: FinetuneOptions, loss: Callable[[nn.Module, Batch], Tensor]
) -> Callable[[nn.Module, Batch], Tensor]:
    """The summed loss and what the method adds to its mean."""
    penalty = METHODS[options.method].penalty
    if penalty is None:
        return loss
    return lambda model, batch: loss(model, batch) + batch.counted() * penalty(model)


def _check_length(options: FinetuneOptions, model: MinimalLlama) -> None:
    """A row, and a prompt in front of it, must fit the context."""
    ahead = options.size if options.method in ("prompt", "prefix") else 0
    most = model.config.max_seq_len - ahead
    if options.seq_len > most:
        raise ValueError(
            f"seq_len={options.seq_len} exceeds what the model has room for; give "
            f"--seq-len {most} or less."
        )


def _files(options: FinetuneOptions) -> list[str]:
    first = options.data or options.dpo
    assert first is not None
    return [first, options.valid] if options.valid else [first]


def _read(
    path: str, options: FinetuneOptions, model: MinimalLlama, tok: Tokenizer
) -> tuple[list, bool]:
    """Documents of a file, and whether they are conversations in a chat format."""
    if not (options.dpo or is_records(path)):
        return encode_documents(read_documents(path), tok), False
    known = options.format or (None if converses(model, tok) else PLAIN)
    format = check_format(known, tok)
    if options.dpo:
        found = encode_preferences(read_preferences(path), tok, options.seq_len, format)
    else:
        found = encode_conversations(
            read_conversations(path), tok, options.seq_len, format
        )
    _tell_cuts(path, found, options.seq_len, format)
    return found.documents, format != PLAIN


def _tell_cuts(path: str, found: Encoded, seq_len: int, format: str) -> None:
    print(f"{path}: {len(found.documents)} records, format {format}")
    if found.cut:
        print(f"  {found.cut} of them lost the end of an answer at {seq_len} tokens")
    if found.dropped:
        print(f"  {found.dropped} more left out: their question alone fills a row")


def _bytes(read: list) -> Iterator[bytes]:
    """All that was read: documents, or both answers of each pair."""
    for documents, _ in read:
        for document in documents:
            for part in document if isinstance(document, tuple) else (document,):
                yield part.tobytes()


def _task(options: FinetuneOptions, model: MinimalLlama, read: list) -> Task:
    """Split what was read, and say how it is learned and scored."""
    learn = read[0][0]
    held = read[1][0] if options.valid else []
    if not options.valid and len(learn) > 1:
        order = np.random.default_rng(options.seed).permutation(len(learn))
        count = math.ceil(options.valid_share * len(learn))
        held = [learn[i] for i in sorted(order[:count])]
        learn = [learn[i] for i in sorted(order[count:])]
    row, size = options.seq_len, options.batch_size
    if options.method == "prompt":
        learn, held = (with_prompt(model, part, row) for part in (learn, held))
        row += options.size
    if options.dpo is None:

        def score(model: MinimalLlama) -> dict[str, float]:
            if not held:
                return {}
            return {"held-out loss": held_out_loss(model, held, row, size)}

        loss = fast_loss if options.fast else next_token_loss
        return Task(learn, held, row, loss, PackedBatches, score)
    each = partial(dpo_loss, beta=options.beta, label_smoothing=options.label_smoothing)
    if options.preference_loss == "ipo":
        each = partial(ipo_loss, beta=options.beta)
    loss = PreferenceLoss(each, options.beta)

    def rank(model: MinimalLlama) -> dict[str, float]:
        return asdict(score_preferences(model, held, loss, size)) if held else {}

    return Task(learn, held, row, loss, PairBatches, rank)


def _tell(options: FinetuneOptions, run: Run, task: Task, device: str) -> None:
    count = trainable_parameters(run.model)
    whole = sum(p.numel() for p in run.model.parameters())
    kind = "pairs" if options.dpo else "documents"
    lr = run.optimizer.param_groups[0]["lr"]
    print(
        f"{options.method}: {count:,} of {whole:,} parameters learn "
        f"({count / whole:.2%}) · {len(task.learn)} {kind} and {len(task.held)} held "
        f"out · {run.steps} steps at {lr:.1e} · {device}"
    )


def _words(score: dict[str, float]) -> str:
    told = [f"{name} {value:.4f}" for name, value in score.items()]
    return ", ".join(told) or "nothing was held out (--valid, --valid-share)"


def _save(
    options: FinetuneOptions, model: MinimalLlama, tok: Tokenizer, out: Path
) -> None:
    """The adapter; or the model, where all of it learned or it was asked for."""
    folder = out
    if not METHODS[options.method].whole:
        save_adapter(model, out, base_model=options.model)
        print(f"the adapter is in {out}")
        if not options.merge:
            print(
                "use it with load_adapter(model, folder), or give --merge for a model"
            )
            return
        folder = out / "merged"
        merge(model)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    print(f'the model is in {folder}; try: minllama generate "…" --model {folder}')
