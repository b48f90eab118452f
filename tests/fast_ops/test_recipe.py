"""`--fast` in the training recipe: the same curve."""

import csv

from minllama.cli import main


def test_training_with_fast_ops_follows_the_plain_curve(tmp_path):
    (tmp_path / "corpus.txt").write_text("low lower lowest newer wider. " * 200)
    words = [
        "train", "--data", str(tmp_path / "corpus.txt"), "--vocab-size", "270",
        "--dim", "32", "--n-layers", "2", "--seq-len", "32", "--batch-size", "2",
        "--steps", "3", "--warmup", "1", "--device", "cpu",
    ]  # fmt: skip
    curves = []
    for name, more in (("plain", []), ("fast", ["--fast"])):
        assert main([*words, "--out", str(tmp_path / name), *more]) == 0
        with (tmp_path / name / "curve.csv").open() as file:
            curves.append([float(row["loss"]) for row in csv.DictReader(file)])
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) <= 2e-5
