"""SIGKILL in the middle of a save, and what is in force afterwards.

    python -m tests.dist_checkpoint.kill_tests               50 at random times
    python -m tests.dist_checkpoint.kill_tests --injected    5 at each step, in seconds

Each try starts from a complete checkpoint of step 1 and saves step 2, in one process or
in two of a gloo group, in the foreground or in the background, until it is killed. Then
the newest checkpoint must be whole and equal to what step 1 (or, after the rename,
step 2) was, and the next save must succeed and leave no rest behind. Children are
forked from this process, which has imported all and started nothing.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist

import minllama.dist_checkpoint.folders as folders
import minllama.dist_checkpoint.shard_file as shard_file
from minllama.architecture.optim import make_adamw
from minllama.dist_checkpoint import (
    async_save,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from tests.conftest import make_model
from tests.dist_checkpoint.work import cut, make_rows, train_step, whole

POINTS = (
    "while staging",
    "before writing",
    "within a file",
    "between files",
    "before the rename",
    "after the rename",
)
EXPECTED: dict = {}  # (step, processes) -> the model then


def state_of(step: int, sharded: bool):
    """The model and optimizer of a step: the same numbers in every process."""
    torch.manual_seed(step)
    model = make_model("llama")
    model = cut(model, "fsdp") if sharded else model
    optimizer = make_adamw(model, 1e-2)
    train_step(model, optimizer, make_rows(step))
    return model, optimizer


def save_step_2(folder: Path, rank: int, world: int, background: bool) -> None:
    """What a child does until it is killed. It never returns."""
    code = 1
    try:
        if world > 1:
            store = dist.FileStore(str(folder / "store"), world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        model, optimizer = state_of(2, world > 1)
        (folder / f"begun-{rank}").touch()
        save = async_save if background else save_checkpoint
        done = save(folder / "run", model, optimizer, step=2)
        if background:
            done.result()
        (folder / f"done-{rank}").touch()
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def fork(work, *args) -> int:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a survivor's complaint
        work(*args)
    return child


def strike_at(point: str, count: int) -> None:
    """In a child: die at the `count`-th time that a save gets to `point`."""
    left = [count]

    def reached(here: str) -> None:
        left[0] -= here == point
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    folders.reached = reached


def strike_first(point: str, count: int, rank: int) -> None:
    if rank == 0:
        strike_at(point, count)


def stretch(seconds: float, world: int, rank: int) -> None:
    """In a child: small blocks, each followed by a pause, so that saves are slow."""
    shard_file.BLOCK_BYTES = 2048
    model = make_model("llama")
    blocks = 3 * sum(p.nbytes for p in model.parameters()) / world / 2048
    pause = seconds / blocks

    def reached(here: str) -> None:
        if here == "within a file":
            time.sleep(pause)

    folders.reached = reached


def check(folder: Path, world: int) -> list[str]:
    """What was lost: empty, if nothing was."""
    run = folder / "run"
    newest = latest_checkpoint(run)
    if newest is None:
        return ["no checkpoint is left"]
    model = make_model("llama")
    optimizer = make_adamw(model, 1.0)
    loaded = load_checkpoint(run, model, optimizer)
    expected = EXPECTED[loaded.step, world]
    problems = [
        f"{name} of step {loaded.step}"
        for name, tensor in whole(model.state_dict()).items()
        if not torch.equal(tensor, expected[name])
    ]
    save_checkpoint(run, model, optimizer, step=3, keep=1)
    left = sorted(path.name for path in run.iterdir())
    if left != ["step-00000003"]:
        problems.append(f"left behind: {left}")
    return problems


def prepare(base: Path) -> None:
    """Step 1's checkpoint of one and of two ranks, and what steps 1 and 2 hold."""
    for world in (1, 2):
        children = [fork(make_base, base, rank, world) for rank in range(world)]
        assert all(os.waitpid(child, 0)[1] == 0 for child in children)
        for step in (1, 2):
            state = torch.load(base / f"{world}-{step}.pt", weights_only=True)
            EXPECTED[step, world] = state


