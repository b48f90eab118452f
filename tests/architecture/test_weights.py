"""Hugging Face folders in and out, compared with transformers."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from minllama.architecture import weights
from minllama.architecture.config import LlamaConfig, llama3_scaling
from minllama.architecture.families import Mistral, Qwen2, Qwen3
from minllama.architecture.model import MinimalLlama
from minllama.architecture.weights import load_pretrained, save_pretrained
from minllama.architecture.weights_config import read_config
from minllama.architecture.weights_meta import save_meta

SIZES = {
    "vocab_size": 65,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SCALED = {**llama3_scaling(8.0), "original_max_position_embeddings": 64}
THEIRS = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-scaled": ("Llama", {"rope_parameters": {**SCALED, "rope_theta": 5e5}}),
    "llama-wide-heads": ("Llama", {"head_dim": 12}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
}
OURS = {"Llama": MinimalLlama, "Mistral": Mistral, "Qwen2": Qwen2, "Qwen3": Qwen3}
TINY = LlamaConfig(
    vocab_size=65, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=56,
    bos_id=1, eos_ids=(2, 7), model_type="llama",
)  # fmt: skip


def their_model(kind):
    family, changes = THEIRS[kind]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for weight in model.parameters():  # norms and biases that are not 1 and 0
        nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.3)
    return model


@pytest.fixture(params=THEIRS)
def kind(request):
    return request.param


@pytest.fixture
def tokens():
    return torch.randint(0, 65, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return MinimalLlama(TINY)


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    config = {key: value for key, value in config.items() if value != "absent"}
    path.write_text(json.dumps(config))


def assert_same_weights(ours, theirs):
    theirs = theirs.state_dict()
    for name, weight in ours.state_dict().items():
        assert_close(weight, theirs[name], rtol=0, atol=0, msg=name)


# Reading


@pytest.mark.parametrize("shard_size", ["5GB", "12KB"])
@torch.no_grad()
def test_logits_equal_those_of_transformers(kind, shard_size, tokens, tmp_path):
    theirs = their_model(kind)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size != "5GB")

    model = MinimalLlama.from_pretrained(tmp_path)

    assert type(model) is OURS[THEIRS[kind][0]] and not model.training
    assert_close(model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError):  # the comparison sees a swapped head
        q = model.layers[0].self_attn.q_proj.weight
        q.copy_(q.roll(model.config.head_dim, 0))
        assert_close(model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("word", ["rope_type", "type"])
def test_old_and_new_spelling_give_one_config(kind, word, tmp_path):
    their_model(kind).save_pretrained(tmp_path)
    new = read_config(tmp_path)
    rope = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    rope[word] = rope.pop("rope_type")
    scaling = None if rope[word] == "default" else rope
    edit_config(
        tmp_path, rope_parameters="absent", rope_theta=theta, rope_scaling=scaling,
        dtype="absent", torch_dtype="float32",
    )  # fmt: skip
    assert read_config(tmp_path) == new
    assert (new.rope_scaling is not None) == (kind == "llama-scaled")


def test_what_old_files_leave_out_follows_from_the_rest(tiny, tmp_path):
    config = LlamaConfig(vocab_size=65, dim=32, n_layers=1, n_heads=4, ffn_dim=56)
    MinimalLlama(config).save_pretrained(tmp_path)
    absent = ("head_dim", "num_key_value_heads", "tie_word_embeddings", "rms_norm_eps")
    edit_config(tmp_path, **dict.fromkeys((*absent, "rope_parameters"), "absent"))
    read = MinimalLlama.from_pretrained(tmp_path).config
    assert (read.head_dim, read.n_kv_heads, read.tie_embeddings) == (8, 4, False)
    assert read.norm_eps == 1e-6  # what transformers takes


def test_the_end_tokens_of_generation_config_win(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    edit_config(tmp_path, eos_token_id=2)
    assert read_config(tmp_path).eos_ids == (2, 7)
    (tmp_path / "generation_config.json").unlink()
    assert read_config(tmp_path).eos_ids == (2,)
    edit_config(tmp_path, eos_token_id=[3, 4])
    assert read_config(tmp_path).eos_ids == (3, 4)


@pytest.mark.parametrize("split", [False, True])
def test_a_pickle_of_tensors_loads_as_safetensors_do(split, tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    if split:
        head = {"lm_head.weight": state.pop("lm_head.weight")}
        torch.save(head, tmp_path / "pytorch_model-00002-of-00002.bin")
        torch.save(state, tmp_path / "pytorch_model-00001-of-00002.bin")
        weight_map = dict.fromkeys(state, "pytorch_model-00001-of-00002.bin")
        weight_map |= dict.fromkeys(head, "pytorch_model-00002-of-00002.bin")
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same_weights(MinimalLlama.from_pretrained(tmp_path), tiny)


def test_tables_that_can_be_computed_are_passed_over(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, tmp_path / "model.safetensors")
    assert_same_weights(MinimalLlama.from_pretrained(tmp_path), tiny)


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2-tied"])
def test_a_tied_head_may_be_in_the_file_too_if_it_is_the_same(kind, tmp_path):
    their_model(kind).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in state
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    model = MinimalLlama.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.embed_tokens.weight

    state["lm_head.weight"][3, 5] += 1
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"tie_embeddings=True, but lm_head.weight is"):
        MinimalLlama.from_pretrained(tmp_path)


# Types and devices


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_without_a_dtype_the_file_is_loaded_bit_for_bit(dtype, tmp_path):
    model = Qwen3(LlamaConfig(**{**TINY.to_dict(), "model_type": "qwen3"})).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = MinimalLlama.from_pretrained(tmp_path)
    assert {weight.dtype for weight in loaded.parameters()} == {dtype}
    assert_same_weights(loaded, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_dtype_converts_every_weight(dtype, tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    loaded = MinimalLlama.from_pretrained(tmp_path, dtype=dtype)
    assert_same_weights(loaded, tiny.to(dtype))


def test_where_tensors_disagree_the_config_decides(tiny, tmp_path):
    tiny.bfloat16().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"].float()
    save_file(state, tmp_path / "model.safetensors")
    types = lambda: {
        p.dtype for p in MinimalLlama.from_pretrained(tmp_path).parameters()
    }
    assert types() == {torch.bfloat16}
    edit_config(tmp_path, dtype="absent", torch_dtype="absent")
    assert types() == {torch.float32}


def test_a_dtype_of_integers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dtype=torch.int8 is none of torch.float16"):
        MinimalLlama.from_pretrained(tmp_path, dtype=torch.int8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_weights_go_straight_to_the_device(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    loaded = MinimalLlama.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cuda")
    assert {weight.device.type for weight in loaded.parameters()} == {"cuda"}
    assert_same_weights(loaded.cpu(), tiny.bfloat16())


PEAK = """
import sys, torch
from pathlib import Path
import safetensors.torch, minllama.architecture.weights
from minllama.architecture.model import MinimalLlama

