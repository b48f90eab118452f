"""What the disk does to files, and what is said about it."""

import json
import shutil

import pytest
import torch

from minllama.architecture.optim import make_adamw
from minllama.dist_checkpoint import (
    consolidate,
    folders,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    shard_file,
)
from minllama.dist_checkpoint import write as write_file
from tests.conftest import make_model
from tests.dist_checkpoint.work import equal, make_rows, train_step, whole

MODEL = "model-00000-of-00001.safetensors"
OPTIMIZER = "optimizer-00000-of-00001.safetensors"


@pytest.fixture
def saved(tmp_path):
    """A model, its optimizer, and two checkpoints of them."""
    model = make_model("llama")
    optimizer = make_adamw(model, 1e-2)
    train_step(model, optimizer, make_rows(0))
    save_checkpoint(tmp_path, model, optimizer, step=1)
    return model, optimizer, save_checkpoint(tmp_path, model, optimizer, step=2)


def place(path, name):
    """File and byte range of a tensor that lies in one piece."""
    piece = json.loads((path / "manifest.json").read_text())["tensors"][name]["pieces"][
        0
    ]
    return path / piece["file"], piece["bytes"]


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "optimizer.layers.1.mlp.up_proj.weight.exp_avg_sq"]
)
def test_one_flipped_bit_is_found_and_the_tensor_named(saved, name):
    model, optimizer, path = saved
    file, (start, end) = place(path, name)
    data = bytearray(file.read_bytes())
    data[(start + end) // 2] ^= 8
    file.write_bytes(data)
    before = whole(model.state_dict())
    with pytest.raises(ValueError, match=f"{file.name} is damaged .* concerns {name}"):
        load_checkpoint(path.parent, model, optimizer)
    assert equal(before, model.state_dict())
    load_checkpoint(path.with_name("step-00000001"), model, optimizer)
    load_checkpoint(path, model, optimizer, verify=False)  # as told


def test_a_flipped_bit_in_the_header_or_the_manifest_is_found(saved):
    model, _, path = saved
    data = bytearray((path / MODEL).read_bytes())
    data[30] ^= 1
    (path / MODEL).write_bytes(data)
    with pytest.raises(ValueError, match=f"{MODEL} is damaged .* concerns no tensor"):
        load_checkpoint(path, model)
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"step": 2', '"step": 3'))
    with pytest.raises(ValueError, match=r"manifest.json is damaged \(its SHA-256"):
        load_checkpoint(path, model)
    (path / "manifest.json").write_text(text[:-9])
    with pytest.raises(ValueError, match="manifest.json is damaged .*step-00000001"):
        load_checkpoint(path, model)
    assert latest_checkpoint(path.parent).name == "step-00000001"


def test_a_shard_cut_off_or_missing_is_refused_and_the_one_before_found(saved):
    model, optimizer, path = saved
    data = (path / OPTIMIZER).read_bytes()
    (path / OPTIMIZER).write_bytes(data[:-5])
    message = rf"{OPTIMIZER} is cut off: {len(data) - 5:,} bytes.*concerns optimizer\."
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path, model, optimizer)
    (path / OPTIMIZER).unlink()
    with pytest.raises(ValueError, match=f"{OPTIMIZER} is missing; it concerns opt"):
        load_checkpoint(path, model, optimizer)
    load_checkpoint(path, model)  # the model's file is whole
    assert latest_checkpoint(path.parent).name == "step-00000001"
    assert load_checkpoint(path.parent, model, optimizer).step == 1
    with pytest.raises(ValueError, match="no complete checkpoint"):
        shutil.rmtree(path.with_name("step-00000001"))
        load_checkpoint(path.parent, model, optimizer)


