"""What the tests of all chapters share: a device, a tiny config, one of each model.

    from tests.conftest import DEVICE, make_model, random_tokens, tiny_config

The fixture `any_model` hands a test one model after the other: every family, Llama
3.1's scaled positions, a window, a subclass that overrides a seam; tied and untied.
"""

import os
import warnings

import pytest
import torch
from torch import Tensor, nn

from minllama.architecture.config import LlamaConfig
from minllama.architecture.families import Mistral, Qwen2, Qwen3
from minllama.architecture.model import Attention, Block, MinimalLlama

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":  # read by Triton where a kernel is defined, so before any is
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(
    1
)  # tiny tensors: a second thread mostly waits, 10 x on a busy CPU

SCALING = {  # Llama 3.1's, for a model that was made on 48 tokens
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}


def tiny_config(**changes) -> LlamaConfig:
    """D = 32, 2 layers, 4 query heads on 2 key heads, 97 tokens; changed as told."""
    sizes = {
        "vocab_size": 97,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "ffn_dim": 48,
        "max_seq_len": 256,
    }
    return LlamaConfig(**{**sizes, **changes})


class GatedAttention(Attention):
    """A sigmoid gate on the heads' output: the subclass among the models."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.gate_proj = nn.Linear(config.dim, config.n_heads * config.head_dim)

    def mix(self, x: Tensor, layout, cache=None) -> Tensor:
        return super().mix(x, layout, cache) * self.gate_proj(x).sigmoid()


class GatedBlock(Block):
    attention_class = GatedAttention


class GatedLlama(MinimalLlama):
    block_class = GatedBlock


MODELS: dict[str, tuple[type[MinimalLlama], dict]] = {
    "llama": (MinimalLlama, {}),
    "llama31": (MinimalLlama, {"rope_theta": 100.0, "rope_scaling": SCALING}),
    "mistral": (Mistral, {"sliding_window": 7}),
    "qwen2": (Qwen2, {}),
    "qwen3": (Qwen3, {"head_dim": 12}),
    "gated": (GatedLlama, {}),
}


def widen(model: nn.Module) -> nn.Module:
    """Random weights under which a mistake shows: attention is peaked, no norm is one.

    With the usual standard deviation of 0.02 a tiny model attends to all tokens alike,
    and a swapped head or a wrong angle changes nothing that a test could see.
    """
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=1.3 / weight.size(-1) ** 0.5)
        elif name.endswith("bias"):
            nn.init.normal_(weight, std=0.5)
        else:
            nn.init.normal_(weight, mean=1.0, std=0.3)
    return model


def make_model(name: str, **changes) -> MinimalLlama:
    """One of MODELS with random weights, in evaluation mode, on the device."""
    family, settings = MODELS[name]
    model = widen(family(tiny_config(**{**settings, **changes})))
    return model.to(DEVICE).eval()


def random_tokens(batch: int, length: int, vocab_size: int = 97) -> Tensor:
    """(batch, length) on the device."""
    return torch.randint(0, vocab_size, (batch, length), device=DEVICE)


class CountingBackend:
    """For torch.compile: runs a graph as it is, and counts how many were made."""

    def __init__(self) -> None:
        self.graphs = 0
        with warnings.catch_warnings():  # of PyTorch about itself, where it compiles
            warnings.simplefilter("ignore")
            torch.compiler.reset()

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(params=[f"{name}{tie}" for name in MODELS for tie in ("", "-tied")])
def any_model(request) -> MinimalLlama:
    """Each kind of model, untied and tied, float32, freshly made for each test."""
    name, _, tied = request.param.partition("-")
    return make_model(name, tie_embeddings=bool(tied))