minllama.architecture.weights_files.MAPPED_BYTES = 1_000_000  # of a small model

def now(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(s.split()[1]) * 1024 for s in lines if s.startswith(key))

for folder, dtype in zip(sys.argv[1::2], sys.argv[2::2]):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = now("VmRSS")
    model = MinimalLlama.from_pretrained(folder, dtype=getattr(torch, dtype, None))
    print(now("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
    del model
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
def test_the_peak_of_memory_is_the_model_and_one_tensor(tmp_path):
    config = LlamaConfig(vocab_size=8000, dim=768, n_layers=6, n_heads=12, ffn_dim=2048)
    model = MinimalLlama(config)
    model.save_pretrained(tmp_path / "hf")  # 215 MB
    torch.save(
        {f"model.{k}": v for k, v in model.bfloat16().state_dict().items()},
        tmp_path / "half.bin",
    )
    (tmp_path / "pickle").mkdir()
    (tmp_path / "half.bin").rename(tmp_path / "pickle" / "pytorch_model.bin")
    config_text = (tmp_path / "hf" / "config.json").read_text()
    (tmp_path / "pickle" / "config.json").write_text(config_text)
    save_meta(model, tmp_path / "meta", shards=2)
    loads = ["hf", "None", "hf", "bfloat16", "pickle", "float32", "meta", "None"]
    loads[::2] = [str(tmp_path / folder) for folder in loads[::2]]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *loads],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # freed is freed at once
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    one_tensor = 8000 * 768 * 4
    rows = [[int(n) for n in line.split()] for line in done.stdout.splitlines()]
    assert len(rows) == 4
    for peak, own in rows:
        assert own <= peak <= own + one_tensor + 12_000_000, (
            rows
        )  # Python's own: a few MB
    shutil.rmtree(tmp_path)  # pytest would keep it


# Subclasses


class Louder(MinimalLlama):
    def embed(self, tokens):
        return 2 * super().embed(tokens)


class Numbers(MinimalLlama):
    """A head that reads a number off each token."""

    def __init__(self, config):
        super().__init__(config)
        self.value_head = nn.Linear(config.dim, 1)
        self.register_parameter("gain", nn.Parameter(torch.full((3,), 7.0)))


def test_a_subclass_stays_itself(tiny, tokens, tmp_path):
    tiny.save_pretrained(tmp_path)
    louder = Louder.from_pretrained(tmp_path)
    assert type(louder) is Louder
    assert_same_weights(louder, tiny)
    louder.save_pretrained(tmp_path / "again")
    assert type(Louder.from_pretrained(tmp_path / "again")) is Louder
    assert type(MinimalLlama.from_pretrained(tmp_path / "again")) is MinimalLlama


def test_every_kind_of_model_comes_back_as_it_was(any_model, tmp_path):
    any_model.save_pretrained(tmp_path)
    loaded = type(any_model).from_pretrained(tmp_path)
    assert type(loaded) is type(any_model)
    assert_same_weights(loaded, any_model.cpu())


def test_a_subclass_of_another_family_is_refused(tmp_path):
    Qwen2(LlamaConfig(**{**TINY.to_dict(), "model_type": "qwen2"})).save_pretrained(
        tmp_path
    )
    with pytest.raises(
        ValueError, match="model_type='qwen2' is not what Louder builds"
    ):
        Louder.from_pretrained(tmp_path)


def test_parameters_that_a_subclass_adds_are_named_or_refused(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"3 missing:(?s:.)*value_head.weight \(1, 32\)"
    ):
        load_pretrained(Numbers, tmp_path)
    with pytest.raises(ValueError, match=r"1 missing:\s+gain \(3,\)"):
        load_pretrained(Numbers, tmp_path, new=("value_head.*",))
    with pytest.raises(
        ValueError, match=r"new='value_hat.\*' fits no parameter of Num"
    ):
        load_pretrained(Numbers, tmp_path, new=("value_hat.*",))


def test_new_parameters_keep_the_values_of_their_constructor(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    new = ("value_head.*", "gain")
    model = load_pretrained(Numbers, tmp_path, dtype=torch.bfloat16, new=new)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    assert model.gain.tolist() == [7, 7, 7]
    assert 0 < model.value_head.weight.abs().max() <= 32**-0.5
    for name, weight in tiny.bfloat16().state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)

    model.save_pretrained(tmp_path / "trained")  # and now the file holds them
    again = Numbers.from_pretrained(tmp_path / "trained")
    assert_same_weights(again, model)


def test_a_table_outside_of_the_state_dict_is_refused(tiny, tmp_path):
    class Table(MinimalLlama):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("table", torch.ones(3), persistent=False)

    tiny.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Table keeps table outside of its state dict"):
        Table.from_pretrained(tmp_path)


def test_frozen_parameters_stay_frozen_and_buffers_load(tmp_path):
    class Frozen(MinimalLlama):
        def __init__(self, config):
            super().__init__(config)
            self.norm.requires_grad_(False)
            self.register_buffer("count", torch.ones(3))

    model = Frozen(TINY)
    model.count.fill_(5)
    model.save_pretrained(tmp_path)
    loaded = Frozen.from_pretrained(tmp_path)
    assert not loaded.norm.weight.requires_grad and loaded.lm_head.weight.requires_grad
    assert loaded.count.tolist() == [5, 5, 5]


def test_building_shapes_draws_no_random_numbers(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    MinimalLlama.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


# Writing


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 12_000])
@torch.no_grad()
def test_transformers_reads_what_is_saved(kind, shard_bytes, tokens, tmp_path):
    their_model(kind).save_pretrained(tmp_path / "theirs")
    model = MinimalLlama.from_pretrained(tmp_path / "theirs")
    save_pretrained(model, tmp_path / "ours", shard_bytes=shard_bytes)

    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert type(theirs).__name__ == f"{THEIRS[kind][0]}ForCausalLM"
    assert not any(report.values()), report
    assert_close(model(tokens), theirs.eval()(tokens).logits, rtol=1e-5, atol=1e-5)
    assert read_config(tmp_path / "ours") == model.config
    assert_same_weights(MinimalLlama.from_pretrained(tmp_path / "ours"), model)


