"""Who trains against whom: models of one base, ours and the peers', that take turns."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minllama.architecture.config import LlamaConfig
from minllama.architecture.model import MinimalLlama
from minllama.fast_ops import linear_cross_entropy

GIB = 2**30
TINY = LlamaConfig(
    vocab_size=512, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=128
)
OURS = {  # name: fused operators, compiled blocks; all but the first: the linear loss
    "ours: eager": (False, False),
    "ours: fast_ops": (True, False),
    "ours: compiled": (False, True),
    "ours: fast_ops + compiled": (True, True),
}


@dataclass
class Contestant:
    """A model, and what its training step is."""

    name: str
    model: nn.Module
    loss: Callable[[Tensor], Tensor]  # of tokens (B, T + 1): the mean, in nats
    optimizer: torch.optim.Optimizer

    def step(self, tokens: Tensor) -> Tensor:
        loss = self.loss(tokens)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def resident(self) -> int:
        """Bytes of weights and optimizer states."""
        states = [t for s in self.optimizer.state.values() for t in s.values()]
        held = [*self.model.parameters(), *self.model.buffers(), *states]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in held}
        return sum(storage.nbytes() for storage in storages.values())


def build(config: LlamaConfig, device: str, dtype: torch.dtype) -> MinimalLlama:
    """Random weights, made where they will be."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return MinimalLlama.from_config(config)
    finally:
        torch.set_default_dtype(torch.float32)


def adamw(model: nn.Module, lr: float = 1e-4) -> torch.optim.AdamW:
    """Fused, over what learns; its means have the weights' dtype."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, fused=trained[0].is_cuda)


def our_twin(base: MinimalLlama) -> MinimalLlama:
    """A model of ours over the same memory."""
    with torch.device("meta"):
        model = MinimalLlama.from_config(base.config)
    model.load_state_dict(base.state_dict(), assign=True)
    model.tie_weights()
    return model


def our_loss(model: MinimalLlama, fused: bool) -> Callable[[Tensor], Tensor]:
    """The mean loss: logits and PyTorch's cross-entropy, or the linear loss."""

    def loss(tokens: Tensor) -> Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
        if not fused:
            logits = model(inputs).flatten(0, 1).float()
            return F.cross_entropy(logits, targets.flatten())
        hidden = model.hidden_states(inputs)
        return linear_cross_entropy(hidden, model.lm_head.weight, targets)

    return loss


def transformers_twin(base: MinimalLlama):
    """transformers' model over the same memory."""
    import transformers

    c, weight = base.config, base.embed_tokens.weight
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.max_seq_len, tie_word_embeddings=c.tie_embeddings,
        rope_parameters={
            "rope_type": "default", **(c.rope_scaling or {}), "rope_theta": c.rope_theta
        },
        bos_token_id=None, eos_token_id=None, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        twin = transformers.LlamaForCausalLM(config)
    state = {
        name if name.startswith("lm_head") else f"model.{name}": tensor
        for name, tensor in base.state_dict().items()
    }
    twin.load_state_dict(state, assign=True)
    twin.tie_weights()
    with torch.device(weight.device):
        twin.model.rotary_emb = type(twin.model.rotary_emb)(config=config)
    return twin


def transformers_loss(model: nn.Module, rotate: Callable) -> Callable[[Tensor], Tensor]:
    """Its mean loss. `rotate` is put where its layers look for their rotation: Liger
    replaces it for all models of a process, so each puts back its own."""
    from transformers.models.llama import modeling_llama

    def loss(tokens: Tensor) -> Tensor:
        before = modeling_llama.apply_rotary_pos_emb
        modeling_llama.apply_rotary_pos_emb = rotate
        try:
            out = model(
                input_ids=tokens[:, :-1], labels=tokens[:, :-1],
                shift_labels=tokens[:, 1:].contiguous(), use_cache=False,
            )  # fmt: skip
            return out.loss
        finally:
            modeling_llama.apply_rotary_pos_emb = before

    return loss


def with_liger(twin, kernels: bool) -> Callable:
    """Give transformers' model Liger's linear loss, and its kernels; its rotation."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    rotate = modeling_llama.apply_rotary_pos_emb
    apply_liger_kernel_to_llama(
        model=twin, rope=kernels, rms_norm=kernels, swiglu=kernels
    )
    own = modeling_llama.apply_rotary_pos_emb
    modeling_llama.apply_rotary_pos_emb = rotate
    return own


def plain_rotation() -> Callable:
    """transformers' own."""
    from transformers.models.llama import modeling_llama

    return modeling_llama.apply_rotary_pos_emb


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_of(one: Contestant, tokens: Tensor) -> tuple[int, int]:
    """Bytes of one step at its fullest, and after the forward pass; its own only."""
    if not tokens.is_cuda:
        return 0, 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated() - one.resident()
    loss = one.loss(tokens)
    held = torch.cuda.memory_allocated() - others
    del loss
    one.step(tokens)
    return torch.cuda.max_memory_allocated() - others, held


def take_turns(runs: dict[str, Callable], repeats: int, many: int = 1) -> dict:
    """Name to seconds of each turn, `many` runs a turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            for _ in range(many):
                run()
            wait()
            times[name].append((time.perf_counter() - start) / many)
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(turns) for name, turns in times.items()}
