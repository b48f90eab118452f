"""Lines of a page that stand for something else, and are replaced before the build.

    @source minllama/peft/lora.py:LoRALinear.forward     the live source of a symbol
    @chapters                                            the map of the book
    @modules                                             the modules of each package
    ![A caption that claims](figures/lora.svg) machine   a figure, drawn into the page

A name that does not exist stops the build: what a page shows is what the code is.
"""

import ast
import html
import os
import re
from pathlib import Path

import markdown
from book import CHAPTERS, ROOT, packages, page_of

DIMENSIONS = {"T": "0072B2", "D": "E69F00", "H": "009E73", "V": "CC79A7"}
CODE = re.compile(r"(^ *(`{3,}|~{3,}).*?^ *\2[ \t]*$)", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"(`+[^`\n]+`+)")
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=[)\s])")
SOURCE = re.compile(r"^( *)@source (\S+?):(\S+)[ \t]*$", re.MULTILINE)
LIST = re.compile(r"^@(chapters|modules)$", re.MULTILINE)
FIGURE = re.compile(  # alone, after an empty line; the caption may take several lines
    r"(?<![^\n]\n)^!\[((?:.|\n(?!\n))*?)\]\((\S+?\.(?:svg|png|jpg))\)[ \t]*(.*)$",
    re.MULTILINE,
)
TURN = re.compile(r"^\W*(Previous|Next)\b[^\n]*\Z", re.MULTILINE)  # the footer does it


class Page:
    """One source file on its way to a page; collects the files that the page needs."""

    def __init__(self, path: str, root: Path = ROOT) -> None:
        self.path, self.root = path, root
        self.out = page_of(path)
        self.sources: set[str] = set()  # code files shown or linked
        self.files: set[str] = set()  # anything else: pixels, tables, texts
        self.figures = 0

    def render(self, text: str) -> str:
        """Replace marks and links, outside of code blocks."""
        parts = CODE.split(text)  # text, block, its fence, text, block, its fence, …
        for i in range(0, len(parts), 3):
            parts[i] = self._render_text(parts[i])
        del parts[2::3]
        return "".join(parts)

    def _render_text(self, text: str) -> str:
        pieces = INLINE_CODE.split(text)
        pieces[::2] = [
            LINK.sub(lambda m: self.link(m[1]), piece) for piece in pieces[::2]
        ]
        text = SOURCE.sub(lambda m: self.source(m[2], m[3], m[1]), "".join(pieces))
        text = LIST.sub(lambda m: getattr(self, m[1])(), text)
        return FIGURE.sub(lambda m: self.figure(*m.groups()), text)

    def link(self, target: str) -> str:
        """A link between files of the repository -> the link between their pages."""
        path, _, anchor = target.partition("#")
        if not path or ":" in path or Path(path).suffix in {".svg", ".png", ".jpg"}:
            return target
        file = self._file(path)
        if file.endswith(".py"):
            self.sources.add(file)
        elif not file.endswith((".md", ".ipynb")):
            self.files.add(file)
        return self._to(page_of(file)) + (f"#{anchor}" if anchor else "")

    def source(self, path: str, symbol: str, indent: str = "") -> str:
        """The code of a symbol, under a caption that leads to its place in the file."""
        code, line = source(self.root / path, symbol)
        self.sources.add(path)
        place = self._to(page_of(path)).replace(".md", f".html#__codelineno-0-{line}")
        caption = f'<a href="{place}">{path} · {symbol}</a>'
        block = (
            f'<span class="source-caption">{caption}</span>\n\n````python\n{code}\n````'
        )
        return "\n".join((indent + line).rstrip() for line in block.split("\n"))

    def figure(self, caption: str, target: str, note: str) -> str:
        """An image with its caption; SVG becomes part of the page."""
        path = self._file(target)
        self.figures += 1
        if path.endswith(".svg"):
            name = f"{Path(self.out).stem}-{self.figures}"
            image = inline_svg((self.root / path).read_text(), name, caption)
        else:
            self.files.add(path)
            alt = html.escape(plain(caption))
            image = f'<img src="{self._to(page_of(path))}" alt="{alt}">'
        words = inline_markdown(caption)
        words += f' <span class="note">{inline_markdown(note)}</span>' if note else ""
        return f"<figure>{image}<figcaption>{words}</figcaption></figure>"

    def chapters(self) -> str:
        """The map of the book: a chapter that is not written yet says so."""
        lines = []
        for chapter in CHAPTERS:
            links = [
                f"[{word}]({self._to(page_of(path))})"
                for word, path in [
                    (chapter.title, chapter.page),
                    ("notebook", chapter.notebook),
                ]
                if (self.root / path).exists()
            ]
            head = " ".join(links) or f"{chapter.title} <small>coming</small>"
            lines.append(f"{chapter.number}.  {head}<br>{chapter.promise}")
        body = "\n".join(lines)
        return f'<div class="book-map" markdown>\n\n{body}\n\n</div>'

    def modules(self) -> str:
        """The modules of every package, each with the first line of its docstring."""
        parts = []
        for package, names in packages(self.root).items():
            rows = []
            for name in names:
                file = self.root / "minllama" / package / f"{name}.py"
                lesson = ast.get_docstring(ast.parse(file.read_text())) or ""
                line = re.sub(r"\s+", " ", lesson.split("\n\n")[0]).replace(
                    "|", "&#124;"
                )
                there = self._to(f"api/{package}/{name}.md")
                rows.append(f"| [`{name}`]({there}) | {line} |")
            parts.append("\n".join([f"## {package}\n\n| | |\n|---|---|", *rows]))
        return "\n\n".join(parts)

    def _file(self, target: str) -> str:
        """A link as typed in this file -> the file, from the root. It must exist."""
        path = Path(os.path.normpath(Path(self.path).parent / target)).as_posix()
        if (self.root / path).is_file():
            return path
        if any(path in (chapter.page, chapter.notebook) for chapter in CHAPTERS):
            return "docs/index.md"  # not written yet: the map says so
        raise FileNotFoundError(f"{self.path} points to {target}: no file {path}.")

    def _to(self, page: str) -> str:
        """The way from this page to another page or file."""
        return Path(os.path.relpath(page, Path(self.out).parent)).as_posix()


