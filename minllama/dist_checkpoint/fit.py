"""Does a checkpoint fit a model? Asked before anything is changed."""

from pathlib import Path

from torch import nn

from minllama.architecture.config import LlamaConfig
from minllama.architecture.weights_config import read_config
from minllama.dist_checkpoint.contents import model_tensors, unwrap
from minllama.dist_checkpoint.pieces import Stored

LISTED = 10  # wrong names in a message; the rest are counted
SHAPELESS = ("n_heads", "n_kv_heads", "head_dim", "norm_eps", "rope_theta",
             "rope_scaling", "sliding_window")  # fmt: skip
# of a config: other values would load, and compute something else


def check_config(path: Path, stored: LlamaConfig, model: nn.Module) -> None:
    """Refuse a model that has these shapes and computes something else.

    Raises:
        ValueError: with the fields that differ.
    """
    config = getattr(unwrap(model), "config", None)
    if not isinstance(config, LlamaConfig):
        return
    odd = [n for n in SHAPELESS if getattr(stored, n) != getattr(config, n)]
    if odd:
        said = ", ".join(
            f"{n}={getattr(config, n)!r} where the files say {getattr(stored, n)!r}"
            for n in odd
        )
        raise ValueError(
            f"{path / 'config.json'} is of another model: {said}. Build the model from "
            "the config of the files, and change it after loading."
        )


def check_model(
    path: Path,
    stored: dict[str, Stored],
    model: nn.Module,
    strict: bool,
    held: set[str],
) -> tuple[list[str], list[str]]:
    """Compare names and shapes; what the checkpoint lacks, what the model lacks.

    `held` are the names that any process has: a stage of a pipeline has some of them.

    Raises:
        ValueError: shapes differ, nothing is common, or (strict) a name lacks; or the
            config is another one. With the file and the name.
    """
    needed = model_tensors(model)
    left_alone = [name for name in needed if name not in stored]
    unused = [name for name in stored if name not in held]
    lines = []
    for name in needed.keys() & stored.keys():
        found, wanted = stored[name].shape, tuple(needed[name].shape)
        if found != wanted:
            file = stored[name].pieces[0].file.name
            lines.append(f"{name} {found} in {file}, where the model has {wanted}")
    if strict:
        lines += [f"{name} is missing" for name in left_alone]
        lines += [
            f"{name} in {stored[name].pieces[0].file.name} is not the model's"
            for name in unused
        ]
    if len(left_alone) == len(needed):
        lines.append("the two have no name in common")
    if lines:
        raise ValueError(_describe(path, sorted(lines), strict))
    if strict and (path / "config.json").is_file():
        check_config(path, read_config(path), model)
    return left_alone, unused


def _describe(path: Path, lines: list[str], strict: bool) -> str:
    more = [f"… and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    shown = "".join(f"\n  {line}" for line in lines[:LISTED] + more)
    part = ", or load a part of it with strict=False" if strict else ""
    return (
        f"{path} does not fit the model:{shown}\n"
        f"Build the model from the config of the checkpoint{part}."
    )
