"""Trained side by side with the PEFT library: 20 steps of AdamW in float64, alike."""

import peft.tuners.adaption_prompt.layer as adaption
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minllama.peft import RankAllocator, load_adapter, orthogonality_loss
from tests.peft.library import (
    METHODS,
    load_ours,
    load_theirs,
    make_exact,
    our_logits,
    quiet_add,
    quiet_save,
    their_logits,
)

STEPS = 20
NETWORKS = ("prefix-projected", "p-tuning")  # files hold only what they make


class ExactSoftmax:
    """torch.nn.functional whose softmax does not round to float32."""

    def __getattr__(self, name):
        return getattr(F, name)

    @staticmethod
    def softmax(x, dim, dtype=None):
        return F.softmax(x, dim=dim)


def make_pair(name, bases, tmp_path) -> tuple[nn.Module, nn.Module]:
    """The same base with the same adapter, there and here, in float64."""
    method = METHODS[name]
    base = bases(method.family, method.tied)
    theirs = quiet_add(load_theirs(base, method.family), method.theirs()).train()
    if name in NETWORKS:
        ours = method.ours(load_ours(base))
        copy_network(theirs, ours)
    else:
        quiet_save(theirs, tmp_path)
        split = name in ("pissa", "olora")  # theirs splits in float32 only
        mine = load_ours(base) if split else load_ours(base).double()
        ours = load_adapter(mine, tmp_path)
    return make_exact(theirs), ours.double().train()


@torch.no_grad()
def copy_network(theirs: nn.Module, ours: nn.Module) -> None:
    source = theirs.prompt_encoder["default"]
    if hasattr(source, "mlp_head"):
        ours.embed_tokens.rows.copy_(source.embedding.weight)
        ours.embed_tokens.encoder.load_state_dict(source.mlp_head.state_dict())
        return
    ours.rope.encoder.embedding.weight.copy_(source.embedding.weight)
    ours.rope.encoder.transform.load_state_dict(source.transform[0].state_dict())
    cores = [layer.self_attn.core for layer in ours.layers]
    last = source.transform[2]
    for core, weight, bias in zip(cores, last.weight.chunk(2), last.bias.chunk(2)):
        core.project.weight.copy_(weight)
        core.project.bias.copy_(bias)


def data() -> Tensor:
    torch.manual_seed(3)
    tokens = torch.randint(0, 97, (2, 13))
    tokens[:, 1:3] = torch.tensor([3, 96])
    return tokens


def learn(logits_of, model: nn.Module, steps, extra=None, allocate=None):
    """Losses of some steps, and the logits after them."""
    tokens, seen = data(), []
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    after = None if allocate is None else allocate(optimizer)
    for step in range(1, steps + 1):
        loss = F.cross_entropy(
            logits_of(model, tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )
        seen.append(loss.detach())
        (loss if extra is None else loss + 0.5 * extra(model)).backward()
        optimizer.step()
        if after is not None:
            after(step)
        optimizer.zero_grad()
    return [torch.stack(seen), logits_of(model, tokens).detach()]


def their_penalty(model: nn.Module) -> Tensor:
    terms = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            square = p @ p.T if "lora_A" in name else p.T @ p
            terms.append((square - torch.eye(len(square))).norm())
    return torch.stack(terms).mean()


def learn_both(
    name: str, theirs: nn.Module, ours: nn.Module, steps: int = STEPS
) -> float:
    """The largest difference of losses and of logits, relative to the largest."""
    prompt = METHODS[name].prompt
    there = lambda model, tokens: their_logits(model, tokens, prompt)
    here = lambda model, tokens: our_logits(model, tokens, prompt)
    if name == "adalora":
        look = theirs.base_model.update_and_allocate
        expected = learn(there, theirs, steps, their_penalty, lambda _: look)

        def allocate(optimizer):
            RankAllocator(ours, optimizer, 2, steps=21, warmup=2, final=5, every=2)

        found = learn(here, ours, steps, orthogonality_loss, allocate)
    else:
        expected, found = learn(there, theirs, steps), learn(here, ours, steps)
    assert expected[0][-1] < expected[0][0]  # it did learn
    return max(
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected)
    )


@pytest.mark.parametrize("name", METHODS)
def test_twenty_steps_equal_the_library(name, bases, tmp_path, monkeypatch):
    monkeypatch.setattr(adaption, "F", ExactSoftmax())
    theirs, ours = make_pair(name, bases, tmp_path)
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert learn_both(name, theirs, ours) < 1e-10


def spoil_scale(model):
    model.layers[0].self_attn.q_proj.scale *= 1.01


def spoil_swap(model):
    layer = model.layers[0].self_attn.q_proj
    layer.a.data, layer.b.data = layer.b.data.t(), layer.a.data.t()


def spoil_length(model):
    model.layers[0].self_attn.q_proj.length.data *= 1.01


def spoil_side(model):
    model.layers[0].mlp.down_proj.scales_input ^= True
    layer = model.layers[0].mlp.down_proj
    layer.l = nn.Parameter(layer.l.new_ones(layer.out_features))


def spoil_positions(model):
    model.rope = model.rope.base


def spoil_start(model):
    layer = model.layers[0].self_attn.q_proj
    layer.base.weight.data += layer.scale * layer.b0.data @ layer.a0.data


MISTAKES = {
    "lora": spoil_scale,
    "rslora": spoil_swap,
    "dora": spoil_length,
    "ia3": spoil_side,
    "prefix": spoil_positions,
    "pissa": spoil_start,
    "adalora": spoil_scale,
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_shows(name, bases, tmp_path):
    theirs, ours = make_pair(name, bases, tmp_path)
    MISTAKES[name](ours)
    assert learn_both(name, theirs, ours, steps=4) > 1e-6
