"""Files of any kind straight into shards: right numbers, and little memory."""

import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from minllama.architecture.config import LlamaConfig
from minllama.architecture.model import MinimalLlama
from minllama.architecture.weights import save_pretrained
from minllama.architecture.weights_files import StoredWeights
from minllama.architecture.weights_meta import OURS, TURNED, save_meta, to_neighbours
from minllama.dist_checkpoint import consolidate, load_weights, save_checkpoint, split
from minllama.dist_checkpoint.weights import open_any
from minllama.dist_run.launch import launch
from tests.conftest import make_model, random_tokens, tiny_config
from tests.dist_checkpoint.work import cut, equal, make_rows, meta_model, whole

MEGABYTE = 1 << 20


def load_every_kind(folders: dict, kinds: list[str]) -> dict:
    """Each folder into a model cut in each way; what differs from one process."""
    wrong = {}
    for name, (folder, tied) in folders.items():
        expected = (
            MinimalLlama.from_pretrained(folder).state_dict() if tied != 2 else None
        )
        for kind in kinds:
            size = {"vocab_size": 98} if name != "t" else {}
            model = cut(meta_model(tie_embeddings=tied == 1, **size), kind)
            if kind == "fsdp":
                model = model.bfloat16().float()  # still meta
            load_weights(model, folder)
            same = expected is None or equal(expected, whole(model.state_dict()))
            still_tied = model.lm_head.weight is model.embed_tokens.weight
            if not same or still_tied != (tied == 1):
                wrong[f"{name} {kind}"] = (same, still_tied)
            if kind != "tp" or dist.get_world_size() == 2:
                with torch.no_grad():
                    model.eval()(make_rows(0))
    return wrong


WIDE = {"vocab_size": 6000, "dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 4,
        "ffn_dim": 1536}  # fmt: skip


def measured_load(folder: str) -> dict:
    """Peak growth of this process's memory while it loads, and the bytes it reads."""
    read = []
    plain = StoredWeights.read_part

    def counting(self, name, part):
        found = plain(self, name, part)
        read.append(found.nbytes)
        return found

    StoredWeights.read_part = counting
    warm = cut(meta_model(), "fsdp")
    load_weights(warm, small_folder(folder))  # imports and buffers of the first time
    read.clear()
    with torch.device("meta"):
        model = MinimalLlama(LlamaConfig(**WIDE))
    cut(model, "fsdp")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    load_weights(model, folder)
    peak = status("VmHWM") - before
    own = sum(p.to_local().nbytes for p in model.parameters())
    return {"peak": peak, "read": sum(read), "own": own, "largest": max(read)}


def small_folder(folder: str) -> str:
    return str(Path(folder).with_name("small"))


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1]) * 1024


def load_and_measure(folders: dict, kinds: list[str], wide: str) -> tuple:
    return load_every_kind(folders, kinds), measured_load(wide)


@pytest.mark.parametrize("world", [2, 4])
def test_shards_load_as_one_process_does_in_a_share_and_two_units(tmp_path, world):
    plain = make_model("llama", vocab_size=98)
    tied = make_model("llama", vocab_size=98, tie_embeddings=True)
    save_pretrained(plain, tmp_path / "hf", shard_bytes=20_000)
    save_pretrained(tied.bfloat16(), tmp_path / "tied")
    save_meta(plain, tmp_path / "meta", shards=2)
    folders = {
        "hf": (str(tmp_path / "hf"), 0),
        "tied": (str(tmp_path / "tied"), 1),
        "meta": (str(tmp_path / "meta"), 0),
    }
    kinds = ["fsdp", "tp"] + (["2d"] if world == 4 else [])
    wide = MinimalLlama(LlamaConfig(**WIDE))
    save_pretrained(wide, tmp_path / "wide")
    save_pretrained(make_model("llama"), tmp_path / "small")
    results = launch(
        load_and_measure, world, folders, kinds, str(tmp_path / "wide"), timeout=200
    )
    assert [wrong for wrong, _ in results] == [{}] * world
    full = sum(p.nbytes for p in wide.parameters())
    units = [sum(p.nbytes for p in m.parameters())
             for m in (wide.embed_tokens, wide.lm_head, *wide.layers)]  # fmt: skip
    bound = full / world + 2 * max(units) + 8 * MEGABYTE
    assert bound < 0.9 * full  # or the test would show nothing
    for _, found in results:
        assert found["read"] == found["own"] <= full / world * 1.01  # each byte once
        assert found["largest"] <= max(units) / world + 1024
        assert 0.9 * found["own"] < found["peak"] <= bound, found
    assert sum(found["read"] for _, found in results) == full


