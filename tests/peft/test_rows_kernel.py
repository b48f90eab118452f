"""The kernels of mixed rows beside a library's batched products."""

import pytest
import torch
from torch.testing import assert_close

from minllama.architecture.kernels import interpreting, launches
from minllama.peft import add_lora, mix_adapters, set_rows
from minllama.peft.rows_kernel import (
    rows_down,
    rows_down_few,
    rows_down_reference,
    rows_up,
    rows_up_,
    rows_up_reference,
)
from tests.conftest import DEVICE, make_model, random_tokens

if DEVICE == "cpu" and not interpreting():
    pytest.skip("kernels need a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

DOWN = [(1, 1, 7, 1), (3, 1, 32, 48), (2, 5, 2049, 3), (8, 8, 100, 16)]  # B, T, in, R
UP = [  # B, T, ranks and outputs of layers that share x
    (1, 1, [1], [7]),
    (3, 1, [16, 16, 16], [600, 100, 100]),
    (2, 8, [5, 3], [257, 256]),
    (2, 7, [40], [129]),
]


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", DOWN)
def test_down_equals_a_batched_product(size, dtype):
    B, T, d_in, R = size
    x, a = randn(B, T, d_in, dtype=dtype), randn(B, R, d_in, dtype=dtype)
    before = launches["_rows_down"]
    with torch.no_grad():
        low = rows_down(x, a)
    assert launches["_rows_down"] == before + 1 and low.dtype == dtype
    exact = rows_down_reference(x.double(), a.double())
    step = 1e-5 if dtype == torch.float32 else 2**-7  # interpreted stores cut
    assert_close(low.double(), exact, rtol=step, atol=step * d_in**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", UP)
def test_up_adds_batched_products_in_place(size, dtype):
    B, T, ranks, outs = size
    ys = [randn(B, T, out, dtype=dtype) for out in outs]
    bs = [randn(B, r, out, dtype=dtype) for r, out in zip(ranks, outs)]
    low = randn(B, T, sum(ranks), dtype=dtype)
    wide = [y.double() for y in ys], low.double(), [b.double() for b in bs]
    exact = rows_up_reference(*wide)
    before = launches["_rows_up"]
    with torch.no_grad():
        results = rows_up(ys, low, bs)
    assert launches["_rows_up"] == before + 1
    step = 1e-5 if dtype == torch.float32 else 2**-7
    for y, result, want in zip(ys, results, exact):
        assert result is y
        assert_close(y.double(), want, rtol=step, atol=step * max(ranks) ** 0.5)


def test_a_row_whose_b_is_zero_keeps_its_bits():
    y, low, b = randn(3, 2, 70), randn(3, 2, 4), randn(3, 4, 70)
    b[1] = 0
    before = y.clone()
    with torch.no_grad():
        rows_up([y], low, [b])
    assert torch.equal(y[1], before[1]) and not torch.equal(y[0], before[0])


def test_many_tokens_gradients_and_float64_are_the_librarys():
    a = randn(2, 4, 32)
    before = launches["_rows_down"] + launches["_rows_up"]
    with torch.no_grad():
        rows_down(randn(2, 9, 32), a)
        rows_down(randn(2, 1, 32).double(), a.double())
        rows_up([randn(2, 9, 5)], randn(2, 9, 3), [randn(2, 3, 5)])
    x = randn(2, 1, 32).requires_grad_()
    rows_down(x, a).sum().backward()
    assert launches["_rows_down"] + launches["_rows_up"] == before
    assert x.grad is not None


def test_pytorch_accepts_the_operators():
    torch.library.opcheck(rows_down_few, (randn(2, 1, 8), randn(2, 3, 8)))
    pair = [randn(2, 1, 8), randn(2, 1, 5)], randn(2, 1, 5)
    torch.library.opcheck(rows_up_, (*pair, [randn(2, 3, 8), randn(2, 2, 5)]))


def test_a_step_of_a_mixed_model_runs_eight_kernels_a_block():
    model = make_model("llama").to(DEVICE)
    for name in ("anna", "bob"):
        add_lora(model, 3, 6, "all-linear", name=name)
    mix_adapters(model)
    for layer in model.modules():
        if hasattr(layer, "row_b"):
            torch.nn.init.normal_(layer.b, std=0.1)
    tokens = random_tokens(3, 6).to(DEVICE)
    set_rows(model, ["bob", None, "anna"])
    with torch.no_grad():
        whole = model(tokens)
        caches = model.new_caches(3, 6)
        model(tokens[:, :5], caches=caches)
        before = dict(launches)
        last = model(tokens[:, 5:], caches=caches)
    blocks = len(model.layers)
    assert launches["_rows_down"] - before.get("_rows_down", 0) == 4 * blocks
    assert launches["_rows_up"] - before.get("_rows_up", 0) == 4 * blocks
    assert_close(last, whole[:, 5:], rtol=0, atol=2e-5)
