"""Meta's own folders: `params.json` and `consolidated.00.pth`, `.01.pth`, …

The same model under other names, with two differences that matter.

Meta's rope pairs neighbouring channels (0, 1), (2, 3), …; ours, as Hugging Face's,
pairs (i, i + d/2). The rows of wq and wk within each head are reordered on the way in,
evens first, then odds, and back on the way out:

    neighbours  a0 b0 a1 b1 a2 b2   ->   halves  a0 a1 a2 b0 b1 b2

And a big model comes in 2, 4 or 8 files, one for each GPU of Meta's tensor parallelism:
what makes heads or channels is cut by rows, what gathers them by columns, norms are
repeated. `rope.freqs`, a table that can be computed, is passed over.

`params.json` says `use_scaled_rope` and not by how much. Meta's code has 8 as a
constant, right for 3.1 and 3.3; Llama 3.2 1B and 3B were trained with 32. They alone
are 2048 or 3072 wide with a tied head, so that is how they are known.
"""

import json
import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minllama.architecture.config import LlamaConfig, llama3_scaling
from minllama.architecture.model import MinimalLlama
from minllama.architecture.weights_config import read_generation
from minllama.architecture.weights_files import (
    StoredTensor,
    StoredWeights,
    TensorReader,
    list_pickle,
    read_json,
)
from minllama.architecture.weights_save import fresh_folder, savable_tensors

ROWS, COLUMNS, REPEATED = 0, 1, -1  # how files cut a weight
PARTS = {
    "tok_embeddings.weight": ("embed_tokens.weight", ROWS),  # Llama 2: columns
    "attention_norm.weight": ("input_layernorm.weight", REPEATED),
    "attention.wq.weight": ("self_attn.q_proj.weight", ROWS),
    "attention.wk.weight": ("self_attn.k_proj.weight", ROWS),
    "attention.wv.weight": ("self_attn.v_proj.weight", ROWS),
    "attention.wo.weight": ("self_attn.o_proj.weight", COLUMNS),
    "ffn_norm.weight": ("post_attention_layernorm.weight", REPEATED),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", ROWS),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", COLUMNS),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", ROWS),
    "norm.weight": ("norm.weight", REPEATED),
    "output.weight": ("lm_head.weight", ROWS),
}
OURS = {ours: (theirs, cut) for theirs, (ours, cut) in PARTS.items()}
TURNED = ("attention.wq.weight", "attention.wk.weight")
UNBUILT = (
    "quantization_args",
    "lora_args",
    "moe_args",
    "vision_chunk_size",
    "sliding_window",
)
LAYER = re.compile(r"^(layers\.\d+\.)(.+)$")


