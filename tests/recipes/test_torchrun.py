"""Recipes under torchrun: the same command, more processes, the same result."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minllama.cli import main

TEXT = "The quick brown fox jumps over the lazy dog, twice. <|endoftext|>" * 60


def torchrun(world: int, module: str, *words: str) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world),
        "--standalone", "-m", f"minllama.recipes.{module}", *words,
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.PIPE
    return subprocess.Popen(command, stdout=out, stderr=out, text=True, env=env)


def losses(folder: Path) -> list[float]:
    with (folder / "curve.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture
def words(tmp_path) -> list[str]:
    (tmp_path / "corpus.txt").write_text(TEXT)
    return [
        "--data", str(tmp_path / "corpus.txt"), "--vocab-size", "270", "--dim", "32",
        "--n-layers", "2", "--seq-len", "32", "--batch-size", "4", "--warmup", "2",
        "--device", "cpu", "--lr", "1e-3",
    ]  # fmt: skip


def test_a_run_told_to_end_saves_and_goes_on_in_one_process(capsys, tmp_path, words):
    there, here = tmp_path / "there", tmp_path / "here"
    words += ["--steps", "60", "--save-every", "1000"]
    run = torchrun(2, "train", *words, "--out", str(there))
    until = time.monotonic() + 120
    while run.poll() is None and time.monotonic() < until:
        if (there / "curve.csv").exists() and len(losses(there)) > 2:
            break
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=60)
    assert "told to end: saved after step" in err or "step-" in str(
        list((there / "checkpoints").iterdir())
    )
    stopped_at = len(losses(there))
    assert 2 < stopped_at < 60
    assert main(["train", *words, "--out", str(there)]) == 0
    assert f"going on from step {stopped_at} of 60" in capsys.readouterr().out
    assert main(["train", *words, "--out", str(here)]) == 0
    gaps = [abs(a - b) for a, b in zip(losses(there), losses(here), strict=True)]
    assert max(gaps[:20]) <= 2e-5  # the curve's last digit
    assert max(gaps) < 1e-2


def test_all_axes_at_once_and_generation_on_two(capsys, tmp_path, words):
    out = tmp_path / "out"
    run = torchrun(4, "train", *words, "--out", str(out), "--steps", "6",
                   "--tensor", "2", "--checkpointing", "full", "--bf16",
                   "--profile", "4")  # fmt: skip
    said, err = run.communicate(timeout=240)
    assert run.returncode == 0, err
    assert "shard 2, tensor 2" in said and "step 6/6" in said
    assert (out / "trace-step4-rank3.json").exists()
    assert main(["verify", str(out)]) == 0
    expected = ["The", "--model", str(out), "--temperature", "0", "--max-new-tokens",
                "8", "--device", "cpu"]  # fmt: skip
    capsys.readouterr()
    assert main(["generate", *expected]) == 0
    alone = capsys.readouterr().out
    for more in ([], ["--sharded"]):
        run = torchrun(2, "generate", *expected, *more)
        said, err = run.communicate(timeout=120)
        assert run.returncode == 0, err
        assert said == alone
