"""Tuning: where it goes, where it stops, and what it keeps."""

import json

import pytest
import torch

from minllama.architecture import tuning
from minllama.architecture.tuning import keep, kept, neighbours, tune, tuned, tuned_file

CPU = torch.device("cpu")
WRITTEN = {"BLOCK": 64, "num_warps": 4}


def kernel() -> None:
    """Stands for one: only its name is asked."""


class Work:
    """A kernel whose time depends on its sizes alone."""

    def __init__(self, cost, key: int = 8) -> None:
        self.cost, self.key, self.sizes, self.runs = cost, key, {}, 0

    def __call__(self) -> None:
        self.runs += 1
        self.sizes = tuned(kernel, (self.key,), CPU, WRITTEN)

    def seconds(self, run) -> float:
        run()
        return self.cost(**self.sizes)


def towards(block: int, warps: int):
    """A valley whose bottom is at these sizes."""
    return lambda BLOCK, num_warps: (
        1 + (BLOCK / block + block / BLOCK) + (num_warps / warps + warps / num_warps)
    )


@pytest.fixture
def gpu(tmp_path, monkeypatch) -> str:
    """A GPU of a name of its own, whose file lies in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "gpu_name", lambda device: "Test GPU 1/2")
    kept.cache_clear()
    yield "Test GPU 1/2"
    kept.cache_clear()


def test_unasked_the_sizes_are_those_written():
    work = Work(towards(512, 8))
    work()
    assert work.sizes == WRITTEN and work.sizes is not WRITTEN


def test_it_walks_down_to_the_best_and_says_what_it_tried():
    work = Work(towards(256, 8))
    rows = tune([work], work.seconds)
    best = [row for row in rows if row["best"]]
    assert [row["sizes"] for row in best] == [{"BLOCK": 256, "num_warps": 8}]
    assert rows[0]["written"] and rows[0]["sizes"] == WRITTEN
    assert sum(row["written"] for row in rows) == 1
    assert all(row["name"] == ("kernel", 8) for row in rows)
    tried = [tuple(row["sizes"].values()) for row in rows]
    assert len(set(tried)) == len(tried)
    work()
    assert work.sizes == WRITTEN  # nothing is kept before `keep`


def test_it_is_bounded():
    work = Work(lambda BLOCK, num_warps: 1 / BLOCK)  # larger is better, for ever
    assert len(tune([work], work.seconds)) == tuning.MAX_TRIES
    assert len(tune([work], work.seconds, tries=3)) == 3


def test_a_small_gain_is_noise():
    work = Work(lambda BLOCK, num_warps: 1.0 if BLOCK == 64 else 0.99)
    best = [row for row in tune([work], work.seconds) if row["best"]]
    assert [row["sizes"] for row in best] == [WRITTEN] and best[0]["written"]


def test_sizes_that_fail_lose():
    def cost(BLOCK, num_warps):
        if BLOCK > 64:
            raise RuntimeError("out of shared memory")
        return BLOCK

    work = Work(cost)
    rows = tune([work], work.seconds)
    assert any(row["seconds"] == float("inf") for row in rows)
    assert min(rows, key=lambda row: row["seconds"])["sizes"]["BLOCK"] < 64


def test_what_fails_as_written_is_an_error():
    def cost(BLOCK, num_warps):
        raise RuntimeError("no GPU is left")

    work = Work(cost)
    with pytest.raises(RuntimeError, match="no GPU is left"):
        tune([work], work.seconds)
    work()
    assert work.sizes == WRITTEN


def test_each_kernel_is_tuned_once_in_its_first_run():
    one, two = Work(towards(128, 4), key=1), Work(towards(32, 4), key=2)

    def both() -> None:
        one(), two()

    def seconds(run) -> float:
        return one.seconds(one) + (two.seconds(two) if run is both else 0)

    rows = tune([one, both], seconds)
    best = {row["name"]: row["sizes"]["BLOCK"] for row in rows if row["best"]}
    assert best == {("kernel", 1): 128, ("kernel", 2): 32}


def test_the_best_is_kept_for_this_gpu_and_used(gpu):
    work = Work(towards(256, 8))
    path = keep(tune([work], work.seconds), gpu)
    assert path == tuned_file(gpu) and path.name == "Test GPU 1 2.json"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    work()
    assert work.sizes == {"BLOCK": 256, "num_warps": 8}
    other = Work(towards(256, 8), key=9)
    other()
    assert other.sizes == WRITTEN  # another width: never tuned
    assert kept("Another GPU") == {}


def test_other_kernels_stay_and_what_is_best_as_written_goes(gpu):
    work, other = Work(towards(256, 4)), Work(towards(16, 4), key=9)
    keep(tune([work], work.seconds), gpu)
    keep(tune([other], other.seconds), gpu)
    assert set(kept(gpu)) == {("kernel", 8), ("kernel", 9)}
    work = Work(towards(64, 4))
    keep(tune([work], work.seconds), gpu)
    assert set(kept(gpu)) == {("kernel", 9)}


def test_sizes_of_an_older_kernel_are_not_used(gpu):
    path = tuned_file(gpu)
    path.parent.mkdir(parents=True)
    path.write_text('{"kernel 8": {"BLOCK": 16}}')
    work = Work(towards(64, 4))
    work()
    assert work.sizes == WRITTEN


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"kernel x": {"BLOCK": 16}}', '{"kernel 8": {"BLOCK": -1}}']
)
def test_a_broken_file_says_what_to_do(gpu, text):
    path = tuned_file(gpu)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match="does not hold tuned sizes .*delete it"):
        kept(gpu)


def test_without_a_gpu_nothing_is_kept():
    with pytest.raises(ValueError, match="nothing to keep"):
        keep([], "")


def test_neighbours_are_half_and_double_and_stay_possible():
    assert neighbours({"BLOCK": 1}) == [{"BLOCK": 2}]
    assert neighbours({"num_warps": 32}) == [{"num_warps": 16}]
    assert neighbours({"stages": 3}) == [{"stages": 2}, {"stages": 4}]


def test_the_file_is_for_eyes(gpu):
    work = Work(towards(256, 4))
    path = keep(tune([work], work.seconds), gpu)
    assert json.loads(path.read_text()) == {"kernel 8": {"BLOCK": 256, "num_warps": 4}}


def test_a_machine_without_a_home_has_nothing_kept(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # no account either
    kept.cache_clear()
    assert kept("Some GPU") == {}


def test_a_home_that_may_not_be_read_has_nothing_kept(gpu, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("not yours")

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    assert kept(gpu) == {}
    work = Work(towards(64, 4))
    work()
    assert work.sizes == WRITTEN
