"""Saving: files that appear complete or not at all.

What is written is what a plain model of the class holds: same names, same shapes. A
model whose layers were rewritten (quantized, adapted, sharded) has other names, no
other program would read them, and so it is refused here: merge, gather, or keep it
with the chapter dist_checkpoint.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minllama.architecture.config import LlamaConfig
from minllama.architecture.model import MinimalLlama
from minllama.architecture.weights_config import config_json, generation_json

SHARD_BYTES = 5_000_000_000
LISTED = 10  # wrong keys named in a message; the rest are counted


class _Undrawn(TorchFunctionMode):
    """Leave out the drawing of normal numbers: the meta device keeps none.

    Asked for them all the same, torch imports 900 modules: two seconds and 150 MB.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (nn.init.normal_, Tensor.normal_):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def build_shapes(family: type[MinimalLlama], config: LlamaConfig) -> MinimalLlama:
    """A model on the meta device: shapes without bytes."""
    with torch.device("meta"), _Undrawn():
        return family(config)


def weight_shapes(model: MinimalLlama) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a file must hold: a tied head counts once."""
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if model.config.tie_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def save_pretrained(
    model: MinimalLlama, folder: str | Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a folder that this library and transformers read back.

    The files appear complete or not at all: they are written beside, then moved, and
    `config.json` comes last, so that a folder half saved does not load.

    Args:
        model: of `MinimalLlama` or a subclass, its linear layers still plain.
        folder: is made; weights of an earlier model in it are replaced.
        shard_bytes: most bytes of weights in one file.

    Raises:
        ValueError: a module was rewritten (quantized, adapted, sharded), so that the
            names no longer are those of its class.
    """
    tensors = savable_tensors(model)
    kind = model.config.model_type or model.model_type
    dtype = model.embed_tokens.weight.dtype
    config = config_json(model.config, kind, dtype)
    with fresh_folder(folder, ("*.safetensors", "*.safetensors.index.json")) as fresh:
        _write_shards(tensors, fresh, shard_bytes)
        _write_json(generation_json(model.config), fresh / "generation_config.json")
        _write_json(config, fresh / "config.json")


def savable_tensors(model: MinimalLlama) -> dict[str, Tensor]:
    """The weights by name, a tied head left out.

    Raises:
        ValueError: as `save_pretrained`.
    """
    needed = weight_shapes(build_shapes(type(model), model.config))
    state = model.state_dict()
    if model.config.tie_embeddings:
        head = state.pop("lm_head.weight", None)
        if head is None or head.data_ptr() != state["embed_tokens.weight"].data_ptr():
            raise ValueError(
                "config.tie_embeddings=True, but lm_head and embed_tokens do not share "
                "their weight; call model.tie_weights() or set it to False."
            )
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = sorted(
        n for n in found.keys() | needed.keys() if found.get(n) != needed.get(n)
    )
    if wrong:
        raise ValueError(
            f"{len(wrong)} weights are not those of a plain {type(model).__name__}: "
            f"{', '.join(wrong[:LISTED])}. Merge adapters first; keep what was "
            "quantized or sharded with save_checkpoint."
        )
    odd = {n: type(t).__name__ for n, t in state.items() if type(t) is not Tensor}
    odd |= {n: "meta tensor" for n, t in state.items() if t.is_meta}
    if odd:
        name, kind = next(iter(odd.items()))
        raise ValueError(
            f"{name} is a {kind}, which holds not all of its bytes here; gather the "
            "weights first (dist_checkpoint: consolidate)."
        )
    return state


@contextmanager
def fresh_folder(
    folder: str | Path, stale: tuple[str, ...], last: str = "config.json"
) -> Iterator[Path]:
    """A temporary place whose files move into `folder` when all of them are written.

    Args:
        folder: where they go.
        stale: patterns of files there that the new ones replace.
        last: the file without which the folder does not load: it goes first and
            comes last.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield fresh
        (folder / last).unlink(missing_ok=True)
        for old in (path for pattern in stale for path in folder.glob(pattern)):
            old.unlink()
        mode = (fresh / last).stat().st_mode  # safetensors makes its files private
        for file in sorted(fresh.iterdir(), key=lambda file: file.name == last):
            file.chmod(mode)
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(fresh)


def _write_shards(tensors: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
    shards = _split(tensors, shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        one = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file = one if len(shards) > 1 else "model.safetensors"
        shard = _separate({_their_name(name): tensors[name] for name in names})
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(index, folder / "model.safetensors.index.json")


def _split(tensors: dict[str, Tensor], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _their_name(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, each alone in its storage: so safetensors wants them."""
    separate, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor
    return separate


def _write_json(content: dict, path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
