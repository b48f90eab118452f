"""The `minllama` command: parses, then calls a recipe."""

import argparse
import os
import re
import sys
import tomllib
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_args, get_type_hints

EPILOG = """\
examples
  minllama generate "Once upon a time"
  minllama generate "The dragon" --temperature 0 --max-new-tokens 80
  minllama train --data my_texts/ --out runs/mine
  minllama generate "Once" --model runs/mine
  minllama finetune --data pirate.txt --method lora --out runs/pirate --merge
  torchrun --nproc-per-node 4 -m minllama.recipes.train --data my_texts/ --out runs/mine
  minllama evaluate --model stories-mini some_text.txt
  minllama info llama-3.2-1b
  minllama memory llama-3.2-1b --dtype int4 --batch-size 4 --bandwidth 4608
  minllama memory llama-3.1-8b --training --checkpointing --seq-len 8192

A model is a shipped name (stories, stories-mini) or a folder: of Hugging Face, of Meta,
or one that `minllama train` wrote.
"""


def generate(options: argparse.Namespace) -> None:
    """Continue a text."""
    from minllama.recipes.generate import generate_text

    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    generate_text(
        prompt,
        model=options.model,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        stop=tuple(options.stop),
        seed=options.seed,
        device=options.device,
        sharded=options.sharded,
    )


def chat(options: argparse.Namespace) -> None:
    """Talk with a model, or tell a story together."""
    from minllama.architecture.generate import Sampling
    from minllama.recipes.chat import chat_with

    how = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )
    chat_with(
        options.model,
        how,
        options.system,
        options.chat,
        256 if options.max_new_tokens is None else options.max_new_tokens,
        options.device,
    )


def train(options: argparse.Namespace) -> None:
    """Train a model on text of your own."""
    from minllama.recipes.train import TrainOptions, run_training

    named = {field.name: getattr(options, field.name) for field in fields(TrainOptions)}
    run_training(TrainOptions(**named))


def finetune(options: argparse.Namespace) -> None:
    """Teach a model your text, answers or preferences."""
    from minllama.recipes.finetune import run_finetuning
    from minllama.recipes.finetune_options import FinetuneOptions

    names = [field.name for field in fields(FinetuneOptions)]
    run_finetuning(FinetuneOptions(**{name: getattr(options, name) for name in names}))


def evaluate(options: argparse.Namespace) -> None:
    """Score a model on a text: bits per byte."""
    from minllama.recipes.evaluate import evaluate_file

    evaluate_file(options.file, options.model, options.device)


def info(options: argparse.Namespace) -> None:
    """Tell a model's numbers, or the names that exist."""
    from minllama.recipes.info import describe

    print(describe(options.name))


def memory(options: argparse.Namespace) -> None:
    """Predict bytes and FLOPs of generation or training."""
    from minllama.recipes.memory import MemoryOptions, report

    named = {f.name: getattr(options, f.name) for f in fields(MemoryOptions)}
    print(report(MemoryOptions(**named)))


def convert(options: argparse.Namespace) -> int:
    """Rewrite a model in another format or precision."""
    from minllama.recipes.convert import convert

    return convert(
        options.source, options.target, options.dtype, options.format, options.shards
    )


def verify(options: argparse.Namespace) -> int:
    """Check the files of a model: keys, shapes, NaN, checksums."""
    from minllama.recipes.convert import verify

    return verify(options.folder)


