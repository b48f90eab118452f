"""Nothing is lost, wherever a save is killed."""

import json
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

from tests.dist_checkpoint.kill_tests import POINTS

ROOT = Path(__file__).parents[2]


def test_a_kill_at_any_step_leaves_the_last_complete_checkpoint_in_force():
    command = [sys.executable, "-m", "tests.dist_checkpoint.kill_tests", "--injected"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    struck = Counter((r["world"], r["point"]) for r in results)
    assert struck.keys() == set(product((1, 2), POINTS))
    assert min(struck.values()) == 5
    for r in results:
        assert r["inside"], r  # it did die there
        assert r["step"] == (2 if r["point"] == "after the rename" else 1), r
        assert r["lost"] == [], r
