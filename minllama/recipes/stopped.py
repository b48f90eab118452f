"""A run in a folder: what it was started with, and where it was when it stopped.

    out/options.json    the options, and a digest of the data
    out/checkpoints/    the states; removed when the run is complete

The same command goes on from the newest state. A command that differs in what is
learned is refused.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

OPTIONS = "options.json"
CHECKPOINTS = "checkpoints"


def make_folder(out: Path, resumes: bool) -> None:
    """The folder of a run; one that begins removes the states of another."""
    out.mkdir(parents=True, exist_ok=True)
    if not resumes:  # --fresh, or stopped before a checkpoint was complete
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)


def digest(documents: Iterable[bytes]) -> str:
    """Tells whether a stopped run goes on with the data it was started with."""
    whole = hashlib.sha256()
    for document in documents:
        whole.update(document + b"\0")
    return whole.hexdigest()


def check_same(now: dict, out: Path, free: Collection[str]) -> None:
    """A stopped run goes on only under the options and data it was started with.

    Args:
        now: options and digest, as they will be written to options.json.
        out: folder of the run.
        free: those that may change.

    Raises:
        ValueError: others differ, or nobody knows what they were.
    """
    path = out / OPTIONS
    if not path.exists():
        raise ValueError(f"{path} is missing beside a stopped run; begin with --fresh.")
    before = json.loads(path.read_text())
    changed = [key for key in now if key not in free and now[key] != before.get(key)]
    if changed:
        words = ", ".join(f"{key}: {before.get(key)} -> {now[key]}" for key in changed)
        raise ValueError(
            f"{out} holds a stopped run with other options ({words}); give the same "
            "ones to go on, or --fresh to begin anew."
        )


def write_json(path: Path, value: dict) -> None:
    """The whole file or none of it: written beside its name, then renamed."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(part, path)
