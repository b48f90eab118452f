"""What a model costs, before it is built: parameters, FLOPs, bytes.

A matrix of P weights costs 2 P FLOPs a token (a multiply and an add each), and twice
that again in the backward pass. Attention adds 4 H d for each pair of a token and a key
it sees: 2 for the score, 2 for the sum over values.
"""

import torch

from minllama.architecture.config import LlamaConfig
from minllama.architecture.model import MinimalLlama

PEAK_FLOPS = {  # dense bf16 matrix rate, FLOP/s, by the vendors' datasheets
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def count_parameters(config: LlamaConfig) -> int:
    """Parameters of a model of this config; a tied head counts once."""
    with torch.device("meta"):
        model = MinimalLlama.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def forward_flops(config: LlamaConfig, seq_len: int) -> float:
    """FLOPs per token of a forward pass over texts of seq_len tokens, causal.

    Matrices, head included (tied or not, it is multiplied), plus attention with the
    keys that a token sees on average, (seq_len + 1) / 2. The embedding is a look-up.
    """
    d, q_dim = config.dim, config.n_heads * config.head_dim
    kv_dim = config.n_kv_heads * config.head_dim
    block = 2 * d * q_dim + 2 * d * kv_dim + 3 * d * config.ffn_dim
    matrices = config.n_layers * block + d * config.vocab_size
    attention = config.n_layers * 4 * q_dim * (seq_len + 1) / 2
    return 2 * matrices + attention


def training_flops(config: LlamaConfig, seq_len: int) -> float:
    """FLOPs per token of forward and backward: three times the forward."""
    return 3 * forward_flops(config, seq_len)


def peak_flops(device: torch.device | str) -> float | None:
    """The datasheet's dense bf16 rate of a known GPU in FLOP/s, else None."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for key, rate in PEAK_FLOPS.items() if key in name), None)