def to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from neighbouring pairs to halves. (H d, D) -> (H d, D).

    Example:
        >>> to_halves(torch.arange(6)[:, None], head_dim=6).flatten().tolist()
        [0, 2, 4, 1, 3, 5]
    """
    heads = weight.unflatten(0, (-1, head_dim // 2, 2))  # (H, d/2, 2, D)
    return heads.transpose(1, 2).flatten(0, 2)


def to_neighbours(weight: Tensor, head_dim: int) -> Tensor:
    """The way back from `to_halves`. (H d, D) -> (H d, D)."""
    heads = weight.unflatten(0, (-1, 2, head_dim // 2))  # (H, 2, d/2, D)
    return heads.transpose(1, 2).flatten(0, 2)


def open_meta(folder: Path) -> StoredWeights:
    """What a Meta folder holds, looked at but not read.

    Raises:
        ValueError: a file is missing, broken, would run code, or fits no other.
    """
    params = read_json(folder / "params.json")
    refused = [key for key in UNBUILT if params.get(key) is not None]
    if refused:
        raise ValueError(
            f"{folder / 'params.json'} has {', '.join(refused)}, which is not built "
            "here. Take the plain text model, or the one in Hugging Face's format."
        )
    shards = [list_pickle(file) for file in _shard_files(folder)]
    _check_same_keys(shards)
    wholes, cuts = {}, {}
    for key in (key for key in shards[0] if not key.endswith("rope.freqs")):
        name, cuts[key] = _our_name(key, shards[0][key].shape, params)
        wholes[name] = _whole([shard[key] for shard in shards], cuts[key])
    tied = "lm_head.weight" not in wholes or _is_tied(shards)
    reader = TensorReader()
    if tied:
        wholes.pop("lm_head.weight", None)
    config = _config(folder, params, wholes, tied)

    def copy_into(name: str, out: Tensor) -> None:
        key = wholes[name].key
        pieces = (out,)  # zip: the first of equal copies
        if cuts[key] != REPEATED:
            pieces = out.chunk(len(shards), dim=cuts[key])
        for piece, shard in zip(pieces, shards):
            tensor = reader.read(shard[key])
            turned = key.endswith(TURNED)
            piece.copy_(to_halves(tensor, config.head_dim) if turned else tensor)

    return StoredWeights(
        path=folder, config=config, tensors=wholes, copy_into=copy_into
    )


def _shard_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("consolidated.*.pth"))
    expected = [folder / f"consolidated.{i:02}.pth" for i in range(len(files))]
    if not files or files != expected:
        seen = ", ".join(file.name for file in files) or "none"
        raise ValueError(
            f"{folder} has params.json, but of consolidated.00.pth, "
            f"consolidated.01.pth, … it has: {seen}. Download what is missing, or the "
            "model in Hugging Face's format."
        )
    return files


def _check_same_keys(shards: list[dict[str, StoredTensor]]) -> None:
    for shard in shards[1:]:
        odd = sorted(shard.keys() ^ shards[0].keys())
        if odd:
            file = next(iter({**shard, **shards[0]}.values())).file
            raise ValueError(
                f"{file.parent}: {odd[0]} is in one of the {len(shards)} files only; "
                "they are not of one model. Download them again."
            )


def _our_name(key: str, shape: tuple, params: dict) -> tuple[str, int]:
    layer = LAYER.match(key)
    prefix, part = layer.groups() if layer else ("", key)
    name, cut = PARTS.get(part, (f"{part} (no name of Meta's)", REPEATED))
    if key == "tok_embeddings.weight" and shape[-1] != params.get("dim"):
        cut = COLUMNS  # Llama 1 and 2 cut the width of the embedding
    return prefix + name, cut


def _whole(pieces: list[StoredTensor], cut: int) -> StoredTensor:
    first = pieces[0]
    for piece in pieces:
        if piece.shape != first.shape:
            raise ValueError(
                f"{piece.file} holds {piece.key} {piece.shape}, {first.file.name} has "
                f"it {first.shape}; they are not of one model. Download them again."
            )
    shape = list(first.shape)
    if cut != REPEATED and len(shape) > cut:
        shape[cut] *= len(pieces)
    return first._replace(shape=tuple(shape))


def _is_tied(shards: list[dict[str, StoredTensor]]) -> bool:
    for shard in shards:
        if "tok_embeddings.weight" not in shard:
            return False  # reported as missing
        head, body = shard["output.weight"], shard["tok_embeddings.weight"]
        if head.shape != body.shape:
            return False
        reader = TensorReader()
        head, body = reader.read(head), reader.read(body)
        if not (torch.equal(head[:1], body[:1]) and torch.equal(head, body)):
            return False
    return True


def _config(folder: Path, params: dict, wholes: dict, tied: bool) -> LlamaConfig:
    path = folder / "params.json"
    absent = [key for key in ("dim", "n_layers", "n_heads") if key not in params]
    if absent:
        raise ValueError(f"{path} lacks {', '.join(absent)}. Download it again.")
    seen = {}
    for name in ("embed_tokens.weight", "layers.0.mlp.gate_proj.weight"):
        if name not in wholes or len(wholes[name].shape) != 2:
            raise ValueError(
                f"{folder}: the files hold no matrix {OURS[name.split('.0.')[-1]][0]}, "
                "from which a size is read; they are no whole Llama."
            )
        seen[name] = wholes[name].shape[0]
    vocab_size = params.get("vocab_size", -1)
    if vocab_size == -1:  # Llama 1 and 2 left it to the tokenizer
        vocab_size = seen["embed_tokens.weight"]
    scaling = None
    if params.get("use_scaled_rope"):
        guess = _scaling_factor(params["dim"], tied)
        scaling = llama3_scaling(params.get("rope_scaling_factor", guess))
    theta = params.get("rope_theta", 10000.0)  # Llama 1 and 2 had it in their code
    fields = {
        "vocab_size": vocab_size,
        "dim": params["dim"],
        "n_layers": params["n_layers"],
        "n_heads": params["n_heads"],
        "n_kv_heads": params.get("n_kv_heads"),
        "head_dim": params.get("head_dim"),
        "ffn_dim": seen["layers.0.mlp.gate_proj.weight"],
        "norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_embeddings": tied,
        "model_type": "llama",
    }
    try:
        return LlamaConfig(**fields, **_limits(folder, vocab_size, theta, scaling))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _scaling_factor(dim: int, tied: bool) -> float:
    return 32.0 if tied and dim in (2048, 3072) else 8.0


def _limits(folder: Path, vocab_size: int, theta: float, scaling: dict | None) -> dict:
    """Context and border tokens, which Meta keeps in its code, not in its files.

    Llama 1 and 2 look alike here: both are given Llama 2's 4,096 tokens.
    """
    said = read_generation(folder)
    length = 131072 if scaling else (4096 if theta == 10000.0 else 8192)
    bos_id, eos_ids = None, ()
    if vocab_size == 32000:  # Llama 1 and 2
        bos_id, eos_ids = 1, (2,)
    elif vocab_size == 128256:  # Llama 3
        bos_id, eos_ids = 128000, (128001, 128008, 128009)
    return {
        "max_seq_len": said["max_seq_len"] or length,
        "bos_id": bos_id if said["bos_id"] is None else said["bos_id"],
        "eos_ids": said["eos_ids"] or eos_ids,
    }


def save_meta(model: MinimalLlama, folder: str | Path, shards: int = 1) -> None:
    """Write a folder of Meta's format.

    What has no place in `params.json` (context, border tokens) goes into a
    `generation_config.json`, which Meta's code passes over.

    Args:
        model: a plain Llama.
        folder: is made; it must not be a Hugging Face folder.
        shards: files, as many as GPUs of Meta's tensor parallelism.

    Raises:
        ValueError: Meta's code could not run the model, or not in so many parts.
    """
    _check_writable(model.config, model.model_type, Path(folder), shards)
    tensors = savable_tensors(model)
    with fresh_folder(folder, ("consolidated.*.pth",), last="params.json") as fresh:
        for index in range(shards):
            piece = partial(_piece, head_dim=model.config.head_dim, at=(index, shards))
            shard = dict(piece(name, tensor) for name, tensor in tensors.items())
            if model.config.tie_embeddings:  # one storage: written once
                shard["output.weight"] = shard["tok_embeddings.weight"]
            torch.save(shard, fresh / f"consolidated.{index:02}.pth")
        said = {
            "bos_token_id": model.config.bos_id,
            "eos_token_id": list(model.config.eos_ids),
            "max_length": model.config.max_seq_len,
        }
        (fresh / "generation_config.json").write_text(json.dumps(said, indent=2))
        params = json.dumps(_params(model.config), indent=2)
        (fresh / "params.json").write_text(params)


def _check_writable(config: LlamaConfig, kind: str, folder: Path, shards: int) -> None:
    if kind != "llama":
        raise ValueError(
            f"model_type={kind!r}; Meta's format holds Llama only: use hf."
        )
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds config.json, which would win; take another.")
    if config.head_dim * config.n_heads != config.dim:
        raise ValueError(
            f"head_dim={config.head_dim} is not dim / n_heads = {config.dim} / "
            f"{config.n_heads}; Meta's code knows no other. Use hf."
        )
    scaling = config.rope_scaling
    if scaling is not None and scaling != llama3_scaling(scaling["factor"]):
        raise ValueError(
            f"rope_scaling={scaling}; Meta's code fixes all of it but the factor: "
            f"{llama3_scaling(scaling['factor'])}. Use hf."
        )
    for name in ("n_kv_heads", "ffn_dim", "vocab_size"):
        if shards < 1 or getattr(config, name) % shards:
            raise ValueError(
                f"shards={shards} does not divide {name}={getattr(config, name)}; each "
                "file holds an equal part."
            )


def _piece(name: str, tensor: Tensor, head_dim: int, at: tuple) -> tuple[str, Tensor]:
    index, shards = at
    layer = LAYER.match(name)
    prefix, part = layer.groups() if layer else ("", name)
    theirs, cut = OURS[part]
    if cut != REPEATED:
        tensor = tensor.chunk(shards, dim=cut)[index]
    if theirs in TURNED:
        tensor = to_neighbours(tensor, head_dim)
    return prefix + theirs, tensor.cpu().clone()  # torch.save writes whole storages


def _params(config: LlamaConfig) -> dict:
    """`params.json`. Meta computes ffn_dim from two numbers: these give it exactly."""
    params = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": 1,
        "ffn_dim_multiplier": (config.ffn_dim + 0.5) / int(8 * config.dim / 3),
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
    }
    if config.rope_scaling is not None:
        params["use_scaled_rope"] = True
        factor = config.rope_scaling["factor"]
        if factor != _scaling_factor(config.dim, config.tie_embeddings):
            params["rope_scaling_factor"] = factor  # Meta's code would take 8
    return params
