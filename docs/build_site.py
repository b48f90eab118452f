"""Turn docs/ and chapters/ into plain Markdown under .site/, and that into site/.

    python docs/build_site.py      the site; what follows is given to `mkdocs build`
    mkdocs serve                   then: a preview that follows edits

Also a hook of mkdocs: it rebuilds the pages before each build of `mkdocs serve`, and
gives mkdocs the navigation.
"""

import os
import subprocess
import sys
from pathlib import Path

from book import CHAPTERS, ROOT, extra, named, nav, packages
from marks import TURN, Page
from notebooks import notebook_page

OUT = ".site"


def build(root: Path = ROOT) -> Path:
    """Write the pages. Files that are equal stay untouched, others are removed."""
    site = pages(root)
    out = root / OUT
    for name, data in site.items():
        file = out / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists() or file.read_bytes() != data:
            file.write_bytes(data)
    for file in sorted(out.rglob("*"), reverse=True):
        if file.is_file() and file.relative_to(out).as_posix() not in site:
            file.unlink()
    return out


def pages(root: Path) -> dict[str, bytes]:
    """Every file of the site: place -> content."""
    assets = [file for file in (root / "docs/assets").rglob("*") if file.is_file()]
    site = {f.relative_to(root / "docs").as_posix(): f.read_bytes() for f in assets}
    sources, files = set(), set()
    for path in [*named(root), *extra(root)]:
        page = Page(path, root)
        if path.endswith(".ipynb"):
            text, outputs = notebook_page(page)
            site |= outputs
        else:
            text = page.render(TURN.sub("", (root / path).read_text().rstrip()))
            text = eyebrow(path) + text
        site[page.out] = text.encode()
        sources |= page.sources
        files |= page.files
    for package, names in packages(root).items():
        for name in names:
            site[f"api/{package}/{name}.md"] = module_page(package, name).encode()
            sources.add(f"minllama/{package}/{name}.py")
    for path in sources:
        site[Page(path).out] = source_page(path, root).encode()
    for path in files:
        site[Page(path).out] = (root / path).read_bytes()
    return site


def eyebrow(path: str) -> str:
    """The words above the title of a chapter."""
    numbers = [chapter.number for chapter in CHAPTERS if chapter.page == path]
    return f'<p class="eyebrow">Chapter {numbers[0]}</p>\n\n' if numbers else ""


def module_page(package: str, name: str) -> str:
    """The reference of one module."""
    file = f"../../source/minllama/{package}/{name}.md"
    head = "---\nsearch:\n  boost: 0.5\n---\n\n"
    head += f"# {name}\n\n`minllama.{package}.{name}` · [the whole file]({file})\n"
    return f"{head}{{ .notebook-bar }}\n\n::: minllama.{package}.{name}\n"


def source_page(path: str, root: Path) -> str:
    """A whole file of code, so that a reader sees a symbol among its neighbours."""
    code = (root / path).read_text().rstrip()
    head = "---\nhide: [toc]\nsearch:\n  exclude: true\n---\n\n"
    return f'{head}# {path} {{ .path }}\n\n````python linenums="1"\n{code}\n````\n'


def on_config(config, **_):
    """Hook of mkdocs: the navigation follows the files that exist."""
    config.nav = nav()
    return config


def on_pre_build(**_) -> None:
    """Hook of mkdocs."""
    build()


def on_serve(server, **_):
    """Hook of mkdocs: what the pages are made of."""
    for folder in ["docs", "chapters", "minllama"]:
        if (ROOT / folder).exists():
            server.watch(str(ROOT / folder))
    return server


if __name__ == "__main__":
    try:
        out = build()
    except (FileNotFoundError, KeyError, ValueError) as error:
        sys.exit(f"docs: {error}")
    print(f"{len(list(out.rglob('*.md')))} pages in {OUT}/", flush=True)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", *sys.argv[1:]]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    sys.exit(subprocess.call(command, cwd=ROOT, env=quiet))