def test_types_and_end_tokens_reach_transformers(tiny, tmp_path):
    tiny.bfloat16().save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16
    assert theirs.generation_config.eos_token_id == [2, 7]
    assert theirs.config.bos_token_id == 1


def test_shards_are_of_the_size_asked_for_and_listed_in_the_index(tiny, tmp_path):
    save_pretrained(tiny, tmp_path, shard_bytes=12_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in tmp_path.glob("*.safetensors")}
    assert len(files) > 3
    assert all(
        sum(t.nbytes for t in file.values()) <= 12_000 for file in files.values()
    )
    held = {name: file for file, state in files.items() for name in state}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in tiny.parameters())


def test_a_tied_head_is_written_once(tmp_path):
    model = MinimalLlama(LlamaConfig(**{**TINY.to_dict(), "tie_embeddings": True}))
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = MinimalLlama.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.embed_tokens.weight
    assert len(list(loaded.parameters())) == len(list(model.parameters()))

    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match="tie_embeddings=True, but lm_head and embed"):
        model.save_pretrained(tmp_path)


def test_odd_strides_and_shared_storages_are_written_out(tiny, tmp_path):
    first, second = tiny.layers[0], tiny.layers[1]
    first.mlp.up_proj.weight = nn.Parameter(torch.randn(32, 56).T)
    both = torch.randn(112, 32)
    first.mlp.gate_proj.weight = nn.Parameter(both[:56])
    second.mlp.gate_proj.weight = nn.Parameter(both[56:])
    second.self_attn = first.self_attn
    tiny.save_pretrained(tmp_path)
    assert_same_weights(MinimalLlama.from_pretrained(tmp_path), tiny)


