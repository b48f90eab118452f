"""The tables of README.md, from what exists and what was measured.

python docs/readme_tables.py            writes them
python docs/readme_tables.py --check    exits 1 if they are not up to date
"""

import csv
import re
import sys
from pathlib import Path

from book import CHAPTERS, ROOT, Chapter

RESULTS = ROOT / "benchmarks" / "results"


def code_lines(folder: Path) -> int:
    """Lines of Python that are neither blank nor comment nor docstring."""
    total = 0
    for file in folder.glob("*.py"):
        text = re.sub(r'"""(?:.|\n)*?"""', "", file.read_text())
        lines = (line.strip() for line in text.splitlines())
        total += sum(1 for line in lines if line and not line.startswith("#"))
    return total


def chapter_row(chapter: Chapter) -> str:
    """One line of the chapter table; a chapter that is not there yet says so."""
    bold = "**" if chapter.number <= 3 else ""
    package = ROOT / "minllama" / chapter.name
    if not package.exists():
        return f"| {chapter.number} | {bold}{chapter.title}{bold} | | | coming |"
    books = sorted(ROOT.glob(f"chapters/{chapter.number:02d}*_{chapter.name}*.ipynb"))
    notebooks = " ".join(
        f"[{book.stem.split('_')[0]}](chapters/{book.name})" for book in books
    )
    links = f"[page]({chapter.page}) · notebook {notebooks}"
    title = f"[{bold}{chapter.title}{bold}](minllama/{chapter.name})"
    lines = f"{code_lines(package):,}"
    return f"| {chapter.number} | {title} | {lines} | {links} | {chapter.promise} |"


def chapter_table() -> str:
    """All twelve chapters."""
    head = "| | part | lines of code | read | its promise |\n|---|---|---|---|---|\n"
    return head + "\n".join(chapter_row(chapter) for chapter in CHAPTERS)


def read(name: str) -> list[dict]:
    """Rows of a CSV in benchmarks/results; none if it is not there."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def number_table() -> str:
    """What was measured, and against whom."""
    rows = []
    for device in ("cuda", "cpu"):
        found = {row["library"]: row for row in read(f"architecture_decode_{device}")}
        if not found:
            continue
        ours, theirs = found["minllama"], found["transformers"]
        what = (
            f"decoding `{ours['model']}`, batch {ours['batch']}, eager {ours['dtype']}"
        )
        rows.append(
            f"| {what} | {float(ours['tokens_per_s']):.0f} tokens/s | transformers "
            f"{float(theirs['tokens_per_s']):.0f} | {ours['machine']} |"
        )
        graph = next((row for name, row in found.items() if "captured" in name), None)
        if graph:
            speed = float(graph["tokens_per_s"])
            rows.append(
                f"| the same step, captured in a CUDA graph | {speed:.0f} tokens/s | | "
                f"{ours['machine']} |"
            )
    for row in read("stories"):
        if row["text"].startswith("tinystories"):
            rows.append(
                f"| `{row['model']}`, {int(row['parameters']):,} parameters, on "
                f"{row['text']} | {float(row['bits_per_byte']):.3f} bits per byte | | |"
            )
    rows += training_rows() + distributed_rows()
    head = "| what | ours | peer | machine |\n|---|---|---|---|\n"
    return head + "\n".join(rows)


def line(what: str, ours: str, peer: str, machine: str) -> str:
    return f"| {what} | {ours} | {peer} | {machine} |"


def best(rows: list[dict], who: str, key: str = "tokens_per_s") -> tuple[str, dict]:
    """The largest number among the rows of ours or of a peer; and its row."""
    mine = [row for row in rows if row["who"].startswith(who)]
    row = max(mine, key=lambda row: float(row[key]))
    return f"{int(row[key]):,}", row


def training_rows() -> list[str]:
    """Steps on one GPU: all weights, and an adapter."""
    rows = []
    if steps := read("fast_step_cuda"):
        (speed, ours), (theirs, peer) = best(steps, "ours"), best(steps, "transformers")
        rows.append(
            line(
                f"training `llama-3.2-1b`, one GPU, {ours['rows']} x {ours['tokens']} "
                "tokens, with kernels",
                f"{speed} tokens/s in {float(ours['peak_GiB']):.1f} GiB",
                f"transformers with Liger {theirs} in {float(peer['peak_GiB']):.1f}",
                ours["machine"],
            )
        )
    if steps := [row for row in read("peft_cuda") if row["case"] == "lora"]:
        (speed, ours), (theirs, peer) = best(steps, "ours"), best(steps, "peft")
        rows.append(
            line(
                f"LoRA beside `llama-3.1-8b`, one GPU, {ours['tokens']} tokens",
                f"{speed} tokens/s in {float(ours['peak_GiB']):.1f} GiB",
                f"PEFT, compiled, with Liger's loss {theirs} in "
                f"{float(peer['peak_GiB']):.1f}",
                ours["machine"],
            )
        )
    return rows


def distributed_rows() -> list[str]:
    """Training and saving on several GPUs."""
    rows = []
    for name, case in (("dist_run_cuda_4", "step"), ("fast_dist_cuda_4", "fast")):
        steps = [row for row in read(name) if row["case"] == case]
        for policy in dict.fromkeys(row["checkpointing"] for row in steps):
            same = [row for row in steps if row["checkpointing"] == policy]
            peer = next(row for row in same if row["who"].startswith("transformers"))
            ours = next(
                row for row in same
                if row["who"].startswith("minllama") and row["rows"] == peer["rows"]
            )  # fmt: skip
            kernels = ", with kernels" if case == "fast" else ""
            what = f"training `{ours['model']}`, {ours['gpus']} GPUs, {ours['rows']} x "
            rows.append(
                line(
                    f"{what}{ours['tokens']} tokens each{kernels}, checkpointing "
                    f"{policy}",
                    f"{int(ours['tokens_per_s_gpu']):,} tokens/s/GPU",
                    f"{peer['who'].replace('+', 'with')} "
                    f"{int(peer['tokens_per_s_gpu']):,}",
                    ours["machine"],
                )
            )
    stall = {
        row["library"]: row
        for row in read("dist_checkpoint_cuda")
        if row["what"] == "async"
    }
    if stall:
        ours, theirs = stall["minllama"], stall["torch DCP"]
        rows.append(
            f"| saving `{ours['model']}` in the background, {ours['world']} GPUs: "
            f"training waits | {float(ours['stall_seconds']):.2f} s | torch's own "
            f"{float(theirs['stall_seconds']):.2f} s | {ours['machine']} |"
        )
    return rows


def replace_part(text: str, name: str, content: str) -> str:
    """The text with what stands between two marks made anew."""
    start = text.index("-->\n", text.index(f"<!-- {name}: begin")) + len("-->\n")
    end = text.index(f"<!-- {name}: end -->")
    return f"{text[:start]}{content}\n{text[end:]}"


def fill(text: str) -> str:
    """The README with its generated parts made anew."""
    text = replace_part(text, "chapters", chapter_table())
    return replace_part(text, "numbers", number_table())


def main() -> int:
    path = ROOT / "README.md"
    old = path.read_text()
    new = fill(old)
    if "--check" in sys.argv:
        if new != old:
            print("README.md is out of date: run python docs/readme_tables.py")
        return int(new != old)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