def test_keys_that_do_not_fit_are_all_listed(tmp_path):
    save_pretrained(make_model("llama"), tmp_path / "hf")
    with pytest.raises(
        ValueError, match=r"does not fit(.|\n)*24 missing|layers\.2\.mlp"
    ):
        load_weights(meta_model(n_layers=3), tmp_path / "hf")
    with pytest.raises(
        ValueError, match=r"down_proj.weight \(32, 48\), where \(32, 64"
    ):
        load_weights(meta_model(ffn_dim=64), tmp_path / "hf")
    with pytest.raises(ValueError, match=r"norm_eps=0\.1 where the files say"):
        load_weights(meta_model(norm_eps=0.1), tmp_path / "hf")
    with pytest.raises(ValueError, match="neither config.json nor params.json"):
        load_weights(meta_model(), tmp_path)


def test_new_parameters_of_a_subclass_are_drawn(tmp_path):
    model = make_model("llama")
    save_pretrained(model, tmp_path / "hf")
    gated = load_weights(
        meta_model("gated"), tmp_path / "hf", new=("*self_attn.gate_*",)
    )
    assert gated.layers[0].self_attn.gate_proj.weight.detach().std() > 0.01
    assert torch.equal(gated.lm_head.weight, model.lm_head.weight)
    with pytest.raises(ValueError, match="missing"):
        load_weights(meta_model("gated"), tmp_path / "hf")


def test_weights_keep_the_models_dtype_and_what_is_there(tmp_path):
    save_pretrained(make_model("llama"), tmp_path / "hf")
    model = make_model("llama").bfloat16()
    weight = model.norm.weight
    load_weights(model, tmp_path / "hf")
    assert model.norm.weight is weight and weight.dtype == torch.bfloat16
    assert load_weights(meta_model(), tmp_path / "hf", device="cpu").norm.weight.is_cpu


def test_a_shipped_model_loads_by_name():
    expected = MinimalLlama.from_pretrained("stories")
    with torch.device("meta"):
        model = MinimalLlama.from_config(expected.config)
    load_weights(model, "stories")
    assert equal(expected.state_dict(), model.state_dict())


# --- checkpoints to folders, and back ---


def test_a_checkpoint_becomes_a_folder_that_transformers_reads(any_model, tmp_path):
    import transformers

    path = save_checkpoint(tmp_path / "run", any_model, step=3)
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    out = consolidate(path, tmp_path / "out", cls=type(any_model), shard_bytes=20_000)
    save_pretrained(any_model, tmp_path / "direct", shard_bytes=20_000)
    for name in ("config.json", "generation_config.json"):
        assert (out / name).read_text() == (tmp_path / "direct" / name).read_text()
    assert (out / "tokenizer.json").read_text() == "{}"
    assert len(list(out.glob("model-*.safetensors"))) > 2
    again = type(any_model).from_pretrained(out)
    assert equal(any_model.state_dict(), again.state_dict())
    if "Gated" not in type(any_model).__name__:
        (out / "tokenizer.json").unlink()
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
        tokens = random_tokens(2, 9)
        torch.testing.assert_close(any_model(tokens), theirs(tokens).logits)


