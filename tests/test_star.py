"""The star of imports, drawn from the source: chapters meet in the hub only.

    dist_checkpoint   dist_run   peft
                \\        |       /
    long_context ─ ┌──────────────┐ ─ large_vocab
                   │ architecture │
        quantize ─ └──────────────┘ ─ fast_ops
                /        |       \\
          inference     ssm     vision

A chapter imports the hub and itself; the hub imports itself. `recipes`, `cli` and what
lies outside the package may import all. Files are read, not run: an import within a
function counts as one at the top.
"""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minllama"
HUB = "architecture"
ABOVE = {"recipes", "cli", "__main__", "assets"}
HEAVY = ["transformers", "tokenizers", "matplotlib", "tiktoken", "sentencepiece",
         "peft", "google.protobuf", "pandas", "IPython", "triton"]  # fmt: skip


def sources(root: Path = PACKAGE) -> list[Path]:
    return sorted(root.rglob("*.py"))


def imported_modules(path: Path, root: Path = ROOT) -> list[tuple[int, str]]:
    """(line, full name) of every module that a file imports, relative ones resolved."""
    package = path.relative_to(root).with_suffix("").parts[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            # `from minllama import peft` names a chapter behind the import
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def home(name: str) -> str | None:
    """The chapter, or other first part, that a module of the package lives in."""
    parts = name.split(".")
    return parts[1] if parts[0] == "minllama" and len(parts) > 1 else None


def violations(path: Path, root: Path = ROOT) -> list[str]:
    """Imports of a file that the star forbids, each as `file:line: sentence`."""
    here = path.relative_to(root)
    own = here.parts[1].removesuffix(".py")
    if own in ABOVE:
        return []
    if own == "__init__":  # the names that a reader types; all live in the hub
        own = HUB
    allowed = {own, HUB}
    bad = []
    for line, name in imported_modules(path, root):
        target = home(name)
        if target is None and name.split(".")[0] != "minllama":
            continue
        if target not in allowed:
            bad.append(f"{here}:{line}: {own} imports {name}; only {sorted(allowed)}.")
    return bad


def test_chapters_import_the_hub_and_themselves_only():
    bad = [line for path in sources() for line in violations(path)]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("file", "line", "name"),
    [
        ("peft/lora.py", "from minllama.quantize import int8", "minllama.quantize"),
        ("peft/lora.py", "import minllama.quantize.int8", "minllama.quantize.int8"),
        ("peft/lora.py", "from minllama import quantize", "minllama.quantize"),
        ("peft/lora.py", "from ..quantize.int8 import Int8", "minllama.quantize.int8"),
        ("peft/lora.py", "from .. import quantize", "minllama.quantize"),
        ("peft/lora.py", "import minllama", "minllama"),
        ("peft/lora.py", "from minllama import generate", "minllama.generate"),
        ("peft/lora.py", "def f():\n    import minllama.ssm", "minllama.ssm"),
        ("peft/lora.py", "from minllama.recipes import train", "minllama.recipes"),
        ("architecture/model.py", "import minllama.peft", "minllama.peft"),
        (
            "architecture/model.py",
            "from minllama.recipes import bench",
            "recipes.bench",
        ),
        ("architecture/model.py", "from minllama.cli import main", "minllama.cli.main"),
        ("__init__.py", "from minllama.peft import add_lora", "minllama.peft.add_lora"),
    ],
)
def test_a_planted_import_is_found(tmp_path, file, line, name):
    path = tmp_path / "minllama" / file
    path.parent.mkdir(parents=True)
    path.write_text(f'"""Planted."""\n\n{line}\n')
    [found] = violations(path, tmp_path)
    assert f"minllama/{file}:" in found and name in found


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("peft/lora.py", "from minllama.architecture.model import Attention"),
        ("peft/lora.py", "from minllama.architecture import replace_modules"),
        ("peft/lora.py", "from minllama.peft.dora import DoRA"),
        ("peft/lora.py", "from .dora import DoRA"),
        ("peft/lora.py", "from . import dora"),
        ("peft/lora.py", "import torch, triton"),
        ("recipes/finetune.py", "from minllama.peft import add_lora"),
        ("cli.py", "from minllama.recipes import train"),
        ("__init__.py", "from minllama.architecture.model import MinimalLlama"),
    ],
)
def test_a_lawful_import_is_left_alone(tmp_path, file, line):
    path = tmp_path / "minllama" / file
    path.parent.mkdir(parents=True)
    path.write_text(f"{line}\n")
    assert violations(path, tmp_path) == []


def test_importing_the_package_brings_nothing_heavy():
    """In a process of its own: this one has imported transformers long ago."""
    code = (
        "import sys, torch, numpy, safetensors, regex\n"
        "before = set(sys.modules)\n"
        "import minllama.architecture.model, minllama.architecture.families\n"
        f"print(*[x for x in {HEAVY} if x in sys.modules and x not in before])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve"}


GUARDABLE = ("pickle.Unpickler", "pickle.UnpicklingError")


def is_guarded(tree: ast.Module) -> bool:
    """Whether `Unpickler` is only the base of classes that say what they find."""
    uses = [
        n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "Unpickler"
    ]
    bases = [
        base
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(getattr(part, "name", None) == "find_class" for part in node.body)
        for base in node.bases
    ]
    return bool(uses) and all(use in bases for use in uses)


def unsafe_loads(path: Path, root: Path = ROOT) -> list[str]:
    """Pickle in any form: a file from elsewhere could run its own code.

    But an Unpickler that is only the base of a class with a `find_class` of its own
    builds what that allows.
    """
    bad = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if given.get("weights_only") != "True":
                bad.append(
                    f"{path}:{node.lineno}: torch.load without weights_only=True"
                )
    for line, name in imported_modules(path, root):
        if name in GUARDABLE and is_guarded(tree):
            continue
        if name == "torch.load" or name.split(".")[0] in PICKLES:
            bad.append(f"{path}:{line}: imports {name}")
    return bad


def test_no_file_from_elsewhere_is_unpickled():
    bad = [line for path in sources() for line in unsafe_loads(path)]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import load",
        "import torch\nx = torch.load('a.pth')",
        "import torch\nx = torch.load('a.pth', weights_only=False)",
        "from torch import load",
        "from pickle import Unpickler\nx = Unpickler(open('a')).load()",
    ],
)
def test_a_planted_pickle_is_found(tmp_path, line):
    path = tmp_path / "planted.py"
    path.write_text(line)
    assert len(unsafe_loads(path, tmp_path)) == 1


def test_a_safe_load_is_left_alone(tmp_path):
    path = tmp_path / "safe.py"
    path.write_text("import torch\nx = torch.load('a.pth', weights_only=True)\n")
    assert unsafe_loads(path, tmp_path) == []
    path.write_text(
        "from pickle import Unpickler\n"
        "class Few(Unpickler):\n    def find_class(self, a, b): raise ValueError\n"
    )
    assert unsafe_loads(path, tmp_path) == []


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize(
    "name", [module_name(path) for path in sources() if path.stem != "__main__"]
)
def test_examples_in_docstrings_are_true(name):
    """And every module can be imported, alone."""
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert not failed, f"{failed} of {tried} examples of {name}"
