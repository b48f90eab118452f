"""Score a model on a file: bits per byte, in the protocol of the model card."""

import torch

from minllama.architecture.data import read_documents
from minllama.architecture.evaluate import Score, score_documents
from minllama.architecture.model import MinimalLlama
from minllama.recipes.devices import check_device
from minllama.recipes.generate import tokenizer_of


def evaluate_file(
    path: str, model: str = "stories", device: str | None = None
) -> Score:
    """Print and return the score of a text file (or folder).

    Each document alone after one begin token, its first 512 tokens (or the model's
    context, if that is shorter), end token not counted, float32.

    Raises:
        ValueError: no such file or model.
    """
    documents = read_documents(path)
    llama = MinimalLlama.from_pretrained(
        model, dtype=torch.float32, device=check_device(device)
    )
    most = min(512, llama.config.max_seq_len)
    tok = tokenizer_of(model)
    score = score_documents(llama, tok, documents, max_tokens=most)
    print(
        f"{model} on {path}: {score.bits_per_byte:.4f} bits per byte\n"
        f"{len(documents):,} documents, {score.bytes:,} bytes and {score.tokens:,} "
        f"tokens scored (the first {most} of each), perplexity per token "
        f"{score.perplexity:.2f}"
    )
    return score
