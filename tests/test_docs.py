"""The site builds, asks no network, leads nowhere wrong, and shows code that exists."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = str(ROOT / "docs")
MINIMAL = "# A page\n\n@source minllama/code.py:{symbol}\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site, strict."""
    pytest.importorskip(
        "mkdocs", reason="mkdocs is not installed: pip install -e .[docs]"
    )
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "docs/build_site.py", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture
def docs(monkeypatch):
    """The modules beside the pages; they need Markdown, which comes with mkdocs."""
    pytest.importorskip(
        "markdown", reason="mkdocs is not installed: pip install -e .[docs]"
    )
    monkeypatch.syspath_prepend(DOCS)
    import build_site

    return build_site


def tree(root: Path, **files: str) -> Path:
    """A small repository: docs__index_md="# Hi" writes docs/index.md."""
    for name, text in files.items():
        *folders, stem, suffix = re.split("__|_(?=[a-z]+$)", name)
        file = root.joinpath(*folders, f"{stem}.{suffix}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


class Html(HTMLParser):
    """What a page loads, where it leads, and the places in it."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.loads, self.links, self.ids = [], [], set()
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = {key: value or "" for key, value in attrs}
        self.ids |= {attrs.get("id"), attrs.get("name")}
        if tag == "a":
            self.links.append(attrs.get("href", ""))
        elif tag == "link":
            self.loads.append(attrs["href"])
        self.loads += [
            attrs[key] for key in ("src", "srcset", "poster") if key in attrs
        ]


def test_the_site_builds_strictly(site):
    assert (site / "index.html").exists()
    assert json.loads((site / "search/search_index.json").read_text())["docs"]


def test_pages_ask_no_network(site):
    for file in site.rglob("*.html"):
        outside = [to for to in Html(file).loads if re.match(r"(https?:)?//", to)]
        assert not outside, f"{file.relative_to(site)} loads {outside}"
    for file in site.rglob("*.css"):
        assert not re.search(
            r"(url\(|@import)\s*[\"']?(https?:)?//", file.read_text()
        ), file


def test_links_inside_the_site_resolve(site):
    pages = {
        file: Html(file) for file in site.rglob("*.html") if file.name != "404.html"
    }
    for file, page in pages.items():
        for link in page.links:
            path, _, anchor = unquote(link).partition("#")
            if ":" in path:
                continue
            target = (file.parent / path).resolve() if path else file
            target = target / "index.html" if target.is_dir() else target
            where = f"{file.relative_to(site)} leads to {link}"
            assert target.exists(), where
            if anchor and target in pages:
                assert anchor in pages[target].ids, where


def test_every_page_of_the_book_ends_in_previous_and_next(site, docs):
    order = [docs.Page(path).out for path in docs.named()]
    pages = [site / page.replace(".md", ".html") for page in order]
    for page in pages:
        foot = re.findall(r'<a\b[^>]*class="md-footer__link[^>]*>', page.read_text())
        first = page == pages[0]  # it has no page before it
        assert len(foot) == 2 - first, f"{page.name}: {foot}"


def test_formulas_wait_for_katex(site):
    text = (site / "notation.html").read_text()
    assert 'class="arithmatex"' in text and "katex.min.js" in text
    assert (site / "assets/katex/fonts").exists()


def test_vendored_files_stay_small():
    files = [file for file in (ROOT / "docs/assets").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 1.5e6


def test_source_shows_decorators_and_its_place_in_the_file(docs, tmp_path):
    code = "import x\n\n\nclass A:\n    @x.y\n    def f(self):\n        return 1\n\nB=2"
    page = MINIMAL.format(symbol="A.f") + "\n" + MINIMAL.format(symbol="B")
    root = tree(tmp_path, docs__index_md=page, minllama__code_py=code)
    text = docs.pages(root)["index.md"].decode()
    assert "````python\n@x.y\ndef f(self):\n    return 1\n````" in text
    assert "````python\nB=2\n````" in text
    assert 'href="source/minllama/code.html#__codelineno-0-5"' in text


@pytest.mark.parametrize("symbol", ["Lora", "A.g", "B.f"])
def test_a_misspelled_source_stops_the_build(docs, tmp_path, symbol):
    code = "class A:\n    def f(self): ...\n\nB = 2\n"
    page = MINIMAL.format(symbol=symbol)
    root = tree(tmp_path, docs__index_md=page, minllama__code_py=code)
    with pytest.raises(KeyError, match=f"code.py has no {symbol}"):
        docs.pages(root)


def test_a_link_to_nothing_stops_the_build(docs, tmp_path):
    root = tree(tmp_path, docs__index_md="[here](../tests/nothing.py)")
    with pytest.raises(FileNotFoundError, match="nothing.py"):
        docs.pages(root)


def test_a_link_to_a_coming_chapter_leads_to_the_map(docs, tmp_path):
    root = tree(
        tmp_path, docs__index_md="# Map", docs__notation_md="see [LoRA](peft.md)"
    )
    assert b"[LoRA](index.md)" in docs.pages(root)["notation.md"]


def test_marks_in_code_stay_as_they_are(docs, tmp_path):
    text = "````\n@source a.py:B\n![x](y.svg)\n````\n\nand `f[0](x.md)`"
    root = tree(tmp_path, docs__index_md=text)
    assert docs.pages(root)["index.md"].decode() == text


def test_a_figure_is_drawn_into_the_page(docs, tmp_path):
    svg = (
        '<?xml version="1.0"?><svg xmlns="x" width="72pt" viewBox="0 0 9 9">'
        '<title>A box</title><defs><path id="p"/></defs>'
        '<use href="#p" fill="#0072B2"/></svg>'
    )
    text = (
        "Before.\n\n![A claim, $x^2$, in\ntwo lines.](figures/box.svg) H200, bfloat16\n"
    )
    root = tree(tmp_path, docs__index_md=text, docs__figures__box_svg=svg)
    page = docs.pages(root)["index.md"].decode()
    assert '<svg role="img" aria-labelledby="index-1-title"' in page
    assert '<title id="index-1-title">A box</title>' in page and "<?xml" not in page
    assert 'id="index-1-p"' in page and 'href="#index-1-p" fill="var(--dim-T)"' in page
    assert '<span class="arithmatex">\\(x^2\\)</span>' in page
    assert '<span class="note">H200, bfloat16</span></figcaption></figure>' in page


def test_a_notebook_becomes_a_page(docs, tmp_path):
    def output(**data):
        return {"output_type": "display_data", "data": data, "metadata": {}}

    long = {"output_type": "stream", "name": "stdout", "text": ["line\n"] * 99}
    progress = {"output_type": "stream", "name": "stderr", "text": "1%\r\x1b[1m99%\n"}
    pixels = output(**{"image/png": "aGk=", "text/plain": "<Figure>"})
    script = output(**{"text/html": "<script>1</script>", "text/plain": "a < `b`"})
    plot = '<?xml?>\n<svg width="9pt"><path stroke="#5b606b"/></svg>'
    svg = output(**{"image/svg+xml": [plot]})
    foreign = output(**{"image/svg+xml": '<svg width="9pt"/>'})
    cells = [
        {
            "cell_type": "markdown",
            "source": ["# Title\n", "See [it](../docs/peft.md)."],
        },
        {
            "cell_type": "code",
            "source": "print('```')",
            "execution_count": 7,
            "outputs": [long, progress, pixels, script, svg, foreign],
        },
        {"cell_type": "markdown", "source": "Next: [5](05_long_context.ipynb)"},
    ]
    notebook = json.dumps({"cells": cells, "metadata": {}, "nbformat": 4})
    page = "# LoRA\n\n[notebook](../chapters/04_peft.ipynb)\n\nPrevious: [a](no.md)"
    root = tree(
        tmp_path,
        docs__peft_md=page,
        chapters__04_peft_ipynb=notebook,
        docs__index_md="",
    )
    site = docs.pages(root)
    text = site["notebooks/04_peft.md"].decode()
    assert text.startswith("# Title\n\nOpen in Jupyter: [`chapters/04_peft.ipynb`]")
    assert "See [it](../peft.md)." in text
    assert "````python\nprint('```')\n````" in text and "<span>7</span>" in text
    assert "<summary>99 lines of output</summary>" in text
    assert "<pre>99%</pre>" in text and "<script" not in text
    assert "a &lt; &#96;b&#96;" in text
    assert site["notebooks/04_peft-1.png"] == b"hi"
    assert 'class="output figure"><svg' in text and 'stroke="currentColor"' in text
    assert 'class="output figure card"><svg' in text
    assert not text.rstrip().endswith(")") and "notebooks/04_peft.ipynb" in site
    assert b"[notebook](notebooks/04_peft.md)" in site["peft.md"]
    assert b"Previous" not in site["peft.md"]


def test_figures_and_notebooks_share_their_ink(docs, monkeypatch):
    monkeypatch.syspath_prepend(f"{DOCS}/figures")
    import marks
    import notebooks
    import style

    assert notebooks.INK == style.INK
    for letter, color in marks.DIMENSIONS.items():
        assert getattr(style, letter).lstrip("#") == color


def test_the_numbers_of_the_notation_are_those_of_the_registry():
    from minllama.architecture.config import LlamaConfig

    config = LlamaConfig.from_name("llama-3.2-1b")
    table = (ROOT / "docs/notation.md").read_text()
    rows = re.findall(r"\| `(\w+)` \| ([\d,]+) \|", table)
    assert len(rows) == 7
    for field, number in rows:
        assert getattr(config, field) == int(number.replace(",", "")), field


def test_the_first_python_block_of_the_readme_runs():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README.md yet")
    block = re.search(r"^```python\n(.*?)^```", readme.read_text(), re.M | re.S)
    assert block, "README.md has no ```python block"
    done = subprocess.run(
        [sys.executable, "-c", block[1]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