def test_split_and_consolidate_are_inverse(tmp_path):
    model = make_model("qwen3", tie_embeddings=True).bfloat16()
    save_pretrained(model, tmp_path / "hf")
    path = split(tmp_path / "hf", tmp_path / "parts", world=3)
    assert len(list(path.glob("model-*"))) == 3
    out = consolidate(tmp_path / "parts", tmp_path / "again")
    names = ["config.json", "generation_config.json"]
    assert [(out / n).read_text() for n in names] == [
        (tmp_path / "hf" / n).read_text() for n in names
    ]
    assert equal(model.state_dict(), type(model).from_pretrained(out).state_dict())
    half = consolidate(path, tmp_path / "half", dtype=torch.float16)
    assert {t.dtype for t in open_any(half).tensors.values()} == {torch.float16}
    with pytest.raises(ValueError, match="world=0"):
        split(tmp_path / "hf", tmp_path / "parts", world=0)


def test_a_partial_checkpoint_is_no_model(tmp_path):
    path = save_checkpoint(tmp_path, make_model("llama"), step=1, parts="layers.*")
    with pytest.raises(ValueError, match=r"3 missing(.|\n)*embed_tokens"):
        consolidate(path, tmp_path / "out")
    path = save_checkpoint(tmp_path, torch.nn.Linear(2, 2), step=1)
    with pytest.raises(ValueError, match="has no config.json"):
        consolidate(path, tmp_path / "out")


# --- folders of torch.distributed.checkpoint ---


def titan_state(model: MinimalLlama) -> dict:
    """The weights under torchtitan's names, its rope's order of rows."""
    state = {}
    for name, tensor in model.state_dict().items():
        layer = name.split(".")[:2] if name.startswith("layers.") else []
        prefix = "".join(f"{part}." for part in layer)
        theirs = OURS[name.removeprefix(prefix)][0]
        if theirs in TURNED:
            tensor = to_neighbours(tensor, model.config.head_dim)
        state[prefix + theirs] = tensor.clone()
    return state


def save_by_dcp(folder: str) -> dict:
    torch.manual_seed(0)
    model = make_model("llama")
    optimizer = {"state": {"x.exp_avg": torch.ones(3)}, "step": 5}
    sharded = cut(make_model("llama"), "fsdp")
    with torch.no_grad():
        for p, q in zip(sharded.parameters(), model.parameters()):
            p.copy_(torch.distributed.tensor.distribute_tensor(
                q.detach(), p.device_mesh, p.placements))  # fmt: skip
    dcp.save({"model": sharded.state_dict(), "optimizer": optimizer},
             checkpoint_id=f"{folder}/ours")  # fmt: skip
    state = {
        **titan_state(model),
        "freqs_cis": torch.ones(4),
        "train_state": {"step": 3},
    }
    dcp.save(state, checkpoint_id=f"{folder}/titan")
    return load_every_kind({"t": (f"{folder}/titan", 2)}, ["fsdp", "tp"])


def test_folders_as_torchtitan_writes_them_are_read(tmp_path):
    assert launch(save_by_dcp, 2, str(tmp_path), timeout=90) == [{}, {}]
    torch.manual_seed(0)
    expected = make_model("llama").state_dict()
    for name in ("ours", "titan"):
        model = load_weights(meta_model(), tmp_path / name)
        assert equal(expected, model.state_dict()), name
    with pytest.raises(ValueError, match="has no config.json"):
        consolidate(tmp_path / "titan", tmp_path / "out")
    out = consolidate(tmp_path / "titan", tmp_path / "out", config=tiny_config())
    assert equal(expected, MinimalLlama.from_pretrained(out).state_dict())
    shard = next((tmp_path / "titan").glob("*_0.distcp"))
    shard.write_bytes(shard.read_bytes()[:-2000])
    with pytest.raises(
        ValueError, match=rf"{shard.name} is missing or cut off; \S+ lies"
    ):
        load_weights(meta_model(), tmp_path / "titan")


