"""Sizes of a kernel's blocks that one GPU likes best: looked for when asked, and kept.

    sizes = tuned(kernel, (width, bytes), x.device, {"BLOCK": 1024, "num_warps": 4})

The sizes written beside a kernel, with their reason, were good on one GPU. `tuned`
gives them back, unless somebody ran `tune` on a GPU of this name and it found better:
then those, from a file. Nothing is tuned unasked, so no first call waits for it; and
until somebody tunes again, each sum keeps its order and each result its bits.
"""

import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from minllama.architecture.kernels import kernel_name

Sizes = dict[str, int]
Name = tuple[str | int, ...]  # of a kernel, and what its best sizes depend on

MAX_TRIES = 16  # of one kernel: each is compiled once, and timed
GAIN = 0.02  # sizes that are less than this faster than those written are not kept

_asked: dict[Name, Sizes] | None = None  # while `tune` listens
_trials: dict[Name, Sizes] = {}  # what it tries


def tuned(
    kernel: Any, key: tuple[int, ...], device: torch.device, sizes: Sizes
) -> Sizes:
    """`sizes`, or those that were found best on this GPU.

    Args:
        kernel: which is launched with them.
        key: what the best sizes depend on, as the width of a row and the bytes of a
            number.
        device: where.
        sizes: as written; whatever other sizes there are must be right too.
    """
    name = (kernel_name(kernel), *map(int, key))
    if _asked is not None:
        _asked.setdefault(name, sizes)
    found = _trials.get(name) or kept(gpu_name(device)).get(name, {})
    return dict(found if found.keys() == sizes.keys() else sizes)


def tune(
    runs: Sequence[Callable[[], object]],
    seconds: Callable[[Callable[[], object]], float],
    tries: int = MAX_TRIES,
) -> list[dict[str, Any]]:
    """Look for better sizes of all kernels that `runs` launch, one kernel at a time.

    From the sizes as written it goes to the best neighbour (one size halved or doubled)
    until no neighbour is better. Sizes that do not compile, or need more than there is,
    lose. Nothing is kept on disk before `keep`.

    Args:
        runs: what launches the kernels; a kernel of several is tuned in the first.
        seconds: how long such a run takes.
        tries: sizes of one kernel, at most.

    Returns:
        A row for each try: "name", "sizes", "seconds", and whether these sizes are
        those "written" and the "best".
    """
    rows: list[dict[str, Any]] = []
    done: dict[Name, Sizes] = {}
    try:
        for run in runs:
            for name, start in _listen(run).items():
                if name in done:
                    continue
                found = _descend(name, start, lambda run=run: seconds(run), tries)
                best = min(found, key=lambda row: row["seconds"])
                if best["seconds"] > (1 - GAIN) * found[0]["seconds"]:
                    best = found[0]
                best["best"] = True
                done[name] = _trials[name] = best["sizes"]
                rows += found
    finally:
        _trials.clear()
    return rows


def _listen(run: Callable[[], object]) -> dict[Name, Sizes]:
    global _asked
    _asked = {}
    try:
        run()
        return _asked
    finally:
        _asked = None


def _descend(
    name: Name, start: Sizes, seconds: Callable[[], float], tries: int
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def time(sizes: Sizes) -> float:
        _trials[name] = sizes
        try:
            taken = seconds()
        except Exception:  # too much shared memory, a tile too small for a product, …
            if not rows:
                raise  # the sizes as written
            taken = float("inf")
        rows.append({
            "name": name, "sizes": sizes, "seconds": taken,
            "written": not rows, "best": False,
        })  # fmt: skip
        return taken

    here, best = start, time(start)
    while True:
        tried = [row["sizes"] for row in rows]
        new = [s for s in neighbours(here) if s not in tried][: tries - len(rows)]
        times = [time(sizes) for sizes in new]
        if not times or min(times) >= best:
            return rows
        best = min(times)
        here = new[times.index(best)]


def neighbours(sizes: Sizes) -> list[Sizes]:
    """One of the sizes halved or doubled; one that is no power of two, less or more 1.

    Example:
        >>> neighbours({"BLOCK": 64, "num_stages": 3})[::2]
        [{'BLOCK': 32, 'num_stages': 3}, {'BLOCK': 64, 'num_stages': 2}]
    """
    found = []
    for name, n in sizes.items():
        steps = (n - 1, n + 1) if n & (n - 1) else (n // 2, 2 * n)
        most = 32 if name == "num_warps" else n + n
        found += [{**sizes, name: step} for step in steps if 1 <= step <= most]
    return found


@cache
def gpu_name(device: torch.device) -> str:
    """Of a GPU, as NVIDIA or AMD call it; "" for a CPU, where nothing is tuned."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def tuned_file(gpu: str) -> Path:
    """Where the sizes for this GPU are kept."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "minllama" / "tuned" / (gpu.replace("/", " ") + ".json")


@cache
def kept(gpu: str) -> dict[Name, Sizes]:
    """What was found on this GPU, by name; read once in a process.

    Nothing, where there is no file, no home or no right to look.

    Raises:
        ValueError: the file is not what `keep` writes.
    """
    path = tuned_file(gpu)
    try:
        text = path.read_text() if gpu else "{}"
    except OSError:
        return {}
    try:
        found: dict[Name, Sizes] = {}
        for line, sizes in json.loads(text).items():
            kernel, *key = line.split()
            found[(kernel, *map(int, key))] = {n: int(s) for n, s in sizes.items()}
            if not all(size > 0 for size in sizes.values()):
                raise ValueError(f"{sizes} are no sizes")
        return found
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} does not hold tuned sizes ({error}); delete it, and tune again."
        ) from error


def keep(rows: Sequence[dict[str, Any]], gpu: str) -> Path:
    """Write what `tune` found best to the file of this GPU, beside what is there."""
    if not gpu:
        raise ValueError("gpu='' has nothing to keep; tune on a machine with a GPU.")
    found = dict(kept(gpu))
    for row in rows:
        if row["best"] and row["written"]:
            found.pop(row["name"], None)
        elif row["best"]:
            found[row["name"]] = row["sizes"]
    path = tuned_file(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = {" ".join(map(str, name)): sizes for name, sizes in found.items()}
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(json.dumps(lines, indent=1) + "\n")
    new.replace(path)
    kept.cache_clear()
    return path
