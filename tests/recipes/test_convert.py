"""convert and verify: what they print, what they refuse, what they leave behind."""

import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from minllama.architecture import weights
from minllama.architecture.config import LlamaConfig
from minllama.architecture.families import class_for
from minllama.architecture.model import MinimalLlama
from minllama.architecture.weights_meta import save_meta
from minllama.architecture.weights_save import build_shapes, weight_shapes
from minllama.dist_checkpoint import save_checkpoint
from minllama.recipes.convert import convert, verify
from tests.conftest import make_model, random_tokens


@pytest.fixture
def model():
    return make_model("llama", vocab_size=96, eos_ids=(3, 5)).cpu()


@pytest.fixture
def source(model, tmp_path):
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text('{"a": 1}')
    return tmp_path / "source"


# convert


@pytest.mark.parametrize("shards", [1, 2])
@torch.no_grad()
def test_to_meta_and_back_changes_nothing(shards, model, source, tmp_path):
    assert convert(source, tmp_path / "meta", format="meta", shards=shards) == 0
    assert len(list((tmp_path / "meta").glob("consolidated.*.pth"))) == shards
    assert convert(tmp_path / "meta", tmp_path / "back") == 0
    back = MinimalLlama.from_pretrained(tmp_path / "back")
    tokens = random_tokens(2, 15, 96).cpu()
    assert_close(back(tokens), model(tokens), rtol=0, atol=0)
    assert back.config.eos_ids == (3, 5)
    for folder in ("meta", "back"):
        assert (tmp_path / folder / "tokenizer.json").read_text() == '{"a": 1}'


def test_a_dtype_is_converted_and_said(source, tmp_path, capsys):
    assert convert(source, tmp_path / "half", dtype="bfloat16") == 0
    state = load_file(tmp_path / "half" / "model.safetensors")
    assert {weight.dtype for weight in state.values()} == {torch.bfloat16}
    printed = capsys.readouterr().out
    assert "numbers in float32" in printed and "numbers in bfloat16" in printed


def test_a_shipped_model_keeps_the_dtype_of_its_file(tmp_path):
    assert convert("stories-mini", tmp_path / "mini") == 0
    state = load_file(tmp_path / "mini" / "model.safetensors")
    assert {weight.dtype for weight in state.values()} == {torch.float16}
    assert (tmp_path / "mini" / "tokenizer.json").exists()


def test_a_number_too_large_for_the_new_dtype_is_found(model, tmp_path, capsys):
    model.norm.weight.data[3] = 1e6
    model.save_pretrained(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "half", dtype="float16") == 1
    assert "norm.weight: 0 NaN and 1 infinite of 32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"dtype": "int4"}, "dtype='int4' is none of float16, bfloat16"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is none of torch.float16"),
        ({"format": "gguf"}, "format='gguf' is none of hf, meta"),
        ({"shards": 2}, "shards=2 is for format='meta'"),
        ({"format": "meta", "shards": 5}, "shards=5 does not divide"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_written(
    asked, said, source, tmp_path
):
    with pytest.raises(ValueError, match=said):
        convert(source, tmp_path / "new", **asked)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_holds_a_model_is_not_overwritten(source, tmp_path):
    with pytest.raises(
        ValueError, match="source holds config.json, model.safetensors a"
    ):
        convert(source, source)
    with pytest.raises(ValueError, match="tokenizer.json holds a file already"):
        convert(source, source / "tokenizer.json")


def test_a_disk_that_is_too_small_is_refused(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"new needs 0.0 GB and .* has 0.0 GB free"):
        convert(source, tmp_path / "new")


# verify


def test_a_good_folder_passes_with_a_line_on_each_check(source, capsys):
    assert verify(source) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"model      MinimalLlama: {source}, 21,664 numbers")
    assert printed[1:] == [
        "rope       theta 10000, not scaled",
        "keys       21, each in its place",
        "values     no NaN, no infinity",
        "checksums  none to check",
    ]


def test_not_a_number_and_infinity_are_counted(source, capsys):
    state = load_file(source / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, :2] = torch.nan
    state["lm_head.weight"][0, 0] = -torch.inf
    save_file(state, source / "model.safetensors")
    assert verify(source) == 1
    printed = capsys.readouterr().out
    assert "values     2 wrong:" in printed
    assert "layers.1.mlp.up_proj.weight: 2 NaN and 0 infinite of 1536" in printed
    assert "lm_head.weight: 0 NaN and 1 infinite of 3072" in printed


def test_wrong_keys_are_listed(source, capsys):
    state = load_file(source / "model.safetensors")
    state |= {f"x{i:02}": torch.ones(1) for i in range(12)}
    del state["model.norm.weight"]
    save_file(state, source / "model.safetensors")
    assert verify(source) == 1
    printed = capsys.readouterr().out
    assert "keys       13 wrong:" in printed and "missing norm.weight (32,)" in printed
    assert "extra x08 (1,)" in printed and "… and 3 more" in printed
    assert "values     not read" in printed