def make_base(base: Path, rank: int, world: int) -> None:
    code = 1
    try:
        if world > 1:
            store = dist.FileStore(str(base / "store"), world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        for step in (2, 1):
            model, optimizer = state_of(step, world > 1)
            state = whole(model.state_dict())
            if rank == 0:
                torch.save(state, base / f"{world}-{step}.pt")
        save_checkpoint(base / f"run-{world}", model, optimizer, step=1)
        if world > 1:
            dist.barrier()
        code = 0
    finally:
        os._exit(code)


def attempt(
    base: Path, world: int, background: bool, before, wait: float | None
) -> dict:
    """One save that is killed: by itself in rank 0 (`before`), or by us in a while."""
    folder = Path(tempfile.mkdtemp(dir=base))
    shutil.copytree(base / f"run-{world}", folder / "run")

    def work(rank: int) -> None:
        before(rank)
        save_step_2(folder, rank, world, background)

    children = [fork(work, rank) for rank in range(world)]
    if wait is not None:
        while not all((folder / f"begun-{rank}").exists() for rank in range(world)):
            time.sleep(0.001)
        time.sleep(wait)
        inside = not any((folder / f"done-{rank}").exists() for rank in range(world))
        os.kill(children[0 if world == 1 else random.randrange(world)], signal.SIGKILL)
    else:
        inside = os.WIFSIGNALED(os.waitpid(children.pop(0), 0)[1])
    end = time.monotonic() + 0.3  # a survivor hears of it, or goes the same way
    while children and time.monotonic() < end:
        children = [c for c in children if os.waitpid(c, os.WNOHANG)[0] == 0]
        time.sleep(0.005)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    newest = latest_checkpoint(folder / "run")
    step = None if newest is None else folders.step_of(newest)
    lost = check(folder, world)
    shutil.rmtree(folder)
    return {"inside": inside, "step": step, "lost": lost}


def injected(base: Path, each: int = 5) -> list[dict]:
    """`each` strikes at every step of the protocol, alone and in rank 0 of two."""
    results = []
    for world, point, number in product((1, 2), POINTS, range(each)):
        for background in (False, True) if world == 1 else (number % 2 == 0,):
            background |= point == "while staging"
            stride = {"within a file": 11, "while staging": 13}.get(point, 0)
            count = 1 + (number % 3 if point == "between files" else number * stride)
            before = partial(strike_first, point, count)
            found = attempt(base, world, background, before, wait=None)
            case = {"world": world, "background": background, "point": point}
            results.append({**case, **found})
    return results


def at_random(base: Path, kills: int, seconds: float) -> list[dict]:
    """Strikes at random times on saves of about so many seconds."""
    results = []
    for number in range(kills):
        world, background = 1 + number % 2, number % 4 > 1
        wait = random.uniform(0, 1.05 * seconds)
        before = partial(stretch, seconds, world)
        found = attempt(base, world, background, before, wait)
        results.append({"world": world, "background": background, **found})
        lost = sum(bool(r["lost"]) for r in results)
        inside = sum(r["inside"] for r in results)
        print(f"{number + 1}: {inside} inside a save, {lost} lost", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--injected", action="store_true", help="print JSON, no text")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=1.2, help="of a save")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        prepare(Path(folder))
        if options.injected:
            print(json.dumps(injected(Path(folder))))
            return
        results = at_random(Path(folder), options.kills, options.seconds)
    inside = sum(r["inside"] for r in results)
    lost = [r for r in results if r["lost"]]
    print(f"{len(results)} kills, {inside} inside a save, {len(lost)} lost: {lost}")
    sys.exit(bool(lost) or inside < 0.8 * len(results))


if __name__ == "__main__":
    main()
