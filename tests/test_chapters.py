"""The notebooks run from top to bottom, are committed as they ran, and keep the style.

    pytest tests/test_chapters.py -k architecture      the notebooks of one chapter

What is asked of each: executed, counts in order, no error; short cells, an assert,
plots as SVG, a small file; nothing of the machine that ran it; Takeaways, Exercises,
Next. And that it runs again, on a CPU and without network, within its budget: a minute,
or two if its metadata says that it trains.
"""

import ast
import csv
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install -e .[test]")
pytest.importorskip("nbclient", reason="pip install -e .[test]")

ROOT = Path(__file__).parents[1]
CHAPTERS = ROOT / "chapters"
NOTEBOOKS = sorted(CHAPTERS.glob("*.ipynb"))
SOLUTIONS = sorted((CHAPTERS / "solutions").glob("*.md"))
LINES, WIDTH, BYTES = 12, 88, 300_000
BUDGET, BUDGET_TRAINING = 60, 120  # seconds
MACHINE = re.compile(r"/(?:home|root|work|tmp|Users|usr|opt|mnt|var)/|[A-Z]:\\")


def by_name(paths: list[Path]) -> list:
    return [pytest.param(path, id=path.stem) for path in paths]


def python_of(cell) -> str:
    """The source of a code cell, without the lines that only IPython knows."""
    lines = cell.source.splitlines()
    return "\n".join("pass" if line.startswith(("%", "!")) else line for line in lines)


def texts_of(cell) -> list[str]:
    """What a cell printed or showed as text."""
    texts = []
    for output in cell.outputs:
        texts.append(output.get("text", ""))
        data = output.get("data", {})
        texts += [data.get(kind, "") for kind in ("text/plain", "text/html")]
    return texts


def complaints(notebook, size: int) -> list[str]:
    """What is wrong with a notebook as it lies in the repository."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    prose = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    wrong = []
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        wrong.append("not executed once, from top to bottom")
    if size > BYTES:
        wrong.append(f"{size:,} bytes, more than {BYTES:,}")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        wrong.append('kernel is not "python3"')
    if not any(re.search(r"\bassert", cell.source) for cell in code):
        wrong.append("no assert")
    if not code or "seed(" not in code[0].source:
        wrong.append("the first cell sets no seed")
    if not code or code[-1].outputs:
        wrong.append("the last cell prints something")
    places = [prose.find(f"\n## {word}") for word in ("Takeaways", "Exercises", "Next")]
    if places != sorted(places) or min(places) < 0:
        wrong.append("does not end in Takeaways, Exercises, Next")
    if "\n## At full size" not in prose:
        wrong.append('no section "At full size"')
    for number, cell in enumerate(code, start=1):
        wrong += [f"cell {number}: {what}" for what in complaints_of_cell(cell)]
    return wrong


def complaints_of_cell(cell) -> list[str]:
    wrong = []
    if (length := len(cell.source.splitlines())) > LINES:
        wrong.append(f"{length} lines of code, more than {LINES}")
    if any(len(line) > WIDTH for line in cell.source.splitlines()):
        wrong.append(f"a line of code is wider than {WIDTH}")
    for node in ast.walk(ast.parse(python_of(cell))):
        if isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno >= LINES:
            wrong.append(f"class {node.name} has more than {LINES} lines; import it")
    for output in cell.outputs:
        if output.output_type == "error":
            wrong.append(f"ended in {output.ename}")
        if output.get("name") == "stderr":
            wrong.append(f"wrote to standard error: {output.text[:60]!r}")
        if "image/png" in output.get("data", {}):
            wrong.append("a plot of pixels; show SVG")
    for text in texts_of(cell):
        if found := MACHINE.search(text):
            place = text[found.start() :][:40]
            wrong.append(f"names a place of this machine: {place!r}")
        if any(len(line) > WIDTH for line in text.splitlines()):
            wrong.append(f"prints a line wider than {WIDTH}")
    return wrong


@pytest.mark.parametrize("path", by_name(NOTEBOOKS))
def test_a_notebook_is_committed_as_it_ran(path):
    wrong = complaints(nbformat.read(path, as_version=4), path.stat().st_size)
    assert not wrong, "\n".join([path.name, *wrong])


@pytest.mark.parametrize("path", by_name(NOTEBOOKS))
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    command = [sys.executable, CHAPTERS / "run.py", path.name, "--out", tmp_path]
    before, start = cpu_seconds(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    wall, cpu = time.perf_counter() - start, cpu_seconds() - before
    assert done.returncode == 0, done.stderr[-3000:]
    notebook = nbformat.read(tmp_path / path.name, as_version=4)
    wrong = complaints(notebook, (tmp_path / path.name).stat().st_size)
    assert not wrong, "\n".join([path.name, *wrong])
    trains = notebook.metadata.get("minllama", {}).get("trains", False)
    budget = BUDGET_TRAINING if trains else BUDGET
    # On a machine that others use, too, the clock runs on: then its own work counts.
    assert min(wall, cpu) <= budget, f"{wall:.0f} s, {cpu:.0f} s of work; {budget} s"


def cpu_seconds() -> float:
    """Work of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("path", by_name(SOLUTIONS))