def test_saving_over_a_model_leaves_nothing_of_it(tiny, tmp_path):
    save_pretrained(tiny, tmp_path, shard_bytes=12_000)
    (tmp_path / "tokenizer.json").write_text("{}")
    tiny.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1  # readable by whoever reads the rest


@pytest.mark.parametrize("stop_at", ["writing", "model.safetensors", "config.json"])
def test_an_interrupted_save_leaves_the_old_model_or_none(
    stop_at, tiny, tmp_path, monkeypatch
):
    tiny.save_pretrained(tmp_path)
    path_class = type(tmp_path)
    rename = path_class.replace

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    def interrupted_rename(self, target):
        return interrupted() if self.name == stop_at else rename(self, target)

    if stop_at == "writing":
        monkeypatch.setattr("minllama.architecture.weights_save.save_file", interrupted)
    monkeypatch.setattr(path_class, "replace", interrupted_rename)
    with pytest.raises(KeyboardInterrupt):
        Louder(TINY).save_pretrained(tmp_path)
    assert not list(tmp_path.glob(".saving-*"))
    if stop_at == "writing":
        assert_same_weights(MinimalLlama.from_pretrained(tmp_path), tiny)
    else:
        with pytest.raises(ValueError, match="neither config.json nor params.json"):
            MinimalLlama.from_pretrained(tmp_path)


class Wrapped(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base


def test_a_model_whose_layers_were_rewritten_is_refused(tiny, tmp_path):
    layer = tiny.layers[0].self_attn
    layer.q_proj = Wrapped(layer.q_proj)
    with pytest.raises(ValueError, match=r"2 weights are not(?s:.)*q_proj.base.weight"):
        tiny.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_here_are_refused(tiny, tmp_path):
    with torch.device("meta"):
        hollow = MinimalLlama(TINY)
    with pytest.raises(ValueError, match="embed_tokens.weight is a meta tensor"):
        hollow.save_pretrained(tmp_path)


def test_an_architecture_that_transformers_lacks_is_refused(tmp_path):
    class Other(MinimalLlama):
        model_type = "other"

    model = Other(LlamaConfig(**{**TINY.to_dict(), "model_type": None}))
    with pytest.raises(
        ValueError, match="model_type='other' is none of llama, mistral"
    ):
        model.save_pretrained(tmp_path)


# Names


def test_a_shipped_name_needs_no_path(tiny, tmp_path, monkeypatch):
    tiny.save_pretrained(tmp_path / "stories-of-a-test")
    (tmp_path / "texts").mkdir()
    monkeypatch.setattr(weights, "ASSETS", tmp_path)
    assert weights.shipped_names() == ["stories-of-a-test"]
    assert_same_weights(MinimalLlama.from_pretrained("stories-of-a-test"), tiny)
    tiny.half().save_pretrained(tmp_path / "stories-of-a-test")
    names = ("stories-of-a-test", tmp_path / "stories-of-a-test")
    dtypes = [MinimalLlama.from_pretrained(name).norm.weight.dtype for name in names]
    assert dtypes == [torch.float32, torch.float16]  # shipped in half to stay small
    with pytest.raises(
        ValueError, match=r"'storys' is no folder. Give a shipped name \(st"
    ):
        MinimalLlama.from_pretrained("storys")


def test_a_subclass_that_needs_more_than_its_config_is_told_so(tiny, tmp_path):
    class Choosy(MinimalLlama):
        def __init__(self, config, colour):
            super().__init__(config)

    tiny.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"Choosy\(config\) failed .*TypeError: .*colour"
    ):
        Choosy.from_pretrained(tmp_path)
