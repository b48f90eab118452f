"""The hub: one Llama, and what every chapter needs of it.

Reading order: config, rope, layout, cache, model, generate; then families (the seams
in use) and surgery (the one tool of the chapters). The rest is what surrounds a model:
tokenizer and weights, data and train, evaluate and accounting. The functions `generate`
and `train` are taken from the modules of these names.
"""

from minllama.architecture.cache import (
    Caches,
    GrowingKVCache,
    KVCache,
    StaticCaches,
)
from minllama.architecture.config import LlamaConfig
from minllama.architecture.evaluate import score_documents
from minllama.architecture.families import Mistral, Qwen2, Qwen3
from minllama.architecture.generate import Sampling, decode, stream
from minllama.architecture.layout import Layout, packed
from minllama.architecture.model import (
    Attention,
    AttentionCore,
    Block,
    FeedForward,
    MinimalLlama,
    RMSNorm,
)
from minllama.architecture.rope import Rope, Rotation
from minllama.architecture.surgery import replace_modules
from minllama.architecture.tokenizer import Tokenizer
from minllama.architecture.train import Run, next_token_loss

__all__ = [
    "Attention",
    "AttentionCore",
    "Block",
    "Caches",
    "FeedForward",
    "GrowingKVCache",
    "KVCache",
    "Layout",
    "LlamaConfig",
    "MinimalLlama",
    "Mistral",
    "Qwen2",
    "Qwen3",
    "RMSNorm",
    "Rope",
    "Rotation",
    "Run",
    "Sampling",
    "StaticCaches",
    "Tokenizer",
    "decode",
    "next_token_loss",
    "packed",
    "replace_modules",
    "score_documents",
    "stream",
]