def test_the_solutions_are_accepted(path):
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)
    assert blocks and all("assert" in block for block in blocks)
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], capture_output=True)
        assert done.returncode == 0, f"{block}\n{done.stderr.decode()}"


@pytest.mark.parametrize("path", by_name(NOTEBOOKS))
def test_an_unsolved_exercise_is_not_accepted(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    open_ones = [c for c in code if re.search(r"# exercise \d+: edit me", c.source)]
    assert 3 <= len(open_ones) <= 5
    for cell in open_ones:
        assert "accepted" in cell.source
        assert not any("accepted" in text for text in texts_of(cell)), cell.source


def good_notebook():
    """A small notebook without a fault."""
    new = nbformat.v4
    cells = [
        new.new_markdown_cell("# A\n\n## At full size\n"),
        new.new_code_cell("torch.manual_seed(0)", execution_count=1),
        new.new_code_cell("assert 1 < 2", execution_count=2),
        new.new_markdown_cell("x\n\n## Takeaways\n\n## Exercises\n\n## Next\n"),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    return new.new_notebook(cells=cells, metadata=kernel)


def plant(notebook, fault: str) -> None:
    output = nbformat.v4.new_output
    first, last = notebook.cells[1], notebook.cells[2]
    if fault == "executed":
        last.execution_count = 7
    elif fault == "kernel":
        notebook.metadata.kernelspec.name = "mine"
    elif fault == "no assert":
        last.source = "1 < 2"
    elif fault == "seed":
        first.source = "1"
    elif fault == "last cell":
        last.outputs = [output("stream", name="stdout", text="hi")]
    elif fault == "Takeaways":
        notebook.cells.pop()
    elif fault == "full size":
        notebook.cells[0].source = "# A"
    elif fault == "lines of code":
        first.source += "\nx = 1" * LINES
    elif fault == "class":
        first.source = "class A:" + "\n    x = 1" * LINES + "\nseed(0)"
    elif fault == "code is wider":
        first.source += f"\n# {'x' * WIDTH}"
    elif fault == "ended in":
        error = {"ename": "KeyError", "evalue": "", "traceback": []}
        first.outputs = [output("error", **error)]
    elif fault == "standard error":
        first.outputs = [output("stream", name="stderr", text="warning")]
    elif fault == "pixels":
        first.outputs = [output("display_data", data={"image/png": "aGk="})]
    elif fault == "this machine":
        first.outputs = [output("stream", name="stdout", text="/home/me/x")]
    elif fault == "prints a line":
        first.outputs = [output("stream", name="stdout", text="x" * (WIDTH + 1))]


def test_a_notebook_without_a_fault_passes():
    assert complaints(good_notebook(), 1000) == []
    assert "bytes" in complaints(good_notebook(), BYTES + 1)[0]


@pytest.mark.parametrize(
    "fault",
    ["executed", "kernel", "no assert", "seed", "last cell", "Takeaways", "full size",
     "lines of code", "class", "code is wider", "ended in", "standard error", "pixels",
     "this machine", "prints a line"],
)  # fmt: skip
def test_a_planted_fault_is_found(fault):
    notebook = good_notebook()
    plant(notebook, fault)
    found = complaints(notebook, 1000)
    assert any(fault in line for line in found), found


def test_the_numbers_of_the_first_page_are_those_of_the_accounting():
    from minllama.architecture import accounting
    from minllama.architecture.config import LlamaConfig

    c = LlamaConfig.from_name("llama-3.2-1b")
    page = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| \**(\w[^|*]*?)\** \|.*?\| \**([\d,]+)\** \|$", page, re.M)
    stated = {name: int(number.replace(",", "")) for name, number in rows}
    parts = accounting.parameters_by_part(c)
    total = sum(parts.values())
    pairs = accounting.forward_flops(c, 3) - accounting.forward_flops(c, 1)
    assert stated == {
        "embedding; the head shares it": parts["embedding"],
        "q, o in each of $N$ blocks": 2 * c.n_layers * c.dim * c.n_heads * c.head_dim,
        "k, v": 2 * c.n_layers * c.dim * c.n_kv_heads * c.head_dim,
        "gate, up, down": parts["feed-forward"],
        "norms, two a block and one at the end": parts["norms"],
        "parameters": total,
        "bytes in bfloat16": 2 * total,
        "FLOPs a token, matrices": 2 * (total - parts["norms"]),
        "FLOPs a pair of a token and a key": round(pairs),
        "cache, bytes a token": accounting.cache_bytes(c, 1, 1),
    }
    attention = stated["q, o in each of $N$ blocks"] + stated["k, v"]
    assert attention == parts["attention"]


def test_the_decoding_figure_shows_the_numbers_that_were_measured():
    svg = (ROOT / "docs/figures/arch_decode.svg").read_text()
    with open(ROOT / "benchmarks/results/architecture_decode_cuda.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == "llama-3.2-1b"]
    for row in rows:
        assert f"{float(row['ms_per_step']):.2f} ms" in svg, "run arch_decode.py again"