def source(file: Path, symbol: str) -> tuple[str, int]:
    """The lines of `Class.method`, decorators included, and the number of the first.

    Raises:
        KeyError: the file has no such symbol.
    """
    text = file.read_text()
    node = ast.parse(text)
    for part in symbol.split("."):
        found = [n for n in getattr(node, "body", []) if part in names_of(n)]
        if not found:
            raise KeyError(f"{file.name} has no {symbol} (looking for {part}).")
        node = found[-1]
    start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    indent = " " * node.col_offset
    lines = text.splitlines()[start - 1 : node.end_lineno]
    return "\n".join(line.removeprefix(indent) for line in lines), start


def names_of(node: ast.stmt) -> list[str]:
    """What a statement defines: a class, a function, or what it assigns to."""
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return [name] if (name := getattr(node, "name", None)) else []


def inline_svg(svg: str, name: str, caption: str) -> str:
    """SVG that can stand in a page: own ids, a title, colours of the theme."""
    svg = svg[svg.index("<svg") :]
    title = re.search(r"<title[^>]*>(.*?)</title>", svg, re.DOTALL)
    title = title[1].strip() if title else html.escape(plain(caption))
    svg = re.sub(r"<(title|metadata)\b.*?</\1>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    for letter, color in DIMENSIONS.items():  # lighter on a dark page, see book.css
        svg = re.sub(f"#{color}", f"var(--dim-{letter})", svg, flags=re.IGNORECASE)
    svg = re.sub(r"\s*\n\s*", " ", svg).strip()
    size = re.search(r'\bwidth="([\d.]+)(pt|px)?"', svg)
    width = float(size[1]) * (4 / 3 if size[2] == "pt" else 1) if size else 0
    label = f'role="img" aria-labelledby="{name}-title" style="--width:{width:.0f}px"'
    head = f'<svg {label}\\1><title id="{name}-title">{title}</title>'
    return re.sub(r"<svg\b([^>]*)>", head, svg, count=1)


def plain(text: str) -> str:
    """Markdown -> its words."""
    return html.unescape(re.sub(r"<[^>]+>", "", markdown.markdown(text))).strip()


def inline_markdown(text: str) -> str:
    """Markdown of one line, with formulas -> HTML without the paragraph around it."""
    arithmatex = {"pymdownx.arithmatex": {"generic": True}}
    extensions = ["pymdownx.arithmatex", "smarty"]
    page = markdown.markdown(text, extensions=extensions, extension_configs=arithmatex)
    return page.removeprefix("<p>").removesuffix("</p>")
