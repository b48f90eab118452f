"""Flash attention is attention: same outputs, same gradients, whoever sees whom."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from minllama.architecture.kernels import interpreting, launches
from minllama.architecture.layout import Layout, packed
from minllama.fast_ops import flash_attention_tiles
from minllama.fast_ops.flash_attention import (
    flash_attention,
    flash_attention_backward,
    flash_attention_forward,
    flash_attention_reference,
)
from minllama.fast_ops.flash_attention_1 import flash_attention_1
from tests.conftest import DEVICE, CountingBackend

CLOSE = {"rtol": 2e-5, "atol": 2e-5}  # float32 sums in another order
BF16 = {"rtol": 2**-6, "atol": 2**-6}  # bfloat16's step is 2^-8; probabilities, stores


def draw(B=1, T=7, S=None, H=2, K=1, d=16, dtype=torch.float32) -> list[Tensor]:
    shapes = ((B, T, H, d), (B, S or T, K, d), (B, S or T, K, d))
    return [torch.randn(s, device=DEVICE, dtype=dtype).requires_grad_() for s in shapes]


def both(inputs: list[Tensor], first=None, last=None, dtype=torch.float64):
    """Output and gradients, of the kernels and of the definition in `dtype`."""
    do = torch.randn_like(inputs[0])
    y = flash_attention(*inputs, first, last)
    fast = (y, *torch.autograd.grad(y, inputs, do))
    wide = [x.detach().to(dtype).requires_grad_() for x in inputs]
    y = flash_attention_reference(*wide, first, last)
    slow = (y, *torch.autograd.grad(y, wide, do.to(dtype)))
    return fast, [x.to(inputs[0].dtype) for x in slow]


def span(*documents: int) -> Layout:
    positions = torch.cat([torch.arange(n) for n in documents])
    return packed(positions[None].to(DEVICE))


def test_the_kernels_ran_and_not_the_reference():
    if DEVICE == "cpu" and not interpreting():
        pytest.skip("kernels need a GPU, or TRITON_INTERPRET=1")
    before = launches.copy()
    inputs = draw()
    flash_attention(*inputs).sum().backward()
    flash_attention_1(*inputs)
    after = launches - before
    names = ("forward", "backward_queries", "backward_keys", "attention_1")
    assert [after[f"_flash_{name}"] for name in names] == [1, 1, 1, 1]


@pytest.mark.parametrize("T, S", [(1, 1), (7, 7), (130, 130), (7, 130), (1, 40)])
def test_a_triangle_equals_the_definition(T: int, S: int):
    for ours, true in zip(*both(draw(T=T, S=S))):
        assert_close(ours, true, **CLOSE)


@pytest.mark.parametrize("d", [8, 12, 20, 32, 80, 96, 128])
def test_any_width_of_head(d: int):
    for ours, true in zip(*both(draw(T=33, d=d))):
        assert_close(ours, true, **CLOSE)


@pytest.mark.parametrize("H, K", [(1, 1), (4, 1), (6, 2), (3, 3)])
def test_query_heads_share_key_heads(H: int, K: int):
    for ours, true in zip(*both(draw(B=2, T=9, S=20, H=H, K=K))):
        assert_close(ours, true, **CLOSE)


@pytest.mark.parametrize("layout", ["triangle", "documents"])
def test_bfloat16_is_rounded_only_at_the_ends(layout: str):
    inputs = draw(T=130, d=32, dtype=torch.bfloat16)
    ends = (None, None)
    if layout == "documents":
        documents = span(40, 90)
        ends = (documents.first, documents.last)
    for ours, true in zip(*both(inputs, *ends)):
        assert_close(ours, true, **BF16)


def test_the_reference_equals_pytorch():
    q, k, v = draw(B=2, T=9, H=4, K=2)
    y = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    assert_close(flash_attention_reference(q, k, v), y.transpose(1, 2))


def test_the_reference_passes_gradcheck():
    inputs = [x.detach().double().requires_grad_() for x in draw(T=5, S=6, H=2, d=3)]
    last = torch.tensor([[0, 3, 2, 5, 4]], device=DEVICE)
    first = torch.tensor([[0, 1, 2, 0, 5]], device=DEVICE)  # the fifth sees no key
    for ends in ((None, None), (first, last)):
        assert torch.autograd.gradcheck(
            lambda q, k, v, ends=ends: flash_attention_reference(q, k, v, *ends), inputs
        )


@pytest.mark.parametrize("window", [1, 7, 1000])
def test_documents_windows_and_both(window: int):
    layout = span(37, 1, 72, 20).within(window, 130)
    for ours, true in zip(*both(draw(T=130), layout.first, layout.last)):
        assert_close(ours, true, **CLOSE)


def test_rows_of_different_length():
    last = torch.tensor([[3], [90]], device=DEVICE) + torch.arange(5, device=DEVICE)
    for ours, true in zip(*both(draw(B=2, T=5, S=100), None, last)):
        assert_close(ours, true, **CLOSE)


def test_a_first_key_without_a_last_is_a_cut_triangle():
    first = torch.full((1, 7), 2, device=DEVICE)
    for ours, true in zip(*both(draw(T=7, S=20), first)):
        assert_close(ours, true, **CLOSE)


@pytest.mark.parametrize("far", [2**31 - 1, 2**31, 2**33, 2**63 - 1])
def test_ends_may_be_any_integer_of_64_bits(far: int):
    """What lies beyond all keys lies there, however far, on either side."""
    inputs, S = draw(T=7, S=20), 20
    sides = {"all": (-far, far), "none": (far, far), "none either": (-far, -far)}
    near = {"all": (0, S - 1), "none": (S, S - 1), "none either": (0, -1)}
    for case in sides:
        got, expected = (
            flash_attention(
                *inputs, *(torch.full((1, 7), end, device=DEVICE) for end in pair)
            )
            for pair in (sides[case], near[case])
        )
        assert torch.equal(got, expected), case
        do = torch.ones_like(got)
        for a, b in zip(
            torch.autograd.grad(got, inputs, do),
            torch.autograd.grad(expected, inputs, do),
        ):
            assert torch.equal(a, b), case


def test_any_interval_even_none():
    """In no order, past the end, before the start, and queries that see nothing."""
    first = torch.randint(-5, 90, (2, 70), device=DEVICE)
    last = first + torch.randint(-3, 60, (2, 70), device=DEVICE)
    fast, slow = both(draw(B=2, T=70, S=100), first, last)
    for ours, true in zip(fast, slow):
        assert_close(ours, true, **CLOSE)
    nothing = (last < first) | (last < 0)
    assert nothing.any() and fast[0][nothing].eq(0).all()


def test_no_gradient_crosses_a_border_of_documents():
    layout = span(50, 80)
    q, k, v = draw(T=130)
    y = flash_attention(q, k, v, layout.first, layout.last)
    y[:, 50:].sum().backward()
    for x in (q, k, v):
        assert x.grad[:, :50].eq(0).all() and x.grad[:, 50:].ne(0).any()


@pytest.mark.filterwarnings("ignore:.*NaN", "ignore:invalid value")  # of numpy
def test_tiles_that_nobody_sees_are_not_read():
    """Not masked: a NaN there would spread through 0 * NaN."""
    layout = span(64, 64)
    q, k, v = draw(T=128)
    poisoned = [x.detach().clone() for x in (k, v)]
    for x in poisoned:
        x[:, :64] = torch.nan
    y = flash_attention(q, *poisoned, layout.first, layout.last)
    assert y[:, 64:].isfinite().all() and y[:, :64].isnan().all()


def test_strides_do_not_matter():
    fused = torch.randn(2, 9, 4, 20, device=DEVICE)
    q, k, v = fused.split([2, 1, 1], dim=2)
    turned = torch.randn(2, 2, 20, 9, device=DEVICE).permute(0, 3, 1, 2)
    shared = torch.randn(1, 9, 1, 20, device=DEVICE).expand(2, -1, -1, -1)
    for inputs in ((q, k, v), (turned, k, v), (q, shared, shared)):
        inputs = [x.detach().requires_grad_() for x in inputs]
        copies = [x.detach().contiguous().requires_grad_() for x in inputs]
        y, same = flash_attention(*inputs), flash_attention(*copies)
        assert_close(y, same, rtol=0, atol=0)
        do = torch.ones(1, device=DEVICE).expand_as(y)  # strides of 0, as sum() gives
        got = torch.autograd.grad(y, inputs, do)
        for a, b in zip(got, torch.autograd.grad(same, copies, do.contiguous())):
            assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("B, T, S", [(0, 5, 5), (2, 0, 0), (2, 0, 5)])
def test_empty_inputs(B: int, T: int, S: int):
    shapes = ((B, T, 2, 16), (B, S, 1, 16), (B, S, 1, 16))
    inputs = [torch.randn(s, device=DEVICE).requires_grad_() for s in shapes]
    y = flash_attention(*inputs)
    y.sum().backward()
    assert y.shape == shapes[0] and all(x.grad.eq(0).all() for x in inputs)


def test_no_keys_at_all_give_zero():
    q = torch.randn(1, 3, 2, 16, device=DEVICE, requires_grad=True)
    k = torch.randn(1, 0, 1, 16, device=DEVICE)
    last = torch.full((1, 3), -1, device=DEVICE)
    y = flash_attention(q, k, k, None, last)
    y.sum().backward()
    assert y.eq(0).all() and q.grad.eq(0).all()


def test_scores_may_be_large():
    q, k, v = draw(T=40)
    inputs = [x.detach().requires_grad_() for x in (10 * q, 10 * k, v)]
    for ours, true in zip(*both(inputs)):  # scores of 1000, whose step is 6e-5
        assert_close(ours, true, rtol=1e-3, atol=1e-3)


def test_scale_is_that_of_the_scores():
    q, k, v = draw()
    halved = flash_attention(q / 2, k, v)
    assert_close(flash_attention(q, k, v, scale=16**-0.5 / 2), halved)


def test_gradients_are_the_same_bits_each_time():
    inputs = draw(T=70, H=2)
    do = torch.randn_like(inputs[0])
    runs = [torch.autograd.grad(flash_attention(*inputs), inputs, do) for _ in "12"]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_the_logsumexp_is_kept():
    q, k, v = (x.detach() for x in draw(T=40, H=2, K=2))
    _, lse = flash_attention_forward(q, k, v, None, None, 0.25)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * 0.25
    hidden = torch.ones(40, 40, device=DEVICE).triu(1).bool()
    assert_close(lse, scores.masked_fill(hidden, -torch.inf).logsumexp(-1), **CLOSE)


@pytest.mark.skipif(not interpreting(), reason="on a GPU the device decides")
def test_the_copy_engine_reads_the_same(monkeypatch):
    inputs, layout = draw(T=70, H=2, K=1, d=24), span(30, 40)
    ends = (layout.first, layout.last)
    plain = [both(inputs), both(inputs, *ends)]
    monkeypatch.setattr(flash_attention_tiles, "has_engine", lambda device: True)
    monkeypatch.setattr(flash_attention_tiles, "ENGINE_SIZES", (4,))
    assert flash_attention_tiles.takes_engine(*inputs)
    for (expected, _), pair in zip(plain, ((None, None), ends)):
        y = flash_attention(*inputs, *pair)
        assert_close(y, expected[0], rtol=0, atol=0)
        for ours, true in zip(*both(inputs, *pair)):
            assert_close(ours, true, **CLOSE)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # of PyTorch
def test_compiled_in_one_graph():
    backend = CountingBackend()
    inputs = draw(T=9)
    fast = torch.compile(flash_attention, fullgraph=True, backend=backend)
    y = fast(*inputs)
    grads = torch.autograd.grad(y, inputs, torch.ones_like(y))
    assert backend.graphs == 1
    plain = flash_attention(*inputs)
    assert_close(y, plain, rtol=0, atol=0)
    for a, b in zip(grads, torch.autograd.grad(plain, inputs, torch.ones_like(y))):
        assert_close(a, b, rtol=0, atol=0)


def test_activation_checkpointing_gives_the_same():
    inputs = draw(T=9)
    do = torch.randn_like(inputs[0])
    again = checkpoint(flash_attention, *inputs, use_reentrant=False)
    plain = torch.autograd.grad(flash_attention(*inputs), inputs, do)
    for a, b in zip(torch.autograd.grad(again, inputs, do), plain):
        assert_close(a, b, rtol=0, atol=0)


def test_operators_are_registered_as_pytorch_wants_them():
    q, k, v = (x.detach() for x in draw(T=9))
    last = torch.arange(9, device=DEVICE)[None]
    for ends in ((None, None), (last - 3, last)):
        o, lse = flash_attention_forward(q, k, v, *ends, 0.25)
        torch.library.opcheck(flash_attention_forward, (q, k, v, *ends, 0.25))
        inputs = (q, k, v, o, lse, o, *ends, 0.25)
        torch.library.opcheck(flash_attention_backward, inputs)


def test_autocast_is_followed():
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert flash_attention(*draw()).dtype == torch.bfloat16


@pytest.mark.parametrize("T, S", [(1, 1), (40, 70)])
def test_version_1_gives_the_same(T: int, S: int):
    q, k, v = draw(B=2, T=T, S=S, H=2, d=20)
    y = flash_attention_reference(q, k, v)
    assert_close(flash_attention_1(q, k, v), y.detach(), **CLOSE)
    half = [x.bfloat16() for x in (q, k, v)]
    y = flash_attention_reference(*half)
    assert_close(flash_attention_1(*half), y.detach(), **BF16)


def test_float64_takes_the_reference():
    before = launches.copy()
    inputs = [x.detach().double() for x in draw()]
    y = flash_attention_reference(*inputs)
    assert_close(flash_attention(*inputs), y, rtol=0, atol=0)
    assert_close(flash_attention_1(*inputs), y, rtol=0, atol=0)
    assert launches == before


def test_without_the_interpreter_a_cpu_takes_the_reference():
    code = """if True:
        import torch
        from minllama.architecture.kernels import launches
        from minllama.fast_ops.flash_attention import *
        from minllama.fast_ops.flash_decode import *
        q, k, v = (torch.randn(1, 5, 2, 16) for _ in "qkv")
        y = flash_attention_reference(q, k, v)
        assert torch.equal(flash_attention(q, k, v), y)
        assert torch.equal(flash_decode(q, k, v), y) and not launches
    """
    import os

    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def ends(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long, device=DEVICE)


WRONG = {
    r"q \(7, 2, 16\)": lambda q, k, v: (q[0], k, v),
    r"v \(1, 6, 1, 16\)": lambda q, k, v: (q, k, v[:, 1:]),
    r"k \(1, 7, 1, 8\)": lambda q, k, v: (q, k[..., :8], v[..., :8]),
    "3 query heads are no multiple of 2": lambda q, k, v: (
        q[:, :, :1].expand(-1, -1, 3, -1),
        *(x.expand(-1, -1, 2, -1) for x in (k, v)),
    ),
    "head width 272": lambda *qkv: [x.repeat(1, 1, 1, 17) for x in qkv],
    "v torch.bfloat16": lambda q, k, v: (q, k, v.bfloat16()),
    "dtype=torch.int64": lambda *qkv: [x.long() for x in qkv],
    "device=meta": lambda *qkv: [x.to("meta") for x in qkv],
    "7 queries and 6 keys": lambda q, k, v: (q, k[:, 1:], v[:, 1:]),
    r"last of shape \(3, 7\)": lambda *qkv: (*qkv, None, ends(3, 7)),
    r"first of shape \(1, 6\)": lambda *qkv: (*qkv, ends(1, 6), ends(1, 7)),
    "last is torch.float32": lambda *qkv: (*qkv, None, ends(1, 7).float()),
    "scale=-1": lambda *qkv: (*qkv, None, None, -1),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_the_kernels_would_misread_is_refused(words: str):
    inputs = [x.detach() for x in draw()]
    with pytest.raises(ValueError, match=words):
        flash_attention(*WRONG[words](*inputs))


@pytest.mark.skipif(DEVICE != "cuda", reason="large shapes need a GPU")
@pytest.mark.parametrize("d", [64, 128])
def test_large_bfloat16_on_a_gpu(d: int):
    inputs = draw(B=2, T=2048, H=32, K=8, d=d, dtype=torch.bfloat16)
    fast, slow = both(inputs, dtype=torch.float32)
    for ours, true in zip(fast, slow):
        assert (ours - true).norm() / true.norm() < 1e-2


def test_a_second_derivative_is_refused():
    if DEVICE == "cpu" and not interpreting():
        pytest.skip("kernels need a GPU, or TRITON_INTERPRET=1")
    q, k, v = (torch.randn(1, 5, 2, 16, device=DEVICE) for _ in "qkv")
    y = flash_attention(q.requires_grad_(), k, v).sum()
    with pytest.raises(RuntimeError, match="flash_attention: its gradient has no"):
        torch.autograd.grad(y, q, create_graph=True)
