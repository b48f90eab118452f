"""What an operator cannot do it says, with the value, before anything is computed."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from minllama.architecture.data import IGNORE
from minllama.architecture.kernels import HAS_TRITON, interpreting
from minllama.fast_ops import (
    add_rms_norm,
    cross_entropy,
    cross_entropy_reference,
    linear_cross_entropy,
    rms_norm,
    rope,
    softmax,
    swiglu,
)
from minllama.fast_ops.rms_norm import MAX_WIDTH
from tests.conftest import DEVICE


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


IDS = zeros(2, dtype=torch.int64)
BAD = {
    "a weight of another width": (
        lambda: rms_norm(zeros(2, 3), zeros(4)),
        r"rms_norm: weight of shape \(4,\) does not fit x of shape \(2, 3\)",
    ),
    "a row too long for a program": (
        lambda: add_rms_norm(*[zeros(1, MAX_WIDTH + 1)] * 2, zeros(MAX_WIDTH + 1)),
        f"D={MAX_WIDTH + 1} is more than the {MAX_WIDTH}",
    ),
    "summands of two shapes": (
        lambda: add_rms_norm(zeros(2, 3), zeros(1, 3), zeros(3)),
        r"residual of shape \(1, 3\) must be alike",
    ),
    "gates of two shapes": (
        lambda: swiglu(zeros(2, 3), zeros(3)), r"b is torch.float32 of shape \(3,\)",
    ),
    "gates of two dtypes": (
        lambda: swiglu(zeros(2), zeros(2).half()), "b is torch.float16",
    ),
    "angles of other tokens": (
        lambda: rope(zeros(1, 2, 1, 4), zeros(1, 2, 1, 4), *[zeros(1, 3, 1, 4)] * 2),
        r"cos \(1, 3, 1, 4\)",
    ),
    "an odd head": (
        lambda: rope(zeros(1, 2, 1, 3), zeros(1, 2, 1, 3), *[zeros(1, 2, 1, 3)] * 2),
        r"q \(1, 2, 1, 3\).*d even",
    ),
    "integers": (
        lambda: softmax(zeros(2, dtype=torch.int32)), "softmax: dtype=torch.int32",
    ),
    "a number": (lambda: softmax(zeros()), r"x of shape \(\) has no last dimension"),
    "targets of another shape": (
        lambda: cross_entropy(zeros(3, 5), IDS), r"targets of shape \(2,\) do not fit",
    ),
    "targets that are no ids": (
        lambda: cross_entropy(zeros(2, 5), zeros(2)), "targets of torch.float32",
    ),
    "smoothing of one": (
        lambda: cross_entropy(zeros(2, 5), IDS, label_smoothing=1.0),
        "label_smoothing=1.0 must be in 0..1",
    ),
    "a negative z-loss": (
        lambda: cross_entropy(zeros(2, 5), IDS, z_loss=-1.0), "z_loss=-1.0",
    ),
    "another reduction": (
        lambda: cross_entropy(zeros(2, 5), IDS, reduction="none"),
        "reduction='none' is none of mean, sum",
    ),
    "a head of another width": (
        lambda: linear_cross_entropy(zeros(2, 3), zeros(5, 4), IDS),
        r"hidden torch.float32 \(2, 3\), weight torch.float32 \(5, 4\)",
    ),
    "no words": (lambda: cross_entropy(zeros(2, 0), IDS), "V=0 words to choose from"),
    "no words in the head": (
        lambda: linear_cross_entropy(zeros(2, 3), zeros(0, 3), IDS), "V=0 words",
    ),
    "targets elsewhere": (
        lambda: cross_entropy(zeros(2, 5), IDS.to("meta")),
        "targets on meta, logits on c.*move them",
    ),
    "a z-loss that is no number": (
        lambda: cross_entropy(zeros(2, 5), IDS, z_loss=float("nan")), "z_loss=nan",
    ),
    "sums in whole numbers": (
        lambda: linear_cross_entropy(
            zeros(2, 3), zeros(5, 3), IDS, accumulate=torch.int64
        ), "accumulate=torch.int64.*give torch.float32",
    ),
    "half a byte": (
        lambda: linear_cross_entropy(zeros(2, 3), zeros(5, 3), IDS, chunk_bytes=0.5),
        "chunk_bytes=0.5 is no number of bytes",
    ),
    "a head of another dtype": (
        lambda: linear_cross_entropy(zeros(2, 3), zeros(5, 3).half(), IDS),
        "weight torch.float16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_it_is_refused(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


needs_kernels = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not interpreting()),
    reason="kernels need Triton, and without a GPU its interpreter",
)


@needs_kernels
def test_a_target_that_does_not_exist_makes_the_loss_nan():
    targets = torch.tensor([1, 5], device=DEVICE)
    assert cross_entropy(zeros(2, 5), targets).isnan()


LOSSES = {
    "logits": cross_entropy,
    "reference": cross_entropy_reference,
    "linear": lambda x, *more, **how: linear_cross_entropy(
        x, torch.eye(5, device=DEVICE), *more, **how
    ),
}


def value_and_gradient(loss, x, *more, **how):
    leaf = x.clone().requires_grad_()
    value = loss(leaf.clone(), *more, **how)
    return value, *torch.autograd.grad(value, leaf)


@needs_kernels
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_of_no_targets_is_what_pytorch_says(name, z_loss, reduction):
    """A mean of nothing is NaN; nothing has no gradient, and a sum of nothing is 0."""
    none = torch.full((3,), IGNORE, device=DEVICE)
    x, how = torch.randn(3, 5, device=DEVICE), {"reduction": reduction}
    got = value_and_gradient(LOSSES[name], x, none, z_loss=z_loss, **how)
    expected = value_and_gradient(F.cross_entropy, x, none, **how)
    assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, -1e31, 1e30])
def test_logits_may_lie_at_the_end_of_float32(value):
    """A mask of the least number may cover a whole row: all words are then alike."""
    x = torch.full((2, 5), value, device=DEVICE)
    x[1, :2] /= 2
    targets = torch.tensor([1, 0 if value < 0 else 4], device=DEVICE)
    got = value_and_gradient(cross_entropy, x, targets)
    assert_close(got, value_and_gradient(F.cross_entropy, x, targets))


@needs_kernels
@pytest.mark.parametrize(
    "op", [cross_entropy, linear_cross_entropy], ids=["", "linear"]
)
def test_a_second_backward_is_refused(op):
    """The gradient was scaled in place by the first."""
    x = torch.randn(2, 5, device=DEVICE, requires_grad=True)
    weight = [torch.randn(7, 5, device=DEVICE)] if op is linear_cross_entropy else []
    loss = op(x.clone(), *weight, IDS)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"used up by a\s+first backward"):
        loss.backward()


@needs_kernels
def test_without_gradients_the_linear_loss_makes_one_product_only(monkeypatch):
    file = importlib.import_module("minllama.fast_ops.linear_cross_entropy")
    x = torch.randn(2, 5, device=DEVICE, requires_grad=True)
    weight = torch.randn(7, 5, device=DEVICE, requires_grad=True)
    asked, forward = [], file.linear_cross_entropy_forward
    spy = lambda *settings: asked.append(settings[-2:]) or forward(*settings)
    monkeypatch.setattr(file, "linear_cross_entropy_forward", spy)
    loss = linear_cross_entropy(x, weight, IDS)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, weight, IDS), loss)
    linear_cross_entropy(x, weight.detach(), IDS)
    assert asked == [(True, True), (False, False), (True, False)]


@needs_kernels
def test_logits_that_someone_keeps_for_backward_are_protected():
    x = torch.randn(2, 5, device=DEVICE, requires_grad=True)
    logits = x.exp()  # keeps its result for its own gradient
    loss = cross_entropy(logits, IDS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_kernels
@torch.no_grad()
def test_without_gradients_logits_stay():
    x = torch.randn(2, 5, device=DEVICE)
    before = x.clone()
    cross_entropy(x, IDS)
    assert torch.equal(x, before)
