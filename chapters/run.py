"""Run notebooks from top to bottom, as a reader would, and write them back executed.

    python chapters/run.py                       all of them, in place
    python chapters/run.py 01_architecture.ipynb one, in place
    python chapters/run.py --out FOLDER          leave the originals as they are

A CPU, no network, the kernel "python3". Prints the seconds of each. An error stops the
run, shows the cell, and leaves the file as it was.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent
QUIET = {  # plots without the date of their making; no GPU; no network
    "SOURCE_DATE_EPOCH": "0",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}
LIMIT = 600  # seconds for a cell: an endless loop, not the budget of the chapter


def run(notebook: nbformat.NotebookNode) -> float:
    """Execute in place; returns seconds. Metadata of time and machine is not kept."""
    start = time.perf_counter()
    client = NotebookClient(
        notebook,
        timeout=LIMIT,
        kernel_name="python3",
        resources={"metadata": {"path": str(HERE)}},
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
    )
    client.execute()
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = tidy(cell.outputs)
    return time.perf_counter() - start


def tidy(outputs: list) -> list:
    """Printed pieces as one text; plots without what no eye sees, in half the size."""
    result: list = []
    for output in outputs:
        last = result[-1] if result else {}
        if output.output_type == "stream" and last.get("name") == output.name:
            last["text"] += output.text
            continue
        if svg := output.get("data", {}).get("image/svg+xml"):
            svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
            output.data["image/svg+xml"] = re.sub(r"\s*\n\s*", " ", svg).strip()
        result.append(output)
    return result


def main() -> int:
    """Run the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all")
    parser.add_argument("--out", type=Path, help="folder for the executed copies")
    args = parser.parse_args()
    os.environ.update(QUIET)
    files = [HERE / file.name for file in args.notebooks]
    for file in files or sorted(HERE.glob("*.ipynb")):
        notebook = nbformat.read(file, as_version=4)
        try:
            seconds = run(notebook)
        except CellExecutionError as error:
            print(f"{file.name} failed:\n{error}", file=sys.stderr)
            return 1
        target = (args.out or HERE) / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)
        size = target.stat().st_size / 1000
        print(f"{file.name}: {seconds:.0f} s, {size:.0f} kB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
