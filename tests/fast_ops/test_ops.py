"""Each operator is its reference: values, gradients, odd shapes, strides, nothing.

Without a GPU the kernels run in Triton's interpreter (conftest sets it), whose stores
to bfloat16 cut off what a GPU would round: one more ulp. That a kernel ran, and not the
reference, is counted at its launch.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from minllama.architecture.kernels import HAS_TRITON, interpreting, launches
from minllama.architecture.rope import Rope, Rotation
from minllama.fast_ops import (
    add_rms_norm,
    add_rms_norm_reference,
    cross_entropy,
    cross_entropy_reference,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    rms_norm,
    rms_norm_reference,
    rope,
    rope_reference,
    softmax,
    softmax_reference,
    swiglu,
    swiglu_reference,
)
from minllama.fast_ops.rope import FastRotation
from tests.conftest import DEVICE, CountingBackend

pytestmark = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not interpreting()),
    reason="kernels need Triton, and without a GPU its interpreter",
)
ODD = [(1, 1), (3, 7), (2, 3, 33), (5, 1025)]  # never a full block
MANY = [*ODD, (14, 1025)]  # more rows than programs of the backward pass


@dataclass
class Op:
    """An operator, its reference, inputs for a shape, and the kernels that it runs."""

    fast: Callable
    reference: Callable
    inputs: Callable[..., list]
    kernels: set[str]
    shapes: list[tuple[int, ...]]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def heads(B: int, T: int, H: int, K: int, d: int) -> list:
    """Queries, keys, and angles that differ from row to row, as in packed documents."""
    positions = torch.randint(0, 50, (B, T), device=DEVICE)
    return [randn(B, T, H, d), randn(B, T, K, d), *Rope(d, 100.0)(positions)]


def logits(*shape: int) -> list:
    """The second target does not count."""
    targets = torch.randint(0, shape[-1], shape[:-1], device=DEVICE)
    targets.view(-1)[1::5] = -100
    return [3 * randn(*shape), targets]


def hidden(N: int, D: int, V: int) -> list:
    targets = torch.randint(0, V, (N,), device=DEVICE)
    targets[1::5] = -100
    return [randn(N, D), randn(V, D) / D**0.5, targets]


def rising(*shape: int) -> list:
    """Each piece of a row has a larger maximum than all before it."""
    return [randn(*shape) + torch.linspace(0, 30, shape[-1], device=DEVICE)]


SMOOTH = {"label_smoothing": 0.1, "z_loss": 0.01, "reduction": "sum"}
WIDE = {"accumulate": torch.float32, "chunk_bytes": 1}  # 64 rows at a time
LOGITS = [(1, 1), (3, 7), (2, 3, 33), (5, 1025), (3, 3000)]
HIDDEN = [(1, 1, 2), (7, 5, 33), (130, 12, 101)]
NORM = {"_rms_norm_forward", "_rms_norm_backward", "_sum_rows"}
OPS = {
    "rms_norm": Op(
        rms_norm, rms_norm_reference, lambda *s: [randn(*s), randn(s[-1])], NORM, MANY
    ),
    "add_rms_norm": Op(
        add_rms_norm, add_rms_norm_reference,
        lambda *s: [randn(*s), randn(*s), randn(s[-1])], NORM, MANY,
    ),
    "swiglu": Op(
        swiglu, swiglu_reference, lambda *s: [randn(*s), randn(*s)],
        {"_swiglu_forward", "_swiglu_backward"}, ODD,
    ),
    "rope": Op(
        rope, rope_reference, heads, {"_rope"},
        [(1, 1, 1, 1, 2), (2, 7, 3, 1, 12), (1, 5, 4, 2, 80), (3, 1, 2, 2, 96),
         (2, 3, 5, 3, 64)],
    ),
    "softmax": Op(
        softmax, softmax_reference, lambda *s: [randn(*s)],
        {"_softmax_forward", "_softmax_backward"}, ODD,
    ),
    "softmax, long": Op(
        softmax, softmax_reference, rising,
        {"_softmax_forward_online", "_softmax_backward_long"}, [(2, 33001)],
    ),
    "cross_entropy": Op(
        cross_entropy, cross_entropy_reference, logits,
        {"_cross_entropy", "_scale"}, LOGITS,
    ),
    "cross_entropy, smooth": Op(
        lambda *x: cross_entropy(*x, **SMOOTH),
        lambda *x: cross_entropy_reference(*x, **SMOOTH), logits,
        {"_cross_entropy", "_scale"}, LOGITS,
    ),
    "linear_cross_entropy": Op(
        linear_cross_entropy, linear_cross_entropy_reference, hidden,
        {"_cross_entropy", "_scale"}, HIDDEN,
    ),
    "linear_cross_entropy, smooth": Op(
        lambda *x: linear_cross_entropy(*x, **SMOOTH, **WIDE),
        lambda *x: linear_cross_entropy_reference(*x, **SMOOTH), hidden,
        {"_cross_entropy", "_scale"}, HIDDEN,
    ),
}  # fmt: skip
CASES = [(name, shape) for name, op in OPS.items() for shape in op.shapes]


def results(
    op: Callable, inputs: list, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of an operator in some dtype, for the same random dy."""
    leaves = [
        x.detach().clone().to(dtype).requires_grad_() if x.is_floating_point() else x
        for x in inputs
    ]
    angles = [x.detach() for x in leaves[2:]] if op in (rope, rope_reference) else []
    leaves = leaves[: len(leaves) - len(angles)]
    trained = [x for x in leaves if x.is_floating_point()]
    copies = [x.clone() if x.is_floating_point() else x for x in leaves]  # in place
    out = op(*copies, *[x.float() for x in angles])
    out = list(out) if isinstance(out, tuple) else [out]
    torch.manual_seed(7)
    dy = [torch.randn(y.shape, device=DEVICE).to(dtype).to(y.dtype) for y in out]
    return out, list(torch.autograd.grad(out, trained, dy))


