"""Triton, guarded: where it is missing, where it interprets, and what is refused."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minllama.architecture import kernels
from minllama.architecture.kernels import (
    HAS_TRITON,
    UPCAST,
    cdiv,
    interpreter_problem,
    interpreting,
    kernel_name,
    launch,
    launches,
    next_power_of_2,
    operator,
    processors,
    takes_kernel,
    tl,
    triton,
)
from tests.conftest import DEVICE

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not interpreting()),
    reason="kernels need Triton, and without a GPU its interpreter",
)


@triton.jit
def _double(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n).to(tl.float32)
    tl.store(y_ptr + at, 2 * x, mask=at < n)


@triton.jit
def _product(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    tl.store(c_ptr + at, tl.dot(a, b))


@needs_triton
def test_a_launch_runs_and_is_counted():
    x = torch.randn(7, device=DEVICE)
    y = torch.empty_like(x)
    launches.clear()
    launch(_double, (2,), x, y, 7, BLOCK=4)
    assert torch.equal(y, 2 * x)
    assert launches == Counter(_double=1)


@needs_triton
def test_an_empty_grid_launches_nothing():
    launches.clear()
    launch(_double, (0,), torch.empty(0, device=DEVICE), 0, BLOCK=4)
    assert not launches


@needs_triton
def test_a_dot_of_bfloat16_is_right_when_upcast():
    a, b = (torch.randn(16, 16, device=DEVICE).bfloat16() for _ in range(2))
    c = torch.empty(16, 16, device=DEVICE)
    launch(_product, (1,), a, b, c, N=16)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("its", "numpys", "bad"),
    [("3.6.0", "2.4.6", True), ("3.6.0", "2.3.5", False), ("3.7.1", "2.4.6", False)],
)
def test_an_interpreter_that_cannot_loop_says_what_to_install(its, numpys, bad):
    problem = interpreter_problem(its, numpys)
    assert bad == (problem is not None and "pip install 'numpy<2.4'" in problem)


def test_a_kernel_has_the_name_of_its_function():
    assert kernel_name(_double) == ("_double" if HAS_TRITON else "kernel")


@needs_triton
def test_float64_and_a_plain_cpu_take_the_reference(monkeypatch):
    x = torch.ones(2, device=DEVICE)
    assert takes_kernel("op", x, x.bfloat16())
    assert not takes_kernel("op", x, x.double())
    monkeypatch.setattr(kernels, "_INTERPRET", False)
    assert takes_kernel("op", x) == (DEVICE == "cuda")


def test_a_dtype_that_no_kernel_knows_is_refused():
    with pytest.raises(ValueError, match="rope: dtype=torch.int32 is none of float32"):
        takes_kernel("rope", torch.ones(2, dtype=torch.int32))


def test_a_device_without_kernels_is_refused():
    with pytest.raises(ValueError, match="device=meta has no kernel.*op_reference"):
        takes_kernel("op", torch.ones(2, device="meta"))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs two devices")
def test_two_devices_are_refused():
    with pytest.raises(ValueError, match="tensors on cuda:0 and on cpu"):
        takes_kernel("op", torch.ones(2, device="cuda"), torch.ones(2))


def _add_one(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def test_an_operator_is_known_to_pytorch_by_its_name():
    add = operator(fake=lambda x, y: torch.empty_like(x))(_add_one)
    x = torch.randn(3)
    assert torch.equal(torch.ops.minllama._add_one(x, x), x + x)
    torch.library.opcheck(add, (x, x))


@pytest.mark.parametrize(("n", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (1025, 2048)])
def test_the_next_power_of_two(n, power):
    assert next_power_of_2(n) == power


def test_blocks_hold_all():
    assert [cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_a_device_has_processors():
    assert processors(torch.device(DEVICE)) >= 1


def test_without_triton_only_a_launch_fails():
    """In a process of its own, where Triton cannot be imported: macOS, Windows."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from minllama.architecture.kernels import HAS_TRITON, launch, tl, triton
assert not HAS_TRITON
@triton.jit
def kernel(x_ptr, BLOCK: tl.constexpr):
    pass
import minllama.fast_ops as f
x = torch.randn(2, 4)
assert torch.equal(f.swiglu(x, x), f.swiglu_reference(x, x))
try:
    launch(kernel, (1,), x)
except RuntimeError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "needs Triton, which is not installed" in run.stdout


def test_without_triton_a_gpu_tensor_is_told_so(monkeypatch):
    class OnGPU:
        device, dtype = torch.device("cuda", 0), torch.float32

    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="needs Triton.*op_reference"):
        takes_kernel("op", OnGPU())  # type: ignore[arg-type]
