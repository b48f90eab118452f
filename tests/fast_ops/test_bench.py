"""The bench measures every operator, and counts the bytes that must move."""

import sys

import pytest
import torch

from minllama.architecture.kernels import HAS_TRITON
from minllama.fast_ops import bench
from minllama.fast_ops.timing import copy_bandwidth, seconds
from tests.conftest import DEVICE

KIND = {"device": DEVICE, "dtype": torch.float32}


@pytest.mark.skipif(not HAS_TRITON, reason="kernels need Triton")
def test_the_command_prints_time_and_share(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "swiglu", "--small"])
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e12)
    bench.main()
    out = capsys.readouterr().out
    assert "copy on" in out and out.count("of copy") == 4
    assert "kernel" in out and "reference" in out


def test_bytes_are_counted_once_each():
    case = bench.rms_norm_case(3, 5, **KIND)
    assert (case.forward_bytes, case.both_bytes) == (2 * 60, 5 * 60)
    case = bench.rope_case(2, 3, 4, 2, 8, **KIND)
    assert case.both_bytes == 4 * 4 * (2 * 3 * 6 * 8)


def test_what_is_prepared_is_not_timed():
    calls = []
    seconds(lambda: calls.append("run"), "cpu", 3, prepare=lambda: calls.append("set"))
    assert calls == ["set", "run"] * 4  # one warm-up


def test_a_copy_has_a_bandwidth():
    assert copy_bandwidth(DEVICE, repeats=2) > 1e8
