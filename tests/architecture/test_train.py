"""The loop, its hooks, dropout and optimizers."""

import csv
import io
import math
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from minllama import MinimalLlama
from minllama.architecture.data import PackedBatches, make_batch
from minllama.architecture.dropout import add_dropout, remove_dropout
from minllama.architecture.hooks import (
    Curve,
    Progress,
    draw_curve,
    every,
    load_training_state,
    save_training_state,
)
from minllama.architecture.optim import make_adamw, make_muon, orthogonalize
from minllama.architecture.train import Run, train, warmup_cosine
from tests.conftest import tiny_config

OPTIMIZERS = pytest.mark.parametrize("make", [make_adamw, make_muon])


def make_batches(seed=0, batch_size=4):
    rng = np.random.default_rng(7)
    starts = rng.integers(0, 60, 40)
    docs = [np.arange(s, s + n) % 97 for s, n in zip(starts, rng.integers(4, 30, 40))]
    return PackedBatches(docs, batch_size=batch_size, seq_len=32, seed=seed)


def make_run(steps=12, make=make_adamw, dtype=torch.float64, dropout=0.0):
    torch.manual_seed(1)
    model = MinimalLlama(tiny_config(tie_embeddings=True)).to(dtype)
    if dropout:
        add_dropout(model, dropout)
    return Run(model, make(model, 3e-3), make_batches(), steps)


def go(run, steps=None, hooks=(), **options):
    steps = steps or run.steps
    schedule = warmup_cosine(run.steps, min(3, run.steps))
    return train(run.model, run.optimizer, run.batches, steps, schedule,
                 hooks=hooks, run=run, **options)  # fmt: skip


@dataclass
class Replay:
    """Batches told beforehand."""

    items: list
    at: int = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return self.items[self.at - 1]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@OPTIMIZERS
def test_the_loss_falls(make):
    losses = []
    go(make_run(40, make), hooks=(lambda run: losses.append(run.loss),))
    assert losses[0] == pytest.approx(math.log(97), rel=0.05) and losses[-1] < 3.0


def test_accumulating_batches_equals_one_larger_batch():
    rows = [[np.arange(s, s + n)] for s, n in ((0, 9), (5, 3), (20, 17), (40, 6))]
    small = Replay([make_batch(rows[:1], 16), make_batch(rows[1:], 16)])
    large = Replay([make_batch(rows, 16)])
    weights = []
    for batches, accumulate in ((small, 2), (large, 1)):
        run = make_run(1)
        train(run.model, run.optimizer, batches, 1, accumulate=accumulate)
        weights.append(run.model.state_dict())
    for name, weight in weights[0].items():  # two different sums of targets: 8, 24
        assert_close(weight, weights[1][name], rtol=1e-9, atol=1e-12)


@OPTIMIZERS
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(tmp_path, make, dropout):
    state = tmp_path / "state.pt"
    whole = go(make_run(12, make, torch.float32, dropout))
    part = make_run(12, make, torch.float32, dropout)
    go(part, steps=5)
    part.steps = 12
    save_training_state(part, state)
    torch.manual_seed(99)  # another process has other random numbers
    resumed = make_run(12, make, torch.float32, dropout)
    load_training_state(resumed, state)
    assert resumed.step == 5
    go(resumed)
    assert resumed.tokens == whole.tokens and resumed.loss == whole.loss
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_a_step_that_is_not_finite_stops_the_run_before_it_does_harm():
    run = make_run()
    go(run, steps=3)
    before = {name: w.clone() for name, w in run.model.state_dict().items()}
    with pytest.raises(RuntimeError, match="step 4: loss=nan"):
        go(run, 6, loss=lambda model, batch: model(batch.tokens).sum() * math.nan)
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_gradients_are_clipped_to_the_norm():
    norms = []

    def look(run):
        grads = [p.grad for p in run.model.parameters() if p.grad is not None]
        norms.append(grads)

    run = make_run(2)
    go(run, max_norm=1e-3, hooks=(look,))
    assert run.grad_norm > 1e-3  # told before clipping
    assert all(not grads for grads in norms)  # and given back after the step


def test_only_what_requires_a_gradient_is_trained():
    run = make_run(3)
    run.model.requires_grad_(False)
    run.model.norm.weight.requires_grad_(True)
    run.optimizer = make_adamw(run.model, 1e-2)
    before = {name: w.clone() for name, w in run.model.state_dict().items()}
    go(run)
    changed = {
        n for n, w in run.model.state_dict().items() if not torch.equal(w, before[n])
    }
    assert changed == {"norm.weight"}


def test_autocast_trains_float32_weights_in_bfloat16():
    seen = []
    run = make_run(2, dtype=torch.float32)
    layer = run.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda m, x, y: seen.append(y.dtype))
    go(run, autocast=torch.bfloat16)
    assert set(seen) == {torch.bfloat16} and layer.weight.dtype == torch.float32


def test_the_schedule_rises_then_falls_to_its_floor():
    rate = warmup_cosine(steps=100, warmup=10, floor=0.1)
    shares = [rate(step) for step in range(101)]
    assert shares[:10] == sorted(shares[:10]) and shares[9] == 1.0
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert shares[-1] == pytest.approx(0.1)
    assert rate(1000) == pytest.approx(0.1)


