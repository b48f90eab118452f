"""Weights in, weights out: every key accounted for, one tensor in hand at a time.

A model is built on the meta device, where a tensor is a shape and no bytes; the names
and shapes are compared with what the files say; only then is the first byte read. So a
wrong file is refused in a second, with all that is wrong in one message, and the peak
of memory is one copy of the model and one tensor.

Read: folders of Hugging Face (safetensors or, without running code, pytorch_model.bin),
folders of Meta (weights_meta.py), llama2.c's files (weights_llama2c.py). Written: the
first (weights_save.py) and the second.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from minllama.architecture.families import FAMILIES, class_for
from minllama.architecture.model import MinimalLlama
from minllama.architecture.weights_config import (
    read_config,
    read_dtype,
)
from minllama.architecture.weights_files import (
    StoredTensor,
    StoredWeights,
    TensorReader,
    check_dtype,
    list_pickle,
    list_safetensors,
    read_json,
)
from minllama.architecture.weights_save import (
    LISTED,
    build_shapes,
    save_pretrained,
    weight_shapes,
)

__all__ = ["load_pretrained", "open_weights", "save_pretrained", "shipped_names"]

ASSETS = Path(__file__).parents[1] / "assets"
HARMLESS = ("rotary_emb.inv_freq",)  # computed, not learned; files of 2023 hold it


def load_pretrained(
    cls: type[MinimalLlama],
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    new: Iterable[str] = (),
) -> MinimalLlama:
    """A model with the weights of a folder, in eval mode.

    Args:
        cls: MinimalLlama, where the folder decides the class; or a subclass: it stays.
        folder: the name of a shipped model, a folder of Hugging Face or Meta, or a
            `.bin` file of llama2.c.
        dtype: of all weights. None: what the files hold, bit for bit; float32 for the
            shipped models, which are stored in half precision only to stay small.
        device: where the weights go, each straight from the file.
        new: parameters of a subclass that the files need not hold, as names or patterns
            (`"value_head.*"`). They keep the values that the constructor drew, for
            which the model is built in earnest instead of on the meta device.

    Raises:
        ValueError: no such folder, a broken file, or keys that do not fit (all of them
            are listed).
    """
    check_dtype(dtype)
    stored = open_weights(folder)
    if dtype is None:
        dtype = torch.float32 if folder in shipped_names() else stored.dtype
    family = class_for(cls, stored.config.model_type)
    model = build_checked(family, stored)
    new = tuple(new)
    problems = key_problems(model, stored, new)
    if problems:
        raise ValueError(describe_problems(family, stored, problems))
    if new:
        with torch.device(device), _default_dtype(dtype):
            model = family(stored.config)
    needed = weight_shapes(model)
    for name in (name for name in stored.tensors if name in needed):  # in file order
        out = torch.empty(needed[name], dtype=dtype, device=device)
        stored.copy_into(name, out)
        _assign(model, name, out)
    model.tie_weights()
    check_complete(model)
    return model.eval()


def open_weights(folder: str | Path) -> StoredWeights:
    """What a folder, a file or a shipped name holds, looked at but not read.

    Raises:
        ValueError: there is nothing of that name, or nothing that is known.
    """
    if isinstance(folder, str) and folder in shipped_names():
        return _open_hugging_face(ASSETS / folder)
    path = Path(folder)
    others = ("*.safetensors", "*.pth", "pytorch_model*.bin")  # may lie beside it
    readable = any(any(path.glob(pattern)) for pattern in others)
    if path.suffix == ".gguf" or (not readable and any(path.glob("*.gguf"))):
        raise ValueError(
            f"{path} holds GGUF weights, quantized for llama.cpp; the chapter quantize "
            "will read them. Take the model's safetensors instead."
        )
    if path.is_file() and path.suffix == ".bin":
        from minllama.architecture.weights_llama2c import open_llama2c

        return open_llama2c(path)
    if (path / "config.json").is_file():
        return _open_hugging_face(path)
    if (path / "params.json").is_file():
        from minllama.architecture.weights_meta import open_meta

        return open_meta(path)
    raise ValueError(_no_model(path))


def shipped_names() -> list[str]:
    """The models inside the package."""
    return sorted(path.parent.name for path in ASSETS.glob("*/config.json"))


def _no_model(path: Path) -> str:
    if path.is_file():
        what = f"{path} is a file; name the folder that it lies in"
    elif path.is_dir():
        seen = ", ".join(sorted(p.name for p in path.iterdir())[:LISTED]) or "nothing"
        what = f"{path} has neither config.json nor params.json (it has {seen})"
    else:
        what = f"{str(path)!r} is no folder"
    shipped = ", ".join(shipped_names()) or "none"
    return (
        f"{what}. Give a shipped name ({shipped}), or a folder with config.json and "
        "model.safetensors, or with params.json and consolidated.00.pth. Nothing is "
        "downloaded by itself: see download_weights.md."
    )


def _open_hugging_face(folder: Path) -> StoredWeights:
    config = read_config(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(folder):
        lister = list_safetensors if file.suffix == ".safetensors" else list_pickle
        for key, tensor in lister(file).items():
            name = key.removeprefix("model.")
            if name in tensors:
                raise ValueError(
                    f"{file} holds {key}, which {tensors[name].file.name} holds, too; "
                    "one of the two is left over from another model: remove it."
                )
            if not name.endswith(HARMLESS):
                tensors[name] = tensor
    reader = TensorReader()
    return StoredWeights(
        path=folder,
        config=config,
        tensors=tensors,
        copy_into=lambda name, out: out.copy_(reader.read(tensors[name])),
        stated_dtype=read_dtype(folder),
        cut=lambda name, part: reader.read_part(tensors[name], part),
    )


def _weight_files(folder: Path) -> list[Path]:
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).is_file():
            return [folder / stem]
        if (folder / f"{stem}.index.json").is_file():
            return _indexed_files(folder / f"{stem}.index.json")
    raise ValueError(
        f"{folder} has a config.json and no weights; model.safetensors (or its parts "
        "and model.safetensors.index.json) should lie beside it. Download them."
    )


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(
                f"{index}: weight_map names {name!r}; parts lie in the same folder, so "
                "a plain file name is expected."
            )
    files = [index.parent / name for name in sorted(set(names))]
    absent = [file.name for file in files if not file.is_file()]
    if absent or not files:
        some = ", ".join(absent[:LISTED]) or "no part at all"
        raise ValueError(
            f"{index} names {len(files)} parts, of which {len(absent)} are not there: "
            f"{some}. Download them."
        )
    return files


def build_checked(family: type[MinimalLlama], stored: StoredWeights) -> MinimalLlama:
    """The model without its bytes.

    Raises:
        ValueError: sizes that cannot be meant, or a subclass that cannot be built from
            its config alone.
    """
    config = stored.config
    if config.n_layers > len(stored.tensors):  # before a billion blocks are built
        raise ValueError(
            f"{stored.path}: n_layers={config.n_layers} but the files hold "
            f"{len(stored.tensors)} tensors; each layer needs at least one. One of the "
            "two is damaged or incomplete."
        )
    try:
        return build_shapes(family, config)
    except (RuntimeError, OverflowError, TypeError) as error:
        if family not in FAMILIES.values():
            raise ValueError(
                f"{family.__name__}(config) failed on the meta device "
                f"({type(error).__name__}: {str(error).splitlines()[0]}); a subclass "
                "is built from its config alone, and reads no value of a tensor there."
            ) from error
        sizes = ("vocab_size", "dim", "ffn_dim", "n_heads", "n_kv_heads", "head_dim")
        asked = ", ".join(f"{name}={getattr(config, name)}" for name in sizes)
        raise ValueError(
            f"{stored.path}: no tensor can be as large as {asked} ask for "
            f"({str(error).splitlines()[0]}). The config is damaged."
        ) from None


def key_problems(
    model: MinimalLlama, stored: StoredWeights, new: tuple[str, ...] = ()
) -> dict[str, list[str]]:
    """Missing, extra and misshapen keys, each as a line; empty lists left out.

    Raises:
        ValueError: a pattern of `new` fits no parameter, or a tied head is no tie.
    """
    needed = weight_shapes(model)
    for pattern in new:
        if not any(fnmatchcase(name, pattern) for name in needed):
            raise ValueError(
                f"new={pattern!r} fits no parameter of {type(model).__name__}; its own "
                f"are among {', '.join(_own_names(model)) or 'none'}."
            )
    found = {name: tensor.shape for name, tensor in stored.tensors.items()}
    if model.config.tie_embeddings and "lm_head.weight" in found:
        _check_tied(stored)
        del found["lm_head.weight"]
    optional = {n for n in needed if any(fnmatchcase(n, p) for p in new)}
    problems = {
        "missing": [
            f"{name} {needed[name]}" for name in needed.keys() - found.keys() - optional
        ],
        "extra": [f"{name} {found[name]}" for name in found.keys() - needed.keys()],
        "misshapen": [
            f"{name} {found[name]}, where {needed[name]} is needed"
            for name in found.keys() & needed.keys()
            if found[name] != needed[name]
        ],
    }
    return {kind: sorted(lines) for kind, lines in problems.items() if lines}


def _own_names(model: MinimalLlama) -> list[str]:
    tops = {name.split(".")[0] for name in model.state_dict()}
    return sorted(tops)


def _check_tied(stored: StoredWeights) -> None:
    head = stored.tensors["lm_head.weight"]
    body = stored.tensors.get("embed_tokens.weight")
    if body is None or head.shape != body.shape:
        return  # reported as missing or misshapen
    if not torch.equal(
        stored.read("lm_head.weight"), stored.read("embed_tokens.weight")
    ):
        raise ValueError(
            f"{stored.path}: tie_embeddings=True, but lm_head.weight is not "
            "embed_tokens.weight; set tie_word_embeddings to false in config.json."
        )


def describe_problems(family: type, stored: StoredWeights, problems: dict) -> str:
    """What `key_problems` found, as a message that names the remedy."""
    lines = [f"{stored.path} does not fit {family.__name__}:"]
    for kind, found in problems.items():
        lines.append(f"  {len(found)} {kind}:")
        lines += [f"    {line}" for line in found[:LISTED]]
        if len(found) > LISTED:
            lines.append(f"    … and {len(found) - LISTED} more")
    lines.append(
        "The files are incomplete, or the config is another model's. Parameters that a "
        "subclass adds are named with new=(…) and keep the values they are born with."
    )
    return "\n".join(lines)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    old = getattr(owner, leaf)
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
    setattr(owner, leaf, tensor)


def check_complete(model: nn.Module) -> None:
    """Refuse a model of which something stayed on the meta device.

    Raises:
        ValueError: with the names.
    """
    left = [name for name, t in model.named_buffers() if t.is_meta]
    left += [name for name, t in model.named_parameters() if t.is_meta]
    if left:
        raise ValueError(
            f"{type(model).__name__} keeps {', '.join(left[:LISTED])} outside of its "
            "state dict, so no file can fill it; compute it in forward, or register it "
            "as persistent and name it with new=(…)."
        )