@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_values_and_gradients_equal_the_references(name, shape):
    op = OPS[name]
    inputs = op.inputs(*shape)
    launches.clear()
    got = results(op.fast, inputs, torch.float32)
    assert op.kernels <= set(launches)
    expected = results(op.reference, inputs, torch.float32)
    for x, y in zip(got[0] + got[1], expected[0] + expected[1], strict=True):
        assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_bfloat16_is_float32_but_for_rounding(name, shape):
    """Of inputs that bfloat16 knows: each tensor's norm is off by half an ulp or so.

    An ulp of bfloat16 is at most 2^-7 of a number; sums keep more in float32. Softmax's
    gradient and the two of a loss come from a tensor that was rounded before.
    """
    op = OPS[name]
    inputs = [
        x.bfloat16().float() if x.is_floating_point() else x for x in op.inputs(*shape)
    ]
    got = results(op.fast, inputs, torch.bfloat16)
    expected = results(op.reference, inputs, torch.float32)
    for x, y in zip(got[0] + got[1], expected[0] + expected[1], strict=True):
        assert (x.float() - y).norm() <= 2**-6 * y.norm() + 1e-2 * (y.numel() == 1)


@pytest.mark.parametrize("name", OPS)
def test_nothing_in_is_nothing_out(name):
    op = OPS[name]
    shape = list(op.shapes[-1])
    shape[0] = 0
    out, grads = results(op.fast, op.inputs(*shape), torch.float32)
    expected, expected_grads = results(op.reference, op.inputs(*shape), torch.float32)
    for x, y in zip(out + grads, expected + expected_grads, strict=True):
        assert x.shape == y.shape
        assert_close(x, y, equal_nan=True)  # the mean of no losses is 0 / 0


def strided(x: Tensor) -> Tensor:
    """The same numbers at every other place of twice the memory, and transposed."""
    filler = float("nan") if x.is_floating_point() else 0  # targets, too
    wide = x.new_full((*x.shape[:-1], 2 * x.size(-1)), filler)
    wide[..., ::2] = x
    if x.dim() < 2:
        return wide[::2]
    return wide.transpose(0, 1).contiguous().transpose(0, 1)[..., ::2]


