"""MinimalLlama: a whole modern Llama stack, small enough to read, fast enough to use.

>>> from minllama import MinimalLlama, LlamaConfig, Tokenizer, generate, stream
"""

from minllama.architecture import LlamaConfig, MinimalLlama, Tokenizer, stream
from minllama.architecture.generate import generate

__all__ = ["LlamaConfig", "MinimalLlama", "Tokenizer", "generate", "stream"]
