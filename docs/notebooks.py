"""A notebook as a page: text stays Markdown, cells become code blocks with outputs."""

import base64
import html
import json
import re

from book import CHAPTERS
from marks import TURN, Page, inline_svg

LONG = 24  # lines of output that stand open; longer ones are folded
INK = "#5b606b"  # a figure in this ink follows the page's theme (docs/figures/style.py)
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
BEST_FIRST = ["image/svg+xml", "text/html", "text/markdown", "text/latex", "image/png"]


def notebook_page(page: Page) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a notebook, and the files that belong beside it."""
    raw = (page.root / page.path).read_bytes()
    cells = [
        cell for cell in json.loads(raw)["cells"] if joined(cell["source"]).strip()
    ]
    files = {page.out.replace(".md", ".ipynb"): raw}
    parts = []
    for i, cell in enumerate(cells):
        text = joined(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            text = TURN.sub("", text) if i == len(cells) - 1 else text
            text = re.sub(r"<details>", "<details markdown>", text)
            parts.append(page.render(text))
        elif cell["cell_type"] == "code":
            parts.append(code_block(text, cell.get("execution_count")))
            outputs = merged(cell.get("outputs", []))
            parts += [output_block(output, page, files) for output in outputs]
    title, _, rest = "\n\n".join(part for part in parts if part).partition("\n")
    return f"{title}\n\n{where_to_open(page)}\n\n{rest}\n", files


def where_to_open(page: Page) -> str:
    """The line under the title: this page is a notebook, and here it is."""
    file = page.path.split("/")[-1]
    line = f"Open in Jupyter: [`{page.path}`]({file})"
    for chapter in CHAPTERS:
        if chapter.notebook == page.path and (page.root / chapter.page).exists():
            there = page.link(f"../{chapter.page}")
            line += f" · the page of this chapter: [{chapter.title}]({there})"
    return f"{line}\n{{ .notebook-bar }}"


def code_block(code: str, count: int | None) -> str:
    """A code cell; its number stands small in the margin."""
    fence = "`" * max(4, *(len(run) + 1 for run in re.findall("`+", code)), 4)
    number = (
        f'<div class="cell-count" aria-hidden="true"><span>{count or ""}</span></div>'
    )
    return f"{number}\n\n{fence}python\n{code}\n{fence}"


def merged(outputs: list[dict]) -> list[dict]:
    """Pieces of one stream, printed one after the other, as one output."""
    result: list[dict] = []
    for output in outputs:
        last = result[-1] if result else {}
        if output["output_type"] == "stream" and last.get("name") == output["name"]:
            last["text"] = joined(last["text"]) + joined(output["text"])
        else:
            result.append(dict(output))
    return result


def output_block(output: dict, page: Page, files: dict[str, bytes]) -> str:
    """One output of a cell, as raw HTML that Markdown leaves alone."""
    if output["output_type"] == "stream":
        return text_block(joined(output["text"]), output["name"])
    if output["output_type"] == "error":
        return text_block("\n".join(output["traceback"]), "error")
    data = {kind: joined(value) for kind, value in output["data"].items()}
    if "<script" in data.get("text/html", "").lower():  # a page runs no foreign code
        del data["text/html"]
    kind = next((kind for kind in BEST_FIRST if kind in data), "text/plain")
    value = data.get(kind, "")
    page.figures += 1
    name = f"{page.out.split('/')[-1].removesuffix('.md')}-{page.figures}"
    if kind == "image/svg+xml":
        follows = INK in value.lower()
        svg = inline_svg(value.replace(INK, "currentColor"), name, "Figure")
        return box(svg, "figure" if follows else "figure card")
    if kind == "image/png":
        files[f"notebooks/{name}.png"] = base64.b64decode(value)
        return box(f'<img src="{name}.png" alt="Figure">', "figure card")
    if kind == "text/html":
        return box(value, "html")
    if kind in ("text/markdown", "text/latex"):
        return page.render(value)
    return text_block(value, "value")


def text_block(text: str, kind: str) -> str:
    """Printed text: no colours, progress bars at their last state, long ones folded."""
    text = ANSI.sub("", text).rstrip("\n")
    text = "\n".join(line.rstrip("\r").split("\r")[-1] for line in text.split("\n"))
    if not text.strip():
        return ""
    escaped = html.escape(text, quote=False).replace("`", "&#96;")
    block = f"<pre>{escaped}</pre>"
    if (lines := text.count("\n") + 1) > LONG:
        block = f"<details><summary>{lines} lines of output</summary>{block}</details>"
    return box(block, kind)


def box(inner: str, kind: str) -> str:
    return f'<div class="output {kind}">{inner}</div>'


def joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)