def save_alone(state: dict, folder: Path) -> None:
    with warnings.catch_warnings():  # that it is one process
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, no_dist=True)


def test_nested_weights_are_read_and_of_two_kinds_neither(tmp_path):
    model = make_model("llama")
    state, own = model.state_dict(), ("lm_head",)
    means = {n: {"exp_avg": torch.zeros_like(t)} for n, t in state.items()}
    optim = {"state": means, "param_groups": [{"lr": torch.ones(())}]}
    titan = {**titan_state(model), "freqs_cis": torch.ones(4)}
    hugging = {n if n.startswith(own) else f"model.{n}": t for n, t in state.items()}
    nested = {
        "app": {"app": {"model": state, "optim": optim}},
        "titan": {"app": {"model": titan, "optim": optim, "step": 3}},
        "hf": {"state_dict": {"module": hugging}, "optimizer_state_dict": optim},
        "own word": {"net": {"_orig_mod": state}, "rng_state": torch.ones(2)},
    }
    for name, content in nested.items():
        save_alone(content, tmp_path / name)
        assert equal(state, load_weights(meta_model(), tmp_path / name).state_dict())
    save_alone({"app": {"model": state, "ema": state}}, tmp_path / "two")
    with pytest.raises(
        ValueError, match=r"two holds layers under app\.ema, app\.model"
    ):
        load_weights(meta_model(), tmp_path / "two")
    clash = {"model": {"model": state, "lm_head.weight": state["lm_head.weight"]}}
    save_alone(clash, tmp_path / "clash")
    with pytest.raises(
        ValueError, match=r"model\.(model\.)?lm_head\.weight and model\.\S*lm_head"
    ):
        load_weights(meta_model(), tmp_path / "clash")


class Bomb:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def test_a_hostile_index_is_refused_and_does_not_run(tmp_path):
    import builtins
    import os

    from torch.distributed.checkpoint.metadata import Metadata

    save_alone({"x": torch.ones(3)}, tmp_path / "d")
    index = tmp_path / "d" / ".metadata"
    good = pickle.loads(index.read_bytes())  # our own file, written above
    sign = tmp_path / "ran"
    hostile = [
        Bomb(os.system, f"touch {sign}"),
        Bomb(builtins.eval, f"open({str(sign)!r}, 'w')"),
        Bomb(builtins.__import__, "os"),
        Bomb(torch.load, "x"),
        Metadata({"x": Bomb(os.system, f"touch {sign}")}),
        {"no": "metadata"},
    ]
    for content in hostile:
        index.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match="is no index of torch.distributed"):
            load_weights(meta_model(), tmp_path / "d")
    assert not sign.exists()
    place = next(iter(good.storage_data.values()))
    place.relative_path = "../secret"
    index.write_bytes(pickle.dumps(good))
    with pytest.raises(
        ValueError, match=r"x lies in '\.\./secret'; it must lie beside"
    ):
        load_weights(meta_model(), tmp_path / "d")
    place.relative_path, place.transform_descriptors = "__0_0.distcp", ["zip"]
    index.write_bytes(pickle.dumps(good))
    with pytest.raises(ValueError, match=r"stored by \['zip'\]"):
        load_weights(meta_model(), tmp_path / "d")


def test_a_hostile_blob_is_refused(tmp_path):
    import os

    from minllama.dist_checkpoint.dcp_folder import open_dcp

    save_alone({"x": torch.ones(300)}, tmp_path / "d")
    file, sign = tmp_path / "d" / "__0_0.distcp", tmp_path / "ran"
    size = file.stat().st_size
    blob = pickle.dumps(Bomb(os.system, f"touch {sign}"))
    file.write_bytes(blob + b" " * (size - len(blob)))
    with pytest.raises(ValueError, match="__0_0.distcp: x cannot be read"):
        open_dcp(tmp_path / "d").read("x", (slice(0, 300),))
    assert not sign.exists()
