"""The bench measures every operator, and counts the work that must be done."""

import sys

import pytest
import torch
from torch.testing import assert_close

from minllama import fast_ops
from minllama.architecture import tuning
from minllama.architecture.kernels import HAS_TRITON, interpreting, launches
from minllama.fast_ops import bench
from minllama.fast_ops.timing import copy_bandwidth, seconds
from tests.conftest import DEVICE

KIND = {"device": DEVICE, "dtype": torch.float32}
ALL = bench.CASES | bench.OTHERS
needs_kernels = pytest.mark.skipif(
    not (HAS_TRITON and (DEVICE == "cuda" or interpreting())),
    reason="no kernel runs here",
)


def print_of(monkeypatch, capsys, *words: str) -> list[str]:
    """Lines that the command prints; limits are not measured."""
    monkeypatch.setattr(sys, "argv", ["bench", *words, "--small"])
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e12)
    monkeypatch.setattr(bench, "matmul_rate", lambda device, dtype, size: 1e15)
    monkeypatch.setattr(bench, "seconds", lambda run, *_: (run(), 1.0)[1])
    bench.main()
    return capsys.readouterr().out.splitlines()


@needs_kernels
def test_the_command_prints_time_and_share(capsys, monkeypatch):
    lines = print_of(monkeypatch, capsys, "swiglu")
    kernel = "kernel" if DEVICE == "cuda" else "interpreted"
    assert lines[0].startswith("copy on")
    assert [line.split()[2] for line in lines[1:5]] == [kernel] * 2 + ["reference"] * 2
    assert all("GB/s" in line and "of a copy" in line for line in lines[1:5])


@needs_kernels
def test_products_are_counted_in_flops_and_decoding_has_no_backward(
    capsys, monkeypatch
):
    lines = print_of(monkeypatch, capsys, *bench.OTHERS)
    linear, flash, decode = (
        [line for line in lines if line.startswith(op + " ")] for op in bench.OTHERS
    )
    assert len(linear) == len(flash) == 4 and len(decode) == 2
    assert all("TFLOP/s" in x and "of a product" in x for x in linear + flash)
    assert all("GB/s" in x and "of a copy" in x for x in decode)


def test_where_no_kernel_runs_the_reference_alone_is_timed(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "interpreting", lambda: False)
    monkeypatch.setattr(bench, "compiled", {})  # of other tests, on a GPU
    lines = print_of(monkeypatch, capsys, "softmax")
    assert lines[0].startswith("no kernel runs on a CPU")
    assert [line.split()[2] for line in lines[2:]] == ["reference"] * 2


@needs_kernels
@pytest.mark.parametrize("name", ALL)
def test_every_case_runs_its_kernel_and_agrees(name):
    make, _, small = ALL[name]
    case = make(*small, **KIND)
    launches.clear()
    got, want = (case.runs(op)["forward"]() for op in (case.fast, case.reference))
    assert launches
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_no_operator_is_left_out():
    ops = {name for name in fast_ops.__all__ if f"{name}_reference" in dir(fast_ops)}
    assert set(ALL) == ops


def test_bytes_are_counted_once_each():
    case = bench.rms_norm_case(3, 5, **KIND)
    assert (case.forward_work, case.both_work) == (2 * 60, 5 * 60)
    case = bench.rope_case(2, 3, 4, 2, 8, **KIND)
    assert case.both_work == 4 * 4 * (2 * 3 * 6 * 8)
    case = bench.flash_decode_case(2, 3, 4, 2, 8, **KIND)
    assert case.forward_work == 2 * 4 * (2 * 3 * 2 * 8)


def test_flops_are_those_of_the_products():
    case = bench.flash_attention_case(1, 3, 2, 1, 8, **KIND)
    pairs = 2 * (1 + 2 + 3)  # two heads, a triangle each
    assert case.forward_work == 2 * (2 * 8 * pairs)  # q k and p v
    assert case.both_work == case.forward_work + 5 * (2 * 8 * pairs)


def test_what_is_prepared_is_not_timed():
    calls = []
    seconds(lambda: calls.append("run"), "cpu", 3, prepare=lambda: calls.append("set"))
    assert calls == ["set", "run"] * 4  # one warm-up


def test_a_copy_has_a_bandwidth():
    assert copy_bandwidth(DEVICE, repeats=2) > 1e8


@needs_kernels
@pytest.mark.parametrize("name", ALL)
def test_other_sizes_of_blocks_change_no_result(name, monkeypatch):
    """So `--tune` may try them. On a GPU a few do not compile, and lose."""
    make, _, small = ALL[name]
    case = make(*small, **KIND)
    restore, tried = bench.restorer(case), 0
    for run in case.runs(case.fast).values():
        restore()
        want = tuple_of(run())
        restore()
        for kernel, written in tuning._listen(run).items():
            for sizes in tuning.neighbours(written):
                monkeypatch.setitem(tuning._trials, kernel, sizes)
                restore()
                try:
                    got = tuple_of(run())
                except Exception:
                    assert DEVICE == "cuda", (kernel, sizes)
                    continue
                tried += 1
                for x, y in zip(got, want, strict=True):
                    assert_close(x, y, rtol=1e-4, atol=1e-5)
            monkeypatch.delitem(tuning._trials, kernel)
    assert tried > 2


def tuple_of(y) -> tuple:
    return tuple(x.clone() for x in (y if isinstance(y, tuple) else (y,)))


@needs_kernels
def test_the_command_tunes_and_prints_what_it_tried(capsys, monkeypatch):
    times = iter(range(100, 0, -1))  # the later, the faster
    monkeypatch.setattr(sys, "argv", ["bench", "rope", "--small", "--tune"])
    monkeypatch.setattr(bench, "seconds", lambda run, *_: (run(), next(times))[1])
    monkeypatch.setattr(bench, "gpu_name", lambda device: "Test GPU")
    monkeypatch.setattr(bench, "keep", lambda rows, gpu: f"{gpu}: {len(rows)} rows")
    bench.main()
    out = capsys.readouterr().out.splitlines()
    lines = [line for line in out if line.startswith("_rope ") and " us" in line]
    assert len(lines) == tuning.MAX_TRIES
    assert lines[0].endswith("written") and lines[-1].endswith("best")
    assert out[len(lines)] == f"kept in Test GPU: {tuning.MAX_TRIES} rows"


def test_where_no_kernel_runs_nothing_is_tuned(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "interpreting", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench", "rope", "--tune"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "use a machine with a GPU" in capsys.readouterr().err
