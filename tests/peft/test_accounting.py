"""What training an adapter costs is predicted, and then counted."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from minllama.architecture import MinimalLlama, next_token_loss
from minllama.architecture.accounting_training import TrainingStep
from minllama.peft import add_dora, add_ia3, add_lora, add_prefix, trainable_parameters
from minllama.peft.accounting import (
    METHODS,
    Plan,
    adapter_memory,
    adapter_parameters,
    adapter_saved_bytes,
    memory_table,
)
from tests.architecture.test_accounting import kept_by_autograd, make_batch
from tests.conftest import make_model, tiny_config
from tests.peft.test_adapters import shake

ADD = {
    "full": lambda m, plan: m,
    "lora": lambda m, plan: add_lora(m, plan.rank, targets=plan.layers),
    "dora": lambda m, plan: add_dora(m, plan.rank, targets=plan.layers),
    "ia3": lambda m, plan: add_ia3(m, plan.layers),
    "prefix": lambda m, plan: add_prefix(m, plan.rank),
}
PLANS = [
    *(Plan(method=method, rank=3) for method in METHODS),
    Plan(method="lora", rank=5, targets=("q_proj", "v_proj")),
    Plan(method="lora", rank=5, targets=("q_proj", "o_proj", "down_proj")),
    Plan(method="dora", rank=2, targets=("k_proj", "up_proj")),
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_trainable_parameters_are_predicted(family, plan):
    sizes = {} if family == "llama" else {"head_dim": 12, "model_type": family}
    model = ADD[plan.method](MinimalLlama.from_config(tiny_config(**sizes)), plan)
    assert adapter_parameters(model.config, plan) == trainable_parameters(model)


def optimizer_holds(model: nn.Module) -> int:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for key, value in state.items()
        if key != "step"
    )


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_optimizer_and_gradients_are_predicted(plan):
    model = ADD[plan.method](make_model("llama"), plan)
    step = TrainingStep(batch_size=1, seq_len=8, dtype="float32")
    parts = adapter_memory(model.config, step, plan)
    assert parts["optimizer"] == optimizer_holds(model)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert parts["gradients"] == sum(g.nbytes for g in grads)
    held = sum(p.nbytes for n, p in model.named_parameters() if "length" not in n)
    assert parts["weights"] == held  # DoRA's |W| is a cache, out numbers a layer


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_activations_are_predicted(plan, dtype, packed):
    """Within 2 %: small vectors (grow, masks of a prefix) are not counted."""
    model = make_model("llama", n_layers=3, dim=64, ffn_dim=96).cpu()
    model = shake(ADD[plan.method](model.to(getattr(torch, dtype)), plan))
    batch = make_batch(97, 3, 41)

    def plain(model, batch) -> Tensor:
        logits = model(batch.tokens).flatten(0, 1).float()
        targets = batch.targets.flatten()
        return nn.functional.cross_entropy(logits, targets, reduction="sum")

    kept = kept_by_autograd(model, batch, next_token_loss if packed else plain, False)
    step = TrainingStep(
        batch_size=3, seq_len=41, dtype=dtype, packed=packed, device="cpu"
    )
    predicted = adapter_saved_bytes(model.config, step, plan)
    assert predicted == pytest.approx(kept, rel=0.02)


def test_the_table_has_every_method_and_adapters_need_less():
    rows = memory_table()
    assert len(rows) == 2 * len(METHODS)
    for model in ("llama-3.2-1b", "llama-3.1-8b"):
        of = {row["method"]: row for row in rows if row["model"] == model}
        assert of["full"]["total"] == max(row["total"] for row in of.values())
        assert all(of[m]["share"] < 0.02 for m in METHODS if m != "full")
        assert of["lora"]["optimizer"] * 50 < of["full"]["optimizer"]
        assert of["lora"]["activations"] > of["full"]["activations"] / 2


def test_wrong_plans_are_refused():
    config = make_model("llama").config
    for message, make in {
        "method='qlora' is none of": lambda: Plan(method="qlora"),
        "rank=0 must be": lambda: Plan(method="lora", rank=0),
        "target 'q' is none of": lambda: Plan(method="lora", targets=("q",)),
        "checkpointing=True": lambda: adapter_saved_bytes(
            config,
            TrainingStep(batch_size=1, seq_len=8, checkpointing=True),
            Plan(method="lora"),
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()


def test_the_memory_table_of_the_page_is_that_of_the_accounting():
    page = (Path(__file__).parents[2] / "docs/peft.md").read_text()
    cells = r"\| ([\d,]+) " + r"\| ([\d.]+) " * 4 + r"\| \*\*([\d.]+)\*\* \|$"
    names = r"^\| (?:\*\*\w+\*\* )?(full|LoRA|DoRA|IA3|prefix) "
    found = [(m.lower(), *rest) for m, *rest in re.findall(names + cells, page, re.M)]
    parts = ("weights", "gradients", "optimizer", "activations", "total")
    assert found == [
        (r["method"], f"{r['trained']:,}", *(f"{r[p] / 1e9:.2f}" for p in parts))
        for r in memory_table()
    ]