def test_a_folder_that_is_refused_is_reported_and_fails(source, capsys):
    (source / "config.json").write_text("{")
    assert verify(source) == 1
    assert "broken" in capsys.readouterr().out
    assert verify(source / "none") == 1
    assert "is no folder" in capsys.readouterr().out


@pytest.mark.parametrize("list_name", ["checklist.chk", "SHA256SUMS"])
def test_checksums_are_compared(list_name, model, tmp_path, capsys):
    save_meta(model, tmp_path)
    algorithm = "md5" if list_name == "checklist.chk" else "sha256"
    lines = []
    for name in ("consolidated.00.pth", "params.json"):
        digest = hashlib.new(algorithm, (tmp_path / name).read_bytes()).hexdigest()
        lines.append(f"{digest}  {name}")
    (tmp_path / list_name).write_text("\n".join(lines) + "\n")
    assert verify(tmp_path) == 0
    assert "checksums  2 match" in capsys.readouterr().out

    params = tmp_path / "params.json"
    params.write_text(params.read_text() + " ")
    lines += [f"{'0' * 32}  tokenizer.model", f"{'0' * 32}  ../secret"]
    (tmp_path / list_name).write_text("\n".join(lines) + "\n")
    assert verify(tmp_path) == 1
    printed = capsys.readouterr().out
    assert "checksums  3 wrong:" in printed
    assert f"params.json: {algorithm} " in printed
    assert f"tokenizer.model: is missing ({list_name})" in printed
    assert "../secret: lies outside of the folder, so it is not read" in printed


def test_the_factor_of_rope_that_metas_files_leave_out_is_said(model, tmp_path, capsys):
    save_meta(model, tmp_path)
    verify(tmp_path)
    assert "rope       theta 10000, not scaled" in capsys.readouterr().out
    params = json.loads((tmp_path / "params.json").read_text())
    params |= {"use_scaled_rope": True, "rope_theta": 500000.0}
    (tmp_path / "params.json").write_text(json.dumps(params))
    verify(tmp_path)
    printed = capsys.readouterr().out
    assert "rope       theta 500000, scaled by 8 (llama3)" in printed


# download_weights.md

PAGE = Path(__file__).parents[2] / "download_weights.md"


def test_the_sizes_on_the_page_are_those_of_the_configs():
    rows = re.findall(
        r"^\| `(\S+)` \| (\S+) billion \| (\S+) GB", PAGE.read_text(), re.M
    )
    assert len(rows) == 9
    for name, billions, gigabytes in rows:
        config = LlamaConfig.from_name(name)
        model = build_shapes(class_for(MinimalLlama, config.model_type), config)
        count = sum(math.prod(shape) for shape in weight_shapes(model).values())
        assert (name, billions) == (name, f"{count / 1e9:.2f}")
        assert (name, gigabytes) == (name, f"{count * 2 / 1e9:.1f}")


def test_the_messages_on_the_page_are_those_of_the_code():
    table = PAGE.read_text().split("| message |")[1].split("\n\n")[0]
    code = "".join(
        path.read_text() for path in Path(weights.__file__).parent.glob("*.py")
    )
    code = re.sub(r'"\s+f?"', "", code)  # a message may be cut into lines
    messages = re.findall(r"^\| ([^|]+) \| \w", table, re.M)
    assert len(messages) == 6
    for part in (part for message in messages for part in message.split("…")):
        assert part.strip() in code, part


def test_a_training_checkpoint_becomes_a_folder_and_back(tmp_path, capsys):
    whole = MinimalLlama.from_pretrained("stories-mini")
    save_checkpoint(tmp_path / "run/checkpoints", whole, step=7)
    assert convert(tmp_path / "run", tmp_path / "hf") == 0
    cut = {"format": "checkpoint", "shards": 3}
    assert convert(tmp_path / "hf", tmp_path / "cut", **cut) == 0
    assert convert(tmp_path / "cut", tmp_path / "meta", format="meta", shards=2) == 0
    assert verify(tmp_path / "run/checkpoints") == 0
    file = next((tmp_path / "cut").glob("*/*.safetensors"))
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    assert verify(tmp_path / "cut") == 1
    assert "damaged" in capsys.readouterr().out
    tokens = torch.arange(1, 9)[None]
    for name in ("hf", "meta"):
        again = MinimalLlama.from_pretrained(tmp_path / name)
        torch.testing.assert_close(again(tokens), whole(tokens))
    with pytest.raises(ValueError, match="convert to hf first"):
        convert(tmp_path / "hf", tmp_path / "x", dtype="bfloat16", format="checkpoint")
    with pytest.raises(ValueError, match="nothing is overwritten"):
        convert(tmp_path / "cut", tmp_path / "hf")