def make_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    from minllama.recipes.finetune_options import FinetuneOptions
    from minllama.recipes.memory import MemoryOptions
    from minllama.recipes.train import TrainOptions

    parser = argparse.ArgumentParser(
        prog="minllama",
        description="A whole modern Llama stack, small enough to read.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(run: Callable) -> argparse.ArgumentParser:
        summary = (run.__doc__ or "").strip()
        sub = commands.add_parser(
            run.__name__,
            help=summary,
            description=summary,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run)
        return sub

    _add_generate(command(generate))
    _add_chat(command(chat))
    sub = command(train)
    sub.add_argument("--config", metavar="FILE", help="a TOML file of these flags")
    _add_fields(sub, TrainOptions)
    _add_fields(command(finetune), FinetuneOptions)
    sub = command(evaluate)
    sub.add_argument("file", help="a UTF-8 text, <|endoftext|> between documents")
    _add_model(sub)
    sub = command(info)
    sub.add_argument("name", nargs="?", help="registered name, shipped name, or folder")
    _add_fields(command(memory), MemoryOptions)
    sub = command(convert)
    sub.add_argument("source", help="what --model takes, or a training checkpoint")
    sub.add_argument("target", help="a new folder")
    sub.add_argument(
        "--dtype", help="float32, bfloat16, float16; as it is if not given"
    )
    kinds = ("hf", "meta", "checkpoint")
    sub.add_argument("--format", default="hf", choices=kinds, help="of target")
    sub.add_argument("--shards", type=int, default=1, help="files of meta, checkpoint")
    sub = command(verify)
    sub.add_argument("folder", help="of Hugging Face or Meta")
    return parser


def _add_model(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", default="stories", help="a shipped name or a folder")
    sub.add_argument("--device", help="cpu, cuda, mps; the fastest if not given")


def _add_generate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("prompt", help="the text to continue; - reads standard input")
    _add_model(sub)
    _add_sampling(sub)
    flag = sub.add_argument
    flag("--stop", action="append", default=[], help="end before this text; repeatable")
    flag("--sharded", action="store_true", help="torchrun: by FSDP, not by matrices")


def _add_chat(sub: argparse.ArgumentParser) -> None:
    _add_model(sub)
    _add_sampling(sub)
    flag = sub.add_argument
    flag("--system", help="what the assistant is told first")
    flag("--chat", action="store_true", help="use the chat format in any case")


def _add_sampling(sub: argparse.ArgumentParser) -> None:
    flag = sub.add_argument
    flag("--max-new-tokens", type=int, help="at most; 256 or what the context holds")
    flag("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    flag("--top-k", type=int, help="draw from the k likeliest")
    flag(
        "--top-p", type=float, default=0.95, help="draw from the likeliest that reach p"
    )
    flag(
        "--min-p", type=float, help="draw from tokens this likely, relative to the best"
    )
    flag("--repetition-penalty", type=float, default=1.0, help="above 1: fewer repeats")
    flag("--seed", type=int, help="the same seed gives the same text")


def _add_fields(sub: argparse.ArgumentParser, options: type) -> None:
    """A flag for each field of a dataclass; its docstring holds the help."""
    described = dict(re.findall(r"^ {8}(\w+): (.*?)$", options.__doc__ or "", re.M))
    hints = get_type_hints(options)
    for field in fields(options):
        kind = next(
            (t for t in get_args(hints[field.name]) if t is not type(None)), None
        )
        kind = kind or hints[field.name]
        name = "--" + field.name.replace("_", "-")
        words = described.get(field.name, "")
        if field.name == "name":  # the one that needs no flag
            sub.add_argument("name", help=words)
            continue
        if kind is bool:
            sub.add_argument(name, action="store_true", help=words)
            continue
        required = field.default is MISSING
        default = None if required else field.default
        sub.add_argument(
            name, type=kind, default=default, required=required, help=words
        )


def _with_config(arguments: list[str]) -> list[str]:
    """`--config FILE.toml`: its lines as flags, before those that were typed.

    Raises:
        ValueError: no such file, or no TOML of plain values.
    """
    arguments = [part for a in arguments for part in (
        a.split("=", 1) if a.startswith("--config=") else [a])]  # fmt: skip
    if "--config" not in arguments[:-1]:
        return arguments
    at = arguments.index("--config")
    path, flags = Path(arguments[at + 1]), []
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no TOML file ({error}).") from None
    for key, value in content.items():
        if key == "config" or isinstance(value, (dict, list)):
            raise ValueError(f"{path}: {key} is no plain value; write `{key} = …`.")
        name = "--" + key.replace("_", "-")
        flags += [name] * value if isinstance(value, bool) else [f"{name}={value}"]
    return [*arguments[:1], *flags, *arguments[1:at], *arguments[at + 2 :]]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; a wrong value is told in one line, without a traceback."""
    try:
        given = _with_config(sys.argv[1:] if arguments is None else arguments)
        options = make_parser().parse_args(given)
        return options.run(options) or 0
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, RuntimeError, OSError) as error:
        print(f"minllama: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nminllama: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