@pytest.mark.parametrize("name", OPS)
def test_memory_may_lie_in_any_order(name):
    op = OPS[name]
    inputs = op.inputs(*op.shapes[-2 if len(op.shapes) > 1 else -1])
    n = 2 if name == "rope" else len(inputs)  # angles have no gradient
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in inputs[:n]]
    trained = [x for x in leaves if x.is_floating_point()]
    for change in (strided, torch.clone):
        views = [change(x) for x in leaves]
        out = op.fast(*views, *inputs[n:])
        out = out if isinstance(out, tuple) else (out,)
        dy = [torch.ones_like(y) for y in out]
        got = (*out, *torch.autograd.grad(out, trained, dy))
        expected = op.reference(*leaves, *inputs[n:])
        expected = expected if isinstance(expected, tuple) else (expected,)
        expected = (*expected, *torch.autograd.grad(expected, trained, dy))
        for x, y in zip(got, expected, strict=True):
            assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in OPS if "long" not in name])
def test_the_references_have_true_gradients(name):
    """Finite differences in float64, which every operator sends to its reference."""
    op = OPS[name]
    inputs = [
        x.double() if x.is_floating_point() else x for x in op.inputs(*op.shapes[1])
    ]
    n = 2 if name == "rope" else len(inputs)
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in inputs[:n]]
    assert torch.autograd.gradcheck(op.reference, (*leaves, *inputs[n:]))
    launches.clear()
    got = op.fast(*leaves, *inputs[n:])
    assert not launches
    assert_close(got, op.reference(*leaves, *inputs[n:]), rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in OPS if "long" not in name])
def test_gradients_repeat_bit_for_bit(name):
    op = OPS[name]
    inputs = op.inputs(*op.shapes[-1])
    first, second = (results(op.fast, inputs, torch.float32) for _ in range(2))
    for x, y in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(x, y)


@pytest.mark.filterwarnings("ignore")  # of PyTorch about itself, where it traces
@pytest.mark.parametrize("name", OPS)
def test_torch_compile_sees_one_graph(name):
    op = OPS[name]
    inputs = op.inputs(*op.shapes[0 if "long" in name else 1])
    CountingBackend()  # forgets what other tests compiled
    compiled = torch.compile(op.fast, fullgraph=True, backend="aot_eager")
    got, expected = (results_of(f, inputs, name == "rope") for f in (compiled, op.fast))
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


def results_of(op: Callable, inputs: list, has_angles: bool) -> list[Tensor]:
    leaves = [
        x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs
    ]
    trained = [x for x in leaves if x.is_floating_point()][: 2 if has_angles else None]
    angles = [x.detach() for x in leaves[2:]] if has_angles else []
    leaves = leaves[:2] if has_angles else leaves
    out = op(*[x.clone() if x.is_floating_point() else x for x in leaves], *angles)
    out = list(out) if isinstance(out, tuple) else [out]
    total = torch.stack([y.square().sum() for y in out]).sum()
    return out + list(torch.autograd.grad(total, trained))


