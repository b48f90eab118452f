"""LLaMA-Adapter: a learned prompt in the upper layers, behind a gate that starts shut.

    y = attention(q, k, v) + g softmax(q k_p / sqrt d) v_p      k_p, v_p from the prompt

The prompt has a softmax of its own, so that g = 0 leaves the layer as it was.
Paper: Zhang et al. 2023, arXiv:2303.16199, section 3.2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minllama.architecture.layout import Layout
from minllama.architecture.model import MinimalLlama
from minllama.peft.adapter import Adapter, Spec
from minllama.peft.attach import attach
from minllama.peft.base import model_dtype, place


class GatedPromptCore(Adapter):
    """An attention core beside a gated look at a learned prompt."""

    def __init__(
        self, base: nn.Module, spec: Spec, attention: nn.Module, width: int, place: dict
    ) -> None:
        super().__init__(base, spec)
        self.attention: list = [attention]  # not registered: it has its place elsewhere
        self.prompt = nn.Parameter(torch.empty(spec.settings["size"], width, **place))
        self.gate = nn.Parameter(torch.empty(1, **place))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The prompt normal, the gate shut."""
        nn.init.normal_(self.prompt)
        nn.init.zeros_(self.gate)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        y = self.base(q, k, v, layout)
        if self.strength == 0:
            return y
        project = self.attention[0].project
        _, pk, pv = project(self.prompt.to(q.dtype)[None])
        pk, pv = (p.expand(q.size(0), -1, -1, -1).transpose(1, 2) for p in (pk, pv))
        seen = F.scaled_dot_product_attention(
            q.transpose(1, 2), pk, pv, enable_gqa=q.size(2) != pk.size(1)
        )
        return y + self.gate.to(y.dtype) * seen.transpose(1, 2)


def add_llama_adapter(
    model: MinimalLlama,
    size: int = 10,
    layers: int | None = None,
    name: str = "default",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Freeze the model, then let its last `layers` layers look at a learned prompt.

    Args:
        model: a Llama of this library, changed in place and returned.
        size: tokens of each layer's prompt.
        layers: how many, counted from the top; None: all but the lowest two, or all of
            a model that has no more (the paper adapts 30 of 32).
        name: of the adapter.
        dtype: of what is learned; None: the layer's.

    Raises:
        ValueError: numbers out of range.
    """
    config = model.config
    N = config.n_layers
    layers = max(N - 2, min(N, 2)) if layers is None else layers
    if size < 1 or not 1 <= layers <= N:
        raise ValueError(
            f"size={size} must be at least 1, and layers={layers} within 1..{N}."
        )
    spec = Spec(name, "llama_adapter", {"size": size, "layers": layers})
    activations = model_dtype(model)

    def make(at: str, core: nn.Module) -> GatedPromptCore:
        attention = model.get_submodule(at.rpartition(".")[0])
        where = place(attention.get_submodule("k_proj"), dtype, activations)
        return GatedPromptCore(core, spec, attention, config.dim, where)

    names = [f"layers.{i}.self_attn.core" for i in range(N - layers, N)]
    return attach(model, spec, names, make)
