"""Activation checkpointing: keep a block's input only, and run it again when needed.

Between forward and backward pass a block of Llama keeps about 17 tensors the size of
its input, most of all in the feed-forward. `full` keeps the input alone and repeats the
block's forward pass: a third more FLOPs. `selective` keeps the results of attention
and of matrix products, which are dear, and repeats norms, rotations and SwiGLU, which
are cheap.

Papers: Chen et al. 2016, arXiv:1604.06174 · selective: Korthikanti et al. 2022,
2205.05198.
"""

from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    checkpoint,
    create_selective_checkpoint_contexts,
)

from minllama.architecture.layout import Layout
from minllama.architecture.model import MinimalLlama

Model = TypeVar("Model", bound=MinimalLlama)

POLICIES = ("full", "selective")
aten = torch.ops.aten
KEPT = [  # by `selective`: attention and matrix products, whatever backend computes
    getattr(aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "linear",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
    if hasattr(aten, name)
]


def checkpoint_activations(model: Model, policy: str = "full", every: int = 1) -> Model:
    """Trade FLOPs for memory in the backward pass. Loss and gradients do not change.

    In place: blocks are still themselves and keep their names. Without gradients, or
    with a cache, nothing is done differently. Before `shard`, after adapters.

    Args:
        model: of MinimalLlama or a subclass.
        policy: full or selective.
        every: checkpoint each block whose index is a multiple; 2: every second one.

    Raises:
        ValueError: no such policy, `every` below 1, or checkpointed already.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r} must be one of {', '.join(POLICIES)}.")
    if every < 1:
        raise ValueError(f"every={every} must be at least 1.")
    if any("forward" in vars(block) for block in model.layers):
        raise ValueError(
            "a block's forward was replaced already; checkpoint_activations(model) is "
            "called once (keep_activations(model) undoes it)."
        )
    for block in list(model.layers)[::every]:
        block.forward = Recompute(block, policy)
    return model


def keep_activations(model: Model) -> Model:
    """Undo `checkpoint_activations`."""
    for block in model.layers:
        vars(block).pop("forward", None)
    return model


class Recompute:
    """A block's forward under checkpointing. A copy of the block gets its own."""

    def __init__(self, block: nn.Module, policy: str) -> None:
        self.block, self.policy = block, policy

    def __call__(self, x: Tensor, layout: Layout, cache=None) -> Tensor:
        # not bound to the block: torch.compile would look that up as block.forward,
        # and find itself
        forward = type(self.block).forward
        if cache is not None or not torch.is_grad_enabled():
            return forward(self.block, x, layout, cache)
        kind: dict = {"use_reentrant": False}
        if self.policy == "selective":
            kind["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT)
        return checkpoint(forward, self.block, x, layout, **kind)
