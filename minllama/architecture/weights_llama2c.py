"""llama2.c's `.bin` files: a header of seven numbers, then float32 and nothing else.

No names: where a weight lies follows from its turn. All layers' copies of one kind come
together, as C likes them. Two of the three versions are read:

    0  7 x int32; the embedding first; two tables of rope to skip; a vocabulary written
       negative says that the head has weights of its own
    1  "ak42", version, 7 x int32, one byte "head is the embedding", zeros up to 256

Rope pairs neighbours, as Meta's does. Source: karpathy/llama2.c, export.py.
"""

import struct
from collections.abc import Iterable
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from minllama.architecture.config import LlamaConfig
from minllama.architecture.model import MinimalLlama
from minllama.architecture.weights_files import StoredTensor, StoredWeights
from minllama.architecture.weights_meta import to_halves, to_neighbours
from minllama.architecture.weights_save import savable_tensors

MAGIC = b"24ka"  # 0x616b3432 as a little-endian number
HEADER = ("dim", "ffn_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "length")
TURNED = ("q_proj.weight", "k_proj.weight")
SKIPPED = "rope table"
LAYER = {  # in version 0's order; D width, Q = H d, K = kv heads x d, F inner width
    "input_layernorm": "D",
    "self_attn.q_proj": "QD",
    "self_attn.k_proj": "KD",
    "self_attn.v_proj": "KD",
    "self_attn.o_proj": "DQ",
    "post_attention_layernorm": "D",
    "mlp.gate_proj": "FD",
    "mlp.down_proj": "DF",
    "mlp.up_proj": "FD",
}
NORMS = [kind for kind in LAYER if LAYER[kind] == "D"]  # version 1 has them first
MATRICES = [kind for kind in LAYER if LAYER[kind] != "D"]

Entry = tuple[str, tuple[int, ...]]  # name and shape


def open_llama2c(path: Path) -> StoredWeights:
    """What a `.bin` file of llama2.c holds, looked at but not read.

    Raises:
        ValueError: the file is quantized, cut off, or no file of llama2.c.
    """
    with path.open("rb") as file:
        start = file.read(256)
    version, at, numbers, tied = _header(path, start)
    config = _config(path, numbers, tied)
    _check_size(path, version, at, config)
    where, tensors = at // 4, {}  # counted in floats
    places = {}
    for name, shape in _order(config, version):
        places[name] = where
        where += prod(shape)
        if name != SKIPPED:
            tensors[name] = StoredTensor(shape, torch.float32, path, name)

    def copy_into(name: str, out: Tensor) -> None:
        end = places[name] + out.numel()
        floats = torch.from_file(str(path), size=end)[places[name] :]
        tensor = floats.view(tensors[name].shape)
        turned = name.endswith(TURNED)
        out.copy_(to_halves(tensor, config.head_dim) if turned else tensor)

    return StoredWeights(path=path, config=config, tensors=tensors, copy_into=copy_into)


def _header(path: Path, start: bytes) -> tuple[int, int, tuple[int, ...], bool]:
    """Version, where the floats begin, the seven numbers, and if the head is tied."""
    if start[:2] == b"PK" or start[:1] == b"\x80":
        raise ValueError(
            f"{path} is a pickle of PyTorch, no file of llama2.c; name the folder that "
            "it lies in, with its config.json."
        )
    if len(start) < 28 or (start[:4] == MAGIC and len(start) < 256):
        raise ValueError(
            f"{path} has {len(start)} bytes, less than a header of llama2.c. Download "
            "it again."
        )
    if start[:4] != MAGIC:
        numbers = struct.unpack("<7i", start[:28])
        return 0, 28, (*numbers[:5], abs(numbers[5]), numbers[6]), numbers[5] > 0
    version = struct.unpack("<i", start[4:8])[0]
    if version != 1:
        raise ValueError(
            f"{path} is version {version} of llama2.c's format; version 2 is quantized "
            "(Q8_0). Export version 0 or 1: python export.py model.bin --version 1."
        )
    return 1, 256, struct.unpack("<7i", start[8:36]), start[36] == 1


def _config(path: Path, numbers: tuple[int, ...], tied: bool) -> LlamaConfig:
    sizes = dict(zip(HEADER, numbers))
    length = sizes.pop("length")
    try:
        return LlamaConfig(
            **sizes,
            max_seq_len=length,
            tie_embeddings=tied,
            bos_id=1 if sizes["vocab_size"] > 2 else None,
            eos_ids=(1, 2) if sizes["vocab_size"] > 2 else (),  # BOS divides stories
            model_type="llama",
        )
    except ValueError as error:
        raise ValueError(
            f"{path}: {error} The header says {numbers}: this is no file of llama2.c, "
            "or a damaged one."
        ) from None


def _check_size(path: Path, version: int, at: int, config: LlamaConfig) -> None:
    """Compare with the size that the header promises, before a layer is listed."""
    entries = _order(replace(config, n_layers=1), version)
    floats = 0
    for name, shape in entries:
        copies = config.n_layers if name.startswith("layers.") else 1
        floats += copies * prod(shape)
    size, expected = path.stat().st_size, at + 4 * floats
    if size != expected:
        raise ValueError(
            f"{path} has {size:,} bytes where its header promises {expected:,} "
            f"(n_layers={config.n_layers}, dim={config.dim}, "
            f"vocab_size={config.vocab_size}). Download it again."
        )


def _order(config: LlamaConfig, version: int) -> list[Entry]:
    """Names and shapes, in the order of the file."""
    d = config.head_dim
    sizes = {
        "D": config.dim,
        "Q": config.n_heads * d,
        "K": config.n_kv_heads * d,
        "F": config.ffn_dim,
    }

    def layers(kinds: Iterable[str]) -> list[Entry]:
        return [
            (f"layers.{i}.{kind}.weight", tuple(sizes[side] for side in LAYER[kind]))
            for kind in kinds
            for i in range(config.n_layers)
        ]

    matrix = (config.vocab_size, config.dim)
    body, norm = ("embed_tokens.weight", matrix), ("norm.weight", (config.dim,))
    head = [] if config.tie_embeddings else [("lm_head.weight", matrix)]
    if version == 1:
        return [*layers(NORMS), norm, body, *layers(MATRICES), *head]
    return [body, *layers(LAYER), norm, (SKIPPED, (config.max_seq_len, d)), *head]


def save_llama2c(model: MinimalLlama, path: str | Path) -> None:
    """Write version 0, which every program of llama2.c's family reads.

    Raises:
        ValueError: that program could not run the model.
    """
    config = model.config
    plain = model.model_type == "llama" and config.rope_scaling is None
    narrow = config.head_dim * config.n_heads == config.dim
    if not (plain and narrow and config.rope_theta == 10000.0):
        raise ValueError(
            f"model_type={model.model_type!r}, rope_theta={config.rope_theta}, "
            f"rope_scaling={config.rope_scaling}, head_dim={config.head_dim}; llama2.c "
            "runs a Llama of rope_theta=10000.0, no scaling, head_dim = dim / n_heads."
        )
    tensors = savable_tensors(model)
    positions = torch.arange(config.max_seq_len)
    angle = positions[:, None] * model.rope.speeds(positions)  # (max_seq_len, d/2)
    tensors[SKIPPED] = torch.cat([angle.cos(), angle.sin()])
    numbers = [getattr(config, name) for name in HEADER[:5]]
    vocab_size = config.vocab_size if config.tie_embeddings else -config.vocab_size
    with Path(path).open("wb") as file:
        file.write(struct.pack("<7i", *numbers, vocab_size, config.max_seq_len))
        for name, _ in _order(config, version=0):
            tensor = tensors[name].float().cpu()
            if name.endswith(TURNED):
                tensor = to_neighbours(tensor, config.head_dim)
            file.write(tensor.contiguous().numpy().tobytes())
