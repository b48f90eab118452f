"""The order of the book: its pages, its chapters, and what each chapter promises."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Chapter:
    number: int
    name: str  # one word in four places: package, notebook, page, tests
    title: str
    promise: str

    @property
    def page(self) -> str:
        return f"docs/{self.name}.md"

    @property
    def notebook(self) -> str:
        return f"chapters/{self.number:02d}_{self.name}.ipynb"

    def notebooks(self, root: Path) -> list[str]:
        """The notebook, and those that go on with it (01_architecture_inside)."""
        found = root.glob(f"chapters/{self.number:02d}_{self.name}*.ipynb")
        return sorted(path.relative_to(root).as_posix() for path in found)


CONTENTS = """\
architecture: Llama architecture
    Logits computed with a cache equal those without, however the tokens are split.
dist_checkpoint: Distributed checkpoints
    What four processes saved, one or eight load, bit for bit.
dist_run: Distributed runs
    The sharded loss is the loss of a single process.
peft: Parameter-efficient finetuning
    Adding LoRA changes no output until it learns; merging changes none after.
long_context: Long context
    Scaling positions by one changes nothing; by more, the model reads farther.
large_vocab: Large vocabularies
    New tokens leave the old logits alone, and the chunked loss is the whole loss.
quantize: Quantization
    The bytes are known before you quantize, and so is the bound on the error.
fast_ops: Fast operators
    Each kernel agrees with the plain PyTorch beside it, in values and gradients.
inference: Inference
    Neighbours in the batch change no token of yours.
ssm: State-space models
    The parallel scan equals the loop.
vision: Vision
    Without an image, the model that sees is the Llama that it was.
extend: Extending the model
    A subclass that changes a seam passes through every other chapter.
"""
CHAPTERS = [
    Chapter(number, *(part.strip() for part in re.split(": |\n", block)))
    for number, block in enumerate(re.findall(r"\w.*\n {4}.*", CONTENTS), start=1)
]

# Title -> file. A page that does not exist yet is left out.
FRONT = {
    "Home": "docs/index.md",
    "Dependencies": "dependencies.md",
    "Weights": "download_weights.md",
    "Notation": "docs/notation.md",
}
BACK = {"Design": "docs/design.md", "API reference": "docs/api.md"}

# The hub in reading order; tokenizer_json.py follows tokenizer.py, others come last.
HUB = """config rope layout model families cache generate surgery tokenizer bpe
sentencepiece chat weights data train optim hooks dropout evaluate accounting kernels"""


def named(root: Path = ROOT) -> dict[str, str]:
    """Files with a place in the book, in reading order: file -> title."""
    files = {path: title for title, path in FRONT.items()}
    for chapter in CHAPTERS:
        files[chapter.page] = f"{chapter.number} · {chapter.title}"
        for path in chapter.notebooks(root):
            more = path.removesuffix(".ipynb").split(f"_{chapter.name}")[1]
            more = more.replace("_", " ")
            files[path] = f"Notebook {chapter.number}{more and ':'}{more}"
    files |= {path: title for title, path in BACK.items()}
    return {path: title for path, title in files.items() if (root / path).exists()}


def extra(root: Path = ROOT) -> list[str]:
    """Pages and notebooks that no list above names; they follow in the back."""
    found = [*root.glob("docs/*.md"), *root.glob("chapters/*.ipynb")]
    paths = [path.relative_to(root).as_posix() for path in sorted(found)]
    return [path for path in paths if path not in named(root)]


def page_of(path: str) -> str:
    """A file of the repository -> its place in the site."""
    if path == "docs/api.md":
        return "api/index.md"
    if path.endswith(".ipynb"):
        return f"notebooks/{Path(path).stem}.md"
    if path.endswith(".py"):
        return f"source/{path.removesuffix('.py')}.md"
    if path.endswith(".md"):
        return Path(path).name
    return path.removeprefix("docs/")


def packages(root: Path = ROOT) -> dict[str, list[str]]:
    """Packages with code, the hub first, and their modules in reading order."""
    order = HUB.split()

    def place(stem: str) -> tuple[int, str]:
        first = stem.split("_")[0]
        return (order.index(first) if first in order else len(order), stem)

    found = {}
    for name in ["architecture", *[chapter.name for chapter in CHAPTERS], "recipes"]:
        stems = {file.stem for file in (root / "minllama" / name).glob("*.py")}
        stems = {stem for stem in stems if not stem.startswith("_")}
        if stems:
            found[name] = sorted(stems, key=place)
    return found


def nav(root: Path = ROOT) -> list:
    """The navigation that mkdocs shows."""
    titles = named(root)
    chapters = [
        path
        for chapter in CHAPTERS
        for path in (chapter.page, *chapter.notebooks(root))
    ]

    def entries(paths) -> list:
        return [{titles[path]: page_of(path)} for path in paths if path in titles]

    back = entries(path for path in BACK.values() if path != "docs/api.md")
    back += [page_of(path) for path in extra(root)]
    api = {
        name: [{m: f"api/{name}/{m}.md"} for m in ms]
        for name, ms in packages(root).items()
    }
    back.append({"API reference": ["api/index.md", *({k: v} for k, v in api.items())]})
    sections = {"Chapters": entries(chapters), "Reference": back}
    return entries(FRONT.values()) + [{k: v} for k, v in sections.items() if v]
