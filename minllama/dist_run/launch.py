"""Many processes from one: for a notebook, a test, a laptop.

    def work(scale):                    # runs in every process
        x = torch.ones(2) * dist.get_rank() * scale
        dist.all_reduce(x)
        return x

    launch(work, 4, 10.0)               # what each of the four returned, rank 0 first

On a cluster `torchrun` starts the processes; `launch` does the same for a function,
over gloo, and hands back what it returned. The processes are spawned, not forked, since
a fork copies a process whose threads it does not copy: each starts bare, with nothing
of this one but the function and its arguments.
"""

import copy
import inspect
import io
import os
import runpy
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import __main__


def launch(
    function: Callable, world: int, *args: Any, timeout: float = 300.0
) -> list[Any]:
    """Run `function(*args)` in `world` processes of one group; their results by rank.

    A function of a module is imported by name. One that was typed in a notebook goes
    there as its source, so it imports what it needs within its body.

    Args:
        function: called with `args` in every process; `dist.get_rank()` tells which.
        world: processes.
        args: each process gets a copy. Tensors, numbers, strings, and lists, tuples,
            dicts of them; modules, configs and functions too, if they can be pickled.
        timeout: seconds until all must have finished.

    Returns:
        One result a rank: tensors, numbers, strings, or lists and dicts of them.

    Raises:
        ValueError: `world` is no positive number.
        RuntimeError: a process failed, with its rank and traceback; or some did not
            finish in time, with their ranks. The others are killed.
    """
    if world < 1:
        raise ValueError(f"world={world} must be at least 1.")
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        target = _portable(function, Path(folder))
        context = mp.get_context("spawn")
        processes = [
            context.Process(target=_child, args=(target, args, rank, world, folder))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, Path(folder), timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        results = [Path(folder, f"result-{rank}") for rank in range(world)]
        return [torch.load(path, weights_only=True) for path in results]


def _portable(function: Callable, folder: Path) -> Callable | tuple[str, str]:
    """The function itself, or its source if only this notebook knows it."""
    typed = function.__module__ == "__main__" and not hasattr(__main__, "__file__")
    if not typed:  # of a module, or of a script that each process imports
        return function
    path = folder / "typed.py"
    path.write_text(textwrap.dedent(inspect.getsource(function)))
    return str(path), function.__name__


def _child(target: Any, args: tuple, rank: int, world: int, folder: str) -> None:
    """The life of one process. It ends with `os._exit`.

    A thread of gloo may still hold Python objects when the interpreter is taken down,
    which aborts or hangs about one run in six; there is nothing left to take down here.
    """
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    code = 0
    try:
        file = str(Path(folder, "store"))
        store = dist.FileStore(file, world)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        result = _call(target, copy.deepcopy(args))  # out of memory that all share
        dist.barrier()
        _write(Path(folder, f"result-{rank}"), result)
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        code = 1
    os._exit(code)


def _call(target: Any, args: tuple) -> Any:
    """In a function of its own: what it made is freed while the group still lives."""
    if isinstance(target, tuple):
        path, name = target
        target = runpy.run_path(path)[name]
    return target(*args)


def _write(path: Path, result: Any) -> None:
    buffer = io.BytesIO()
    torch.save(result, buffer)
    try:
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:
        raise ValueError(
            f"the result is or holds a {type(result).__name__} that does not travel; "
            "return tensors, numbers, strings, or lists and dicts of them."
        ) from error
    part = path.with_suffix(".part")
    part.write_bytes(buffer.getvalue())
    os.replace(part, path)


def _wait(processes: list, folder: Path, timeout: float) -> None:
    until = time.monotonic() + timeout
    while any(process.is_alive() for process in processes):
        time.sleep(0.01)
        failed = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0)]
        if failed:
            time.sleep(0.2)  # those that failed first have written by now
            break
        if time.monotonic() > until:
            late = [r for r, p in enumerate(processes) if p.is_alive()]
            raise RuntimeError(
                f"rank {', '.join(map(str, late))} of {len(processes)} did not finish "
                f"within timeout={timeout} s: they wait for each other, or are slow."
            )
    errors = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime)
    for path in errors:
        rank = path.name.removeprefix("error-")
        raise RuntimeError(f"rank {rank} failed:\n{path.read_text()}")
    for rank, process in enumerate(processes):
        if process.exitcode != 0:
            raise RuntimeError(f"rank {rank} died with exit code {process.exitcode}.")
