"""Qwen2, Qwen3, Mistral: the same model but for a line or two, as subclasses.

This is how a model of your own is made, too: override the seam that differs, name the
new part up the tree (`attention_class`, `block_class`), and nothing else.
"""

import torch
from torch import Tensor, nn

from minllama.architecture.config import LlamaConfig
from minllama.architecture.layout import Layout
from minllama.architecture.model import Attention, Block, MinimalLlama, RMSNorm


class Qwen2Attention(Attention):
    """Queries, keys and values carry a bias; the output does not."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            layer.bias = nn.Parameter(torch.zeros(layer.out_features))


class Qwen2Block(Block):
    """A block around `Qwen2Attention`."""

    attention_class = Qwen2Attention


class Qwen2(MinimalLlama):
    """Qwen2 and Qwen2.5. Report: arXiv:2412.15115."""

    block_class = Qwen2Block
    model_type = "qwen2"


class Qwen3Attention(Attention):
    """Each head's query and key is normalized before it is turned."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x)
        return self.q_norm(q), self.k_norm(k), v


class Qwen3Block(Block):
    """A block around `Qwen3Attention`."""

    attention_class = Qwen3Attention


class Qwen3(MinimalLlama):
    """The dense Qwen3 models. Report: arXiv:2505.09388."""

    block_class = Qwen3Block
    model_type = "qwen3"


class MistralAttention(Attention):
    """Each token sees only its newest `sliding_window` tokens, where there is one."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.window = config.sliding_window

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        if self.window is not None:
            layout = layout.within(self.window, k.size(1))
        return self.core(q, k, v, layout)


class MistralBlock(Block):
    """A block around `MistralAttention`."""

    attention_class = MistralAttention


class Mistral(MinimalLlama):
    """Mistral 7B; version 0.1 has a window of 4,096. Report: arXiv:2310.06825."""

    block_class = MistralBlock
    model_type = "mistral"
    has_window = True


FAMILIES: dict[str, type[MinimalLlama]] = {
    family.model_type: family for family in (MinimalLlama, Qwen2, Qwen3, Mistral)
}


def class_for(cls: type[MinimalLlama], model_type: str | None) -> type[MinimalLlama]:
    """The class that builds `model_type`: the family's for `MinimalLlama`, else `cls`.

    A class of your own may state a `model_type` of its own.

    Raises:
        ValueError: an unknown type, or one that is not what the subclass builds.
    """
    kind = model_type or cls.model_type
    if cls is not MinimalLlama and kind == cls.model_type:
        return cls
    if kind not in FAMILIES:
        raise ValueError(
            f"model_type={kind!r} is none of {', '.join(sorted(FAMILIES))}; subclass "
            "MinimalLlama to build another."
        )
    if cls is MinimalLlama:
        return FAMILIES[kind]
    raise ValueError(
        f"model_type={kind!r} is not what {cls.__name__} builds "
        f"({cls.model_type!r}); derive it from {FAMILIES[kind].__name__}."
    )