INPUTS: dict[str, Callable[[], tuple]] = {
    "rms_norm_forward": lambda: (randn(3, 7), randn(7), 1e-5),
    "rms_norm_backward": lambda: (randn(3, 7), randn(3, 7), randn(7), 1e-5, True),
    "add_rms_norm_forward": lambda: (randn(3, 7), randn(3, 7), randn(7), 1e-5),
    "add_rms_norm_backward": lambda: (
        *(randn(3, 7) for _ in range(3)), randn(7), 1e-5, False,
    ),
    "swiglu_forward": lambda: (randn(3, 7), randn(3, 7)),
    "swiglu_backward": lambda: tuple(randn(3, 7) for _ in range(3)),
    "rope_turn": lambda: (*heads(2, 3, 2, 1, 6), True),
    "softmax_forward": lambda: (randn(3, 7),),
    "softmax_backward": lambda: (randn(3, 7), randn(3, 7)),
    "cross_entropy_forward": lambda: (*logits(3, 7), -100, 0.1, 0.0, "mean"),
    "cross_entropy_gradient_": lambda: (*logits(3, 7), -100, 0.0, 0.1, "sum"),
    "scale_": lambda: (randn(5), randn()),
    "linear_cross_entropy_forward": lambda: (
        *hidden(5, 4, 7), -100, 0.0, 0.0, "mean", torch.float32, 2**20, True, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
def test_pytorch_finds_the_operators_well_made(name):
    operator = getattr(torch.ops.minllama, name).default
    torch.library.opcheck(operator, INPUTS[name]())


def test_queries_may_be_turned_alone():
    q, _, cos, sin = heads(2, 3, 2, 1, 6)
    assert_close(FastRotation(cos, sin).turn(q), Rotation(cos, sin).turn(q))


def test_the_interpreter_was_asked_for():
    """Else every test above would have compared a reference with itself."""
    assert DEVICE == "cuda" or os.environ["TRITON_INTERPRET"] == "1"


def test_targets_may_be_one_number_for_all():
    x, targets = 3 * randn(5, 11), torch.tensor([3], device=DEVICE).expand(5)
    expected = cross_entropy_reference(x, targets)
    assert_close(cross_entropy(x.clone(), targets), expected)
    h, w = randn(5, 4), randn(11, 4)
    expected = linear_cross_entropy_reference(h, w, targets)
    assert_close(linear_cross_entropy(h, w, targets), expected)


def test_one_row_of_logits_has_a_loss():
    for dtype in (torch.float32, torch.float64):  # the kernel, and the reference
        x, target = randn(8).to(dtype), torch.tensor(3, device=DEVICE)
        want = -x.log_softmax(-1)[3]
        assert_close(cross_entropy(x.clone(), target).to(dtype), want)
        eye = torch.eye(8, device=DEVICE, dtype=dtype)
        assert_close(linear_cross_entropy(x, eye, target).to(dtype), want)


def test_rows_of_no_width_and_no_heads_are_empty():
    assert rms_norm(randn(2, 0), randn(0)).shape == (2, 0)
    assert [y.shape for y in add_rms_norm(randn(2, 0), randn(2, 0), randn(0))] == (
        [(2, 0)] * 2
    )
    _, k, cos, sin = heads(1, 3, 1, 2, 8)
    none, turned = rope(randn(1, 3, 0, 8), k, cos, sin)
    assert none.shape == (1, 3, 0, 8)
    assert_close(turned, Rotation(cos, sin).turn(k))


def test_angles_that_learn_get_their_gradient():
    q, k, cos, sin = heads(2, 3, 2, 1, 6)
    angles = [cos.clone().requires_grad_(), sin.clone().requires_grad_()]
    dy = torch.randn_like(q)
    got = torch.autograd.grad(rope(q, k, *angles)[0], angles, dy)
    expected = torch.autograd.grad(rope_reference(q, k, *angles)[0], angles, dy)
    for x, y in zip(got, expected, strict=True):
        assert_close(x, y)
    launches.clear()
    with torch.no_grad():
        rope(q, k, *angles)
    assert launches


@pytest.mark.parametrize("name", OPS)
def test_a_second_derivative_is_refused(name):
    op = OPS[name]
    inputs = op.inputs(*op.shapes[0 if "long" in name else 1])
    n = 2 if name == "rope" else len(inputs)
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in inputs[:n]]
    trained = [x for x in leaves if x.is_floating_point()]
    copies = [x.clone() if x.is_floating_point() else x for x in leaves]
    out = op.fast(*copies, *inputs[n:])
    total = torch.stack([y.sum() for y in (out if isinstance(out, tuple) else (out,))])
    with pytest.raises(RuntimeError, match=r"has no derivative in turn.*_reference"):
        torch.autograd.grad(total.sum(), trained, create_graph=True)
