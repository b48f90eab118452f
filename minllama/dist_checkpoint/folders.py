"""A folder of checkpoints, and how one comes into force: by a rename.

    run/
      step-00000100/   manifest.json  model-00000-of-00002.safetensors  …
      step-00000200/
      .saving-step-00000300/           being written; no reader looks here

A save writes into `.saving-…`, asks the disk to keep it (fsync: until then the bytes
are in memory, and a power cut would leave a file of the right name and wrong content),
writes the manifest last, and renames the folder. A rename within a file system happens
or does not: whenever the process is killed, the newest complete folder is the last
checkpoint. What a killed save left is removed by the next one. One run a folder.

On shared file systems: the rename is atomic on NFS, Lustre and GPFS, too. NFS promises
only that who opens a file after it was closed sees what was written: so every process
closes and fsyncs its files before rank 0 learns of them, and rank 0 renames after it
learned of all. Object stores that play a file system (s3fs, gcsfuse) copy on rename,
file by file: save to a disk and upload the finished folder.
"""

import os
import re
import shutil
from pathlib import Path

MANIFEST = "manifest.json"
NAME = re.compile(r"^step-(\d{8,})(?:-(\d+))?$")  # -2: the same step, saved again
LEFTOVERS = (".saving-*", ".removing-*")


def step_folders(folder: Path) -> list[Path]:
    """What looks like a checkpoint in `folder`, oldest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = NAME.match(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), int(match[2] or 1), path))
    return [path for *_, path in sorted(found)]


def step_of(path: Path) -> int:
    """The step that a folder's name tells."""
    return int(path.name.split("-")[1])


def begin(folder: Path, step: int) -> tuple[Path, Path]:
    """Clean up after killed saves; where to write, and what to rename it to."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in (p for pattern in LEFTOVERS for p in folder.glob(pattern)):
        shutil.rmtree(leftover)
    final, again = folder / f"step-{step:08}", 1
    while final.exists():
        again += 1
        final = folder / f"step-{step:08}-{again}"
    work = folder / f".saving-{final.name}"
    work.mkdir()
    return work, final


def commit(work: Path, final: Path) -> None:
    """Put a folder whose files are on the disk in force."""
    sync_folder(work)
    reached("before the rename")
    work.rename(final)
    sync_folder(final.parent)
    reached("after the rename")


def remove_older(final: Path, keep: int | None) -> None:
    """Remove earlier saves of the step, and all but the `keep` newest steps.

    Only what comes before `final` counts: a run that went back to an earlier step
    leaves the later ones alone.
    """
    folders = step_folders(final.parent)
    older = folders[: folders.index(final)]
    same = [path for path in older if step_of(path) == step_of(final)]
    rest = [path for path in older if path not in same]
    for path in same + (rest[: max(0, len(rest) + 1 - keep)] if keep else []):
        gone = path.with_name(f".removing-{path.name}")  # at once, then at leisure
        path.rename(gone)
        shutil.rmtree(gone)


def sync_folder(path: Path) -> None:
    """Ask the disk to keep the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reached(point: str) -> None:
    """A save got here. Does nothing: it is where the tests pull the plug."""
