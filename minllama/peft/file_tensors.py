"""The PEFT library's names for an adapter's tensors, and ours: one table.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight      theirs
                     layers.0.self_attn.q_proj  .a                      ours

Some are stored with other shapes there, or as what a weight became and not as what was
added to it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from minllama.peft.adalora import AdaLoRALinear
from minllama.peft.adapter import Adapter
from minllama.peft.base import innermost
from minllama.peft.dora import DoRALinear
from minllama.peft.houlsby import HoulsbyLinear
from minllama.peft.ia3 import IA3Linear
from minllama.peft.llama_adapter import GatedPromptCore
from minllama.peft.lora_init import SplitLoRALinear
from minllama.peft.lora_layers import LoRAEmbedding, LoRALinear
from minllama.peft.prefix import PrefixCore
from minllama.peft.prompt import PromptEmbedding
from minllama.peft.saved import BiasLinear, TrainedCopy
from minllama.peft.targets import outer_modules
from minllama.peft.tokens import TokenRows
from minllama.peft.vera import VeRALinear

PREFIX = "base_model.model."
ADDED = ("_checkpoint_wrapped_module.", "_orig_mod.")  # by wrappers, into names

LORA = {"a": "lora_A.weight", "b": "lora_B.weight"}
TENSORS: dict[type, dict[str, str]] = {
    LoRALinear: LORA,
    SplitLoRALinear: LORA,
    DoRALinear: {**LORA, "m": "lora_magnitude_vector"},
    LoRAEmbedding: {"a": "lora_embedding_A", "b": "lora_embedding_B"},
    IA3Linear: {"l": "ia3_l"},
    VeRALinear: {"b": "vera_lambda_b", "d": "vera_lambda_d"},
    AdaLoRALinear: {"a": "lora_A", "e": "lora_E", "b": "lora_B"},
    GatedPromptCore: {"prompt": "adaption_prompt", "gate": "adaption_gate"},
    HoulsbyLinear: {n: n for n in ("down", "down_bias", "up", "up_bias")},
}


def plain_name(name: str) -> str:
    """A module's name without what wrappers around blocks put into it."""
    for word in ADDED:
        name = name.replace(word, "")
    return name


def their_module(name: str) -> str:
    """Our module name -> theirs, without the prefix of files."""
    name = plain_name(name).removesuffix(".core")
    return name if name == "lm_head" else f"model.{name}"


def our_module(name: str) -> str:
    """The other way round."""
    return name.removeprefix("model.")


def chains(model: nn.Module, name: str) -> Iterator[tuple[str, Adapter]]:
    """Every adapter called `name`, with the name of the layer that it adapts."""
    for at, layer in outer_modules(model).items():
        while isinstance(layer, Adapter):
            if layer.spec.name == name:
                yield at, layer
            layer = layer.base


def stored(adapter: Adapter, at: str, kin: list[Adapter]) -> dict[str, Tensor]:
    """The tensors of one adapter by their full names in a file.

    Args:
        adapter: whose they are.
        at: the name of its layer.
        kin: the adapters of the same name on the same layer.
    """
    there = PREFIX + their_module(at)
    if isinstance(adapter, TrainedCopy):
        tuned = adapter.spec.method == "norm_tuning" and not adapter.beside
        inner = ".ln_tuning_layers" if tuned else ""
        named = adapter.copy.named_parameters()
        return {f"{there}{inner}.{name}": p for name, p in named}
    if isinstance(adapter, TokenRows):
        inner = "" if adapter.spec.method == "trainable_tokens" else ".token_adapter"
        return {f"{there}{inner}.trainable_tokens_delta": adapter.rows}
    if isinstance(adapter, BiasLinear):
        old = getattr(innermost(adapter), "bias", None)
        inner = ".base_layer" if len(kin) > 1 else ""
        new = adapter.bias if old is None else old + adapter.bias
        return {f"{there}{inner}.bias": new}
    table = TENSORS[type(adapter)]
    return {
        f"{there}.{theirs}": their_shape(adapter, getattr(adapter, ours))
        for ours, theirs in table.items()
    }


def their_shape(adapter: Adapter, tensor: Tensor) -> Tensor:
    """A tensor in the shape that it has in their files."""
    if isinstance(adapter, IA3Linear):
        return tensor[None] if adapter.scales_input else tensor[:, None]
    if isinstance(adapter, AdaLoRALinear) and tensor.dim() == 1:
        return tensor[:, None]
    if isinstance(adapter, GatedPromptCore) and tensor.dim() == 2:
        return tensor[None]
    return tensor


def flat_prompt(found: list[tuple[str, Adapter]]) -> Tensor | None:
    """What a prompt or a prefix is saved as: `prompt_embeddings`; None: no prompt."""
    cores = [one for _, one in found if isinstance(one, PrefixCore)]
    if cores:
        return torch.cat([core.flat() for core in cores], dim=-1)
    for _, one in found:
        if isinstance(one, PromptEmbedding):
            return one.prompt()
    return None


def adapter_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """All tensors of an adapter by their names in a file. Sharded ones stay sharded."""
    found = list(chains(model, name))
    prompt = flat_prompt(found)
    if prompt is not None:
        return {"prompt_embeddings": prompt}
    tensors: dict[str, Tensor] = {}
    tied_rows = any(
        isinstance(a, TokenRows) and at == "embed_tokens" for at, a in found
    )
    for at, adapter in found:
        if isinstance(adapter, TokenRows) and at == "lm_head" and tied_rows:
            if adapter.spec.method != "trainable_tokens" and shares_rows(found):
                continue  # theirs follows the embedding
        kin = [other for place, other in found if place == at]
        tensors |= stored(adapter, at, kin)
        if isinstance(adapter, VeRALinear):
            tensors["base_model.vera_A"] = adapter.shared_a
            tensors["base_model.vera_B"] = adapter.shared_b
    return tensors


def shares_rows(found: list[tuple[str, Adapter]]) -> bool:
    """Whether the head's trained rows are the embedding's."""
    rows = [one.rows for _, one in found if isinstance(one, TokenRows)]
    return len(rows) > len({id(p) for p in rows})


@torch.no_grad()
def fill(adapter: Adapter, at: str, kin: list[Adapter], tensors: dict) -> set[str]:
    """Copy the file's tensors into one adapter; the names that were used.

    Raises:
        ValueError: one is missing or of another shape.
    """
    wanted = stored(adapter, at, kin)
    for key, like in wanted.items():
        if key not in tensors:
            raise ValueError(f"{key} is missing in the file, which is not whole.")
        if tuple(tensors[key].shape) != tuple(like.shape):
            raise ValueError(
                f"{key} has shape {tuple(tensors[key].shape)} in the file; this model "
                f"needs {tuple(like.shape)}."
            )
        value = tensors[key].to(like.device)
        if isinstance(adapter, BiasLinear):
            old = getattr(innermost(adapter), "bias", None)
            adapter.bias.copy_(value if old is None else value - old)
        elif isinstance(adapter, (TrainedCopy, TokenRows)):
            like.copy_(value)
        else:
            like.copy_(value)  # a view of the parameter, if of another shape
    return set(wanted)