def test_damage_is_found_by_every_way_of_reading(saved, tmp_path):
    _, _, path = saved
    file, (start, _) = place(path, "model.norm.weight")
    data = bytearray(file.read_bytes())
    data[start] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="concerns model.norm.weight"):
        load_weights(make_model("llama"), path)
    with pytest.raises(ValueError, match="concerns model.norm.weight"):
        consolidate(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_manifest_that_lies_is_refused(saved):
    from minllama.dist_checkpoint.manifest import read_manifest, write_manifest

    model, _, path = saved
    good = read_manifest(path)
    for change, message in (
        ({"version": 9}, "version=9; this library reads"),
        ({"format": "other"}, "is 'other'"),
        ({"files": {"../x": {"bytes": 0, "sha256": ""}}}, "names the file '../x'"),
    ):
        write_manifest(path, {**good, **change})
        with pytest.raises(ValueError, match=message):
            load_checkpoint(path, model)
    tensors = json.loads(json.dumps(good["tensors"]))
    tensors["model.norm.weight"]["pieces"] = []
    write_manifest(path, {**good, "tensors": tensors})
    with pytest.raises(ValueError, match=r"norm.weight \(32,\) hold 0 of its 32"):
        load_checkpoint(path, model)


@pytest.mark.parametrize("after", [0, 3, 40])
def test_a_full_disk_is_told_with_file_and_key_and_loses_nothing(
    saved, monkeypatch, after
):
    model, optimizer, path = saved
    written = []

    class Full:
        """A file on a disk with room for so many blocks: stands in for a full one."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, block):
            if len(written) > after:
                raise OSError(28, "No space left on device")
            written.append(self.file.write(block))

        def __getattr__(self, name):
            return getattr(self.file, name)

    plain = type(path).open
    monkeypatch.setattr(
        type(path),
        "open",
        lambda self, mode="r", **kw: (
            Full(plain(self, mode, **kw)) if "saf" in self.suffix and "w" in mode
            else plain(self, mode, **kw)
        ),
    )  # fmt: skip
    with pytest.raises(
        RuntimeError, match=r"safetensors: \S+ could not .*No space left"
    ):
        save_checkpoint(path.parent, model, optimizer, step=3)
    monkeypatch.undo()
    assert latest_checkpoint(path.parent) == path
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "step-00000001",
        "step-00000002",
    ]
    load_checkpoint(path.parent, model, optimizer)
    save_checkpoint(path.parent, model, optimizer, step=3)


def test_a_disk_too_small_is_told_before_a_byte_is_written(saved, monkeypatch):
    model, optimizer, path = saved
    free = shutil.disk_usage(path)._replace(free=100_000)
    monkeypatch.setattr(write_file.shutil, "disk_usage", lambda _: free)
    with pytest.raises(RuntimeError, match=r"needs 0\.00 GB and the disk has 0\.00 GB"):
        save_checkpoint(path.parent, model, optimizer, step=3)
    assert len(list(path.parent.iterdir())) == 2


def test_a_shard_is_a_plain_safetensors_file_with_the_hash_it_says(tmp_path):
    import hashlib

    from safetensors.torch import load_file

    tensors = {"a": torch.randn(7, 5), "b": torch.tensor(3), "c": torch.zeros(0, 2)}
    tensors["d"] = torch.randn(5, 7).bfloat16().T  # not contiguous
    plan = [
        shard_file.Planned(n, t.dtype, tuple(t.shape), lambda t=t: t)
        for n, t in tensors.items()
    ]
    written = shard_file.write_shard(tmp_path / "x.safetensors", plan)
    data = (tmp_path / "x.safetensors").read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == written[:2]
    assert equal(tensors, load_file(tmp_path / "x.safetensors"))


def test_each_file_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    import os

    events = []
    real = os.fsync
    monkeypatch.setattr(
        os,
        "fsync",
        lambda h: (events.append(os.readlink(f"/proc/self/fd/{h}")), real(h)),
    )
    monkeypatch.setattr(folders, "reached", lambda point: events.append(point))
    path = save_checkpoint(tmp_path, make_model("llama"), step=1)
    before = events[: events.index("before the rename")]
    assert {p.name for p in path.iterdir()} <= {e.rsplit("/", 1)[-1] for e in before}
    assert before[-1].endswith(".saving-step-00000001")  # the folder's names
    assert before[-2].endswith("manifest.json")  # the last file
    assert events[-2:] == [str(tmp_path), "after the rename"]
