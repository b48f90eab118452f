"""Adapters over shards: FSDP2 and tensor parallel train as one process does.

Two processes over gloo; all methods, and both engines, share a launch.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from minllama.dist_run.launch import launch
from minllama.dist_run.mesh import init_mesh
from minllama.dist_run.shard import shard
from minllama.dist_run.tensor import tensor_parallel
from minllama.peft import (
    add_trainable_tokens,
    load_adapter,
    prepend_prompt,
    save_adapter,
)
from tests.conftest import make_model, random_tokens
from tests.peft.test_adapters import EVERY, TWINS, shake

REFUSED = ("llama_adapter", "prefix", "p_tuning_v2")  # by name: no place in the plan
TABLES = ("trainable_tokens", "prompt", "p_tuning")  # of embedding and head: not cut
TENSOR = [n for n in EVERY if n not in (*REFUSED, *TABLES, *TWINS)]
BOTH = ("lora", "dora", "ia3")  # with tokens cut over the ranks, and without
FSDP = [n for n in EVERY if n not in TWINS]


def start(name: str, tied: bool = False) -> nn.Module:
    """The same adapted model on every rank."""
    torch.manual_seed(0)
    model = make_model("qwen2", tie_embeddings=tied)
    add = {**EVERY, "rows": lambda m: add_trainable_tokens(m, [3, 5])}[name]
    return shake(add(model.double())).cpu()


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    if any(getattr(m, "spec", None) and m.spec.method == "prompt"
           for m in model.modules()):  # fmt: skip
        both = prepend_prompt(model, tokens)
        logits = model(both)[:, both.size(1) - tokens.size(1) :]
    else:
        logits = model(tokens)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def learn(model: nn.Module, tokens: Tensor, steps: int = 2) -> list[float]:
    """Losses of some steps; the second shows what the first did."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)  # shows a wrong gradient at once
    losses = []
    for _ in range(steps):
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def far(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def apart(model: nn.Module, reference: nn.Module) -> float:
    """The largest difference of what was trained."""
    mine = {
        n: whole(p.detach()) for n, p in model.named_parameters() if p.requires_grad
    }
    wanted = {n: p for n, p in reference.named_parameters() if p.requires_grad}
    assert mine.keys() == wanted.keys()
    return max((mine[n] - wanted[n]).abs().max().item() for n in wanted)


def under_fsdp(folder: str) -> dict[str, float]:
    torch.manual_seed(0)
    rank, tokens = dist.get_rank(), random_tokens(4, 9).cpu()
    mesh, found = init_mesh(device="cpu"), {}
    for name, tied in [*((n, False) for n in FSDP), ("rows", True)]:
        reference, model = start(name, tied), shard(start(name, tied), mesh)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        expected = learn(reference, tokens)
        losses = torch.tensor(
            learn(model, tokens[2 * rank : 2 * rank + 2]), dtype=torch.float64
        )
        dist.all_reduce(losses)
        found[f"{name} losses"] = far((losses / 2).tolist(), expected)
        found[f"{name} weights"] = apart(model, reference)
        save_adapter(model, f"{folder}/{name}")  # gathered by all, written by one
        torch.manual_seed(0)
        plain = make_model("qwen2", tie_embeddings=tied).double().cpu()
        loaded = load_adapter(plain, f"{folder}/{name}")
        got, want = loss_of(loaded, tokens).item(), loss_of(reference, tokens).item()
        found[f"{name} file"] = abs(got - want)
    return found


def under_tensor_parallel() -> dict[str, float]:
    torch.manual_seed(0)
    tokens, found = random_tokens(2, 8).cpu(), {}
    mesh = init_mesh(tensor=2, device="cpu")
    for name in TENSOR:
        for sequence in (True, False)[: 1 + (name in BOTH)]:
            key = f"{name} sequence={sequence}"
            reference, model = start(name), start(name)
            tensor_parallel(model, mesh, sequence=sequence)
            # one step: `apart` sees what it did
            expected, losses = learn(reference, tokens, 1), learn(model, tokens, 1)
            found[f"{key} losses"] = far(losses, expected)
            found[f"{key} weights"] = apart(model, reference)
    for name in REFUSED:
        try:
            tensor_parallel(start(name), mesh)
        except ValueError as error:
            assert "does not know how they are cut" in str(error)
            found[name] = 0.0
    return found


def under_both(folder: str) -> list[dict[str, float]]:
    return [under_fsdp(folder), under_tensor_parallel()]


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    """What each rank found: how far it is from one process, by method and engine."""
    return launch(under_both, 2, str(tmp_path_factory.mktemp("adapters")))


def test_adapters_train_and_save_under_fsdp(differences):
    for found, _ in differences:
        wrong = {key: value for key, value in found.items() if not value < 1e-9}
        assert not wrong and len(found) == 3 * (len(FSDP) + 1)


def test_adapters_train_under_tensor_parallel(differences):
    for _, found in differences:
        wrong = {key: value for key, value in found.items() if not value < 1e-9}
        assert not wrong and len(found) == 2 * (len(TENSOR) + len(BOTH)) + len(REFUSED)
