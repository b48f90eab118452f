"""GaLore against the paper's algorithm, written down once more in plain steps."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from minllama.peft import GaLore, RankAllocator, add_adalora, add_lora, make_galore
from minllama.peft.galore import subspace
from tests.conftest import make_model, random_tokens


def by_the_paper(weight, grads, rank, lr, every, scale):
    """GaLore with Adam's beta 0.9 and 0.999, of arXiv:2403.03507."""
    weight, m, v = weight.clone(), None, None
    for t, grad in enumerate(grads, start=1):
        tall = grad.size(0) > grad.size(1)
        g = grad.T if tall else grad
        if (t - 1) % every == 0:
            p = torch.linalg.svd(g, full_matrices=False)[0][:, :rank]
        low = p.T @ g
        m = 0.1 * low if m is None else 0.9 * m + 0.1 * low
        v = 0.001 * low**2 if v is None else 0.999 * v + 0.001 * low**2
        step = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        change = scale * p @ step
        weight -= lr * (change.T if tall else change)
    return weight


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (5, 5)])
def test_galore_steps_as_the_paper_says(shape):
    start = torch.randn(shape, dtype=torch.float64)
    grads = [torch.randn(shape, dtype=torch.float64) for _ in range(7)]
    p = nn.Parameter(start.clone())
    optimizer = GaLore([{"params": [p], "rank": 3}], lr=0.1, every=3, scale=0.5)
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    expected = by_the_paper(start, grads, 3, 0.1, 3, 0.5)
    assert_close(p.detach(), expected, rtol=0, atol=1e-12)
    wrong = by_the_paper(start, grads, 3, 0.1, 2, 0.5)  # a planted mistake shows
    assert (p - wrong).abs().max() > 1e-4
    numbers = {k: v.numel() for k, v in optimizer.state[p].items() if k != "step"}
    m, n = min(shape), max(shape)
    assert numbers == {"basis": 3 * m, "mean": 3 * n, "square": 3 * n}


def test_without_a_rank_galore_is_adamw():
    a, b = (nn.Parameter(torch.ones(5, 3, dtype=torch.float64)) for _ in range(2))
    ours = GaLore([a], lr=0.1, weight_decay=0.1)
    theirs = torch.optim.AdamW([b], lr=0.1, weight_decay=0.1)
    for _ in range(5):
        a.grad = torch.randn(5, 3, dtype=torch.float64)
        b.grad = a.grad.clone()
        ours.step(), theirs.step()
    assert_close(a, b, rtol=0, atol=1e-12)


def test_galore_trains_all_weights_of_a_model():
    model, tokens = make_model("llama"), random_tokens(4, 17)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer, losses = make_galore(model, lr=1e-2, rank=4, every=10), []
    assert [group["rank"] for group in optimizer.param_groups] == [4, None]
    for _ in range(20):
        logits = model(tokens)[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_subspace_holds_the_largest_directions():
    u, v = torch.linalg.qr(torch.randn(6, 6))[0], torch.linalg.qr(torch.randn(9, 6))[0]
    grad = u * torch.tensor([9.0, 5.0, 1e-3, 1e-3, 1e-3, 1e-3]) @ v.T
    basis = subspace(grad, 2)
    assert_close(basis @ basis.T, u[:, :2] @ u[:, :2].T, rtol=0, atol=1e-3)


def test_wrong_groups_are_refused():
    vector = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"rank=2 for a tensor of shape \(3,\)"):
        GaLore([{"params": [vector], "rank": 2}])
    with pytest.raises(ValueError, match="rank=0 must be"):
        make_galore(make_model("llama"), 1e-3, rank=0)
    with pytest.raises(ValueError, match="nothing would train"):
        make_galore(make_model("llama").requires_grad_(False), 1e-3)


def test_adalora_ends_at_its_budget():
    model, tokens = add_adalora(make_model("llama"), 6), random_tokens(4, 17)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    allocator = RankAllocator(model, optimizer, 2, steps=20, warmup=3, final=5)
    ranks = []
    for _ in range(20):
        model(tokens).logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        layers = allocator.layers
        ranks.append(sum(int(layer.e.count_nonzero()) for layer in layers))
    assert ranks[2] == 14 * 6 and ranks[-1] == ranks[14] == 14 * 2
    assert sorted(ranks, reverse=True) == ranks
    # not alike in all layers: that is the point of it
    assert len({int(layer.e.count_nonzero()) for layer in allocator.layers}) > 1


def test_an_allocator_that_does_not_fit_is_refused():
    model = add_adalora(make_model("llama"), 6)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="warmup=5 and final=5 must leave"):
        RankAllocator(model, optimizer, 2, steps=10, warmup=5, final=5)
    with pytest.raises(ValueError, match="leave some of steps=1, one to look"):
        RankAllocator(model, optimizer, 2, steps=1)
    with pytest.raises(ValueError, match="has no AdaLoRA layer"):
        RankAllocator(add_lora(make_model("llama")), optimizer, 2, steps=10)
    with pytest.raises(ValueError, match="rank=0 must be"):
        add_adalora(make_model("llama"), 0)