def test_weight_decay_spares_norms_and_biases():
    model = MinimalLlama(tiny_config(tie_embeddings=True))
    decayed, spared = make_adamw(model, 1e-3).param_groups
    assert (
        all(p.dim() == 2 for p in decayed["params"]) and decayed["weight_decay"] == 0.1
    )
    assert all(p.dim() == 1 for p in spared["params"]) and spared["weight_decay"] == 0
    both = decayed["params"] + spared["params"]
    assert len(both) == len(list(model.parameters()))  # a tied weight once


def test_orthogonalizing_lifts_every_direction_alike():
    for shape in ((24, 24), (16, 40), (40, 16)):
        matrix = torch.randn(shape, dtype=torch.float64)
        values = torch.linalg.svdvals(orthogonalize(matrix))
        assert 0.6 < values.min() and values.max() < 1.3
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        assert torch.linalg.matrix_norm(orthogonalize(matrix) - u @ v, 2) < 0.4


# ------------------------------------------------------------------ dropout


def test_dropout_changes_training_and_nothing_else():
    torch.manual_seed(0)
    model, tokens = MinimalLlama(tiny_config()), torch.randint(0, 97, (2, 9))
    before, names = model.eval()(tokens), set(model.state_dict())
    add_dropout(model, 0.5)
    assert torch.equal(model(tokens), before) and set(model.state_dict()) == names
    model.train()
    assert not torch.allclose(model(tokens), before)
    remove_dropout(model)
    assert torch.equal(model(tokens), before)
    assert not any(module._forward_hooks for module in model.modules())


def test_dropout_keeps_the_mean():
    model = add_dropout(MinimalLlama(tiny_config()).double(), 0.3).train()
    tokens = torch.zeros(1, 1, dtype=torch.long)
    drawn = torch.stack([model.embed_tokens(tokens) for _ in range(4000)])
    plain = model.embed_tokens.weight[0]
    assert_close(drawn.mean(0)[0, 0], plain, rtol=0, atol=0.003)
    zeros = (drawn == 0).double().mean()
    assert zeros.item() == pytest.approx(0.3, abs=0.01)


def test_dropout_that_makes_no_sense_is_refused():
    model = MinimalLlama(tiny_config())
    with pytest.raises(ValueError, match="p=1.0 must be"):
        add_dropout(model, 1.0)
    with pytest.raises(ValueError, match="has dropout already"):
        add_dropout(add_dropout(model, 0.1), 0.1)
    with pytest.raises(ValueError, match="none of embed_tokens"):
        add_dropout(torch.nn.Linear(2, 2), 0.1)


# ------------------------------------------------------------------ hooks


def test_progress_tells_loss_speed_and_time_left():
    out = io.StringIO()
    go(make_run(4), hooks=(Progress(tiny_config(), 32, every=0.0, out=out),))
    lines = out.getvalue().splitlines()
    assert lines[-1].startswith("step 4/4 · loss ") and "tokens/s" in lines[-1]
    assert "MFU " in lines[-1]
    assert lines[-1].endswith("0:00 left")


def test_the_curve_is_a_row_a_step_and_a_picture(tmp_path):
    go(make_run(6), hooks=(Curve(tmp_path),))
    with (tmp_path / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert float(rows[0]["loss"]) == pytest.approx(math.log(97), rel=0.05)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_curve_of_a_resumed_run_has_each_step_once(tmp_path):
    run = make_run(8)
    go(run, steps=6, hooks=(Curve(tmp_path),))
    run.step = 4  # its state was saved two steps before it was stopped
    go(run, steps=8, hooks=(Curve(tmp_path),))
    with (tmp_path / "curve.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_curve_can_be_drawn_again(tmp_path):
    (tmp_path / "curve.csv").write_text("step,tokens,loss\n1,10,4.0\n2,20,3.0\n")
    assert draw_curve(tmp_path / "curve.csv") == tmp_path / "curve.png"


def test_every_calls_at_multiples_and_at_the_end():
    steps = []
    go(make_run(7), hooks=(every(3, lambda run: steps.append(run.step)),))
    assert steps == [3, 6, 7]


# ------------------------------------------------------------------ refusals


def test_a_state_of_another_model_is_refused(tmp_path):
    save_training_state(make_run(), tmp_path / "s.pt")
    other = Run(model := MinimalLlama(tiny_config(dim=64)), make_adamw(model, 1e-3),
                make_batches(), 3)  # fmt: skip
    with pytest.raises(ValueError, match="s.pt belongs to another model"):
        load_training_state(other, tmp_path / "s.pt")


def test_files_that_are_no_training_state_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('code ran')",))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "short.pt").write_bytes(b"PK\x03\x04")
    torch.save({"other": 1}, tmp_path / "other.pt")
    for name in ("evil.pt", "short.pt", "other.pt", "absent.pt"):
        with pytest.raises(ValueError, match=f"{name} is no training state"):
            load_training_state(make_run(), tmp_path / name)


def test_numbers_that_make_no_step_are_refused():
    run = make_run()
    with pytest.raises(ValueError, match="steps=0 and accumulate=1"):
        train(run.model, run.optimizer, run.batches, 0)
    with pytest.raises(ValueError, match="warmup=9 must lie within the run of steps=5"):
        warmup_cosine(5, 9)
    with pytest.raises(ValueError, match="no parameter has requires_grad"):
        make_adamw(run.model.requires_grad_(False), 1e-3)
