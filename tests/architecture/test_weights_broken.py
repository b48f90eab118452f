"""Folders that are incomplete, damaged or hostile: each is refused with a reason."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from minllama.architecture.config import LlamaConfig
from minllama.architecture.model import MinimalLlama
from minllama.architecture.weights import save_pretrained
from tests.conftest import make_model, tiny_config

TINY = tiny_config(model_type="llama")
ABSENT = object()


@pytest.fixture
def folder(tmp_path):
    MinimalLlama(TINY).save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    config = {key: value for key, value in config.items() if value is not ABSENT}
    path.write_text(json.dumps(config))


def edit_weights(folder, **changes):
    path = folder / "model.safetensors"
    state = {**load_file(path), **{k.replace("__", "."): v for k, v in changes.items()}}
    save_file({k: v for k, v in state.items() if v is not ABSENT}, path)


def refused(folder, said):
    with pytest.raises(ValueError, match=said):
        MinimalLlama.from_pretrained(folder)


# Names and folders


def test_a_name_that_is_no_folder_is_refused_with_what_a_folder_holds(tmp_path):
    refused(
        "meta-llama/Llama-3.2-1B", r"'meta-llama/Llama-3.2-1B' is no folder. Give a"
    )
    refused(
        "meta-llama/Llama-3.2-1B", "model.safetensors, or with params.json and cons"
    )
    refused(tmp_path, r"neither config.json nor params.json \(it has nothing\)")
    (tmp_path / "a.txt").write_text("")
    refused(tmp_path, r"neither config.json nor params.json \(it has a.txt\)")
    refused(tmp_path / "a.txt", "a.txt is a file; name the folder")


def test_gguf_is_refused_by_name(folder):
    (folder / "model-q4.gguf").write_bytes(b"GGUF")
    MinimalLlama.from_pretrained(folder)  # its safetensors lie beside it
    (folder / "model.safetensors").unlink()
    refused(folder, "holds GGUF weights, quantized for llama.cpp; the chapter quantize")
    refused(folder / "model-q4.gguf", "model-q4.gguf holds GGUF weights")


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "has a config.json and no weights; model.safetensors")


# Keys


def test_every_wrong_key_is_in_one_message(folder):
    edit_weights(
        folder,
        model__norm__weight=ABSENT,
        model__layers__1__mlp__up_proj__weight=ABSENT,
        model__layers__0__mlp__up_proj__weight=torch.ones(7, 32),
        adapter=torch.ones(3),
    )
    with pytest.raises(ValueError) as caught:
        MinimalLlama.from_pretrained(folder)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[1:-1] == [
        "2 missing:",
        "layers.1.mlp.up_proj.weight (48, 32)",
        "norm.weight (32,)",
        "1 extra:",
        "adapter (3,)",
        "1 misshapen:",
        "layers.0.mlp.up_proj.weight (7, 32), where (48, 32) is needed",
    ]


def test_of_many_wrong_keys_ten_are_named_and_all_counted(folder):
    edit_weights(folder, **{f"x{i:02}": torch.ones(1) for i in range(13)})
    refused(folder, r"13 extra:\s+x00 \(1,\)(?s:.)*x09 \(1,\)\s+… and 3 more")


def test_a_key_in_two_files_is_refused(tmp_path):
    save_pretrained(MinimalLlama(TINY), tmp_path, shard_bytes=12_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    save_file({**load_file(files[0]), **load_file(files[1])}, files[0])
    refused(tmp_path, "00002-of-.* holds .*, which model-00001-of-.* holds, too")


# config.json


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "config.json is no JSON"),
        ("", "config.json is no JSON"),
        ("[1]", "config.json holds a JSON list; it must be an object"),
        ("[" * 200_000, "config.json is no JSON"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "config.json is no JSON"),
        ("\xff\xfe", "config.json is no JSON"),
        (
            " " * 17_000_000,
            "config.json has 17,000,000 bytes; more than 16,000,000 is no",
        ),
        ("version https://git-lfs.github.com/spec/v1", "pointer .* run `git lfs pull`"),
    ],
    ids=range(8),
)
def test_a_config_that_cannot_be_read_is_refused(text, said, folder):
    (folder / "config.json").write_text(text, encoding="latin-1")
    refused(folder, said)


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
BY_LAYER = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"hidden_size": ABSENT, "vocab_size": ABSENT},
            "lacks vocab_size, hidden_size;",
        ),
        ({"intermediate_size": None}, "config.json lacks intermediate_size;"),
        (
            {"model_type": ABSENT},
            "config.json: model_type=None is none of llama, mistral",
        ),
        (
            {"model_type": "gemma2"},
            "model_type='gemma2' is none of llama, mistral, qwen2",
        ),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\] is none of"),
        ({"hidden_size": -32}, r"dim=-32 must be a whole.*\(There dim is hidden_size"),
        ({"hidden_size": "32"}, "dim='32' must be a whole number"),
        ({"hidden_size": 32.5}, "dim=32.5 must be a whole number"),
        ({"num_attention_heads": 3}, "n_heads=3 is no multiple of n_kv_heads=2"),
        (
            {"head_dim": None, "num_attention_heads": 6},
            "dim=32 is no multiple of n_heads=6",
        ),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"num_hidden_layers": 0}, "n_layers=0 must .*n_layers is num_hidden_layers"),
        (
            {"num_hidden_layers": 10**9},
            "n_layers=1000000000 but the files hold 21 tensors",
        ),
        (
            {"vocab_size": 10**18},
            "no tensor can be as large as vocab_size=1000000000000",
        ),
        ({"intermediate_size": 10**30}, "no tensor can be as large as .*ffn_dim=10000"),
        (
            {"vocab_size": 10**9},
            r"embed_tokens.weight \(97, 32\), where \(1000000000, 32",
        ),
        ({"rms_norm_eps": float("nan")}, "norm_eps=nan must be a number above 0"),
        (
            {"tie_word_embeddings": "no"},
            "tie_word_embeddings='no' must be true or false",
        ),
        ({"eos_token_id": [2, 97]}, "bos_id/eos_ids hold 97, which is no token"),
        ({"eos_token_id": {"a": 1}}, r"bos_id/eos_ids hold \{'a': 1\}"),
        (
            {"attention_bias": True},
            "attention_bias=True; no layer of llama here has that",
        ),
        ({"mlp_bias": True}, "mlp_bias=True; no layer of llama here has that bias"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; the feed-forward has 'silu'"),
        ({"rope_parameters": YARN}, "rope_type='yarn'; the hub knows llama3"),
        ({"rope_parameters": BY_LAYER}, "differ by layer; the model has one rope"),
        ({"rope_parameters": "x"}, "rope_parameters='x' must be an object"),
        ({"rope_scaling": [1]}, r"rope_scaling=\[1\] must be an object"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta='x' must be a number"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_scaling has factor=None"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5; rope turns whole"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "names the method 'gptq'; .*The chapter quantize",
        ),
        ({"quantization_config": True}, "quantization_config names the method None"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(changes, said, folder):
    edit_config(folder, **changes)
    if "eos_token_id" in changes:
        (folder / "generation_config.json").unlink()
    refused(folder, said)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True, "sliding_window": 8},
        {"layer_types": ["full_attention", "sliding_attention"]},
    ],
)
def test_a_qwen_with_windows_is_refused(family, changes, tmp_path):
    make_model(family).save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    refused(
        tmp_path, f"use_sliding_window=true; {family} is built here without windows"
    )


def test_a_window_that_qwen_states_and_does_not_use_is_passed_over(tmp_path):
    make_model("qwen2").save_pretrained(tmp_path)
    edit_config(tmp_path, sliding_window=131072, max_window_layers=1)
    assert MinimalLlama.from_pretrained(tmp_path).config.sliding_window is None


def test_a_broken_generation_config_is_refused(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, "x"]}')
    refused(folder, "bos_id/eos_ids hold 'x'")
    (folder / "generation_config.json").write_text("{")
    refused(folder, "generation_config.json is no JSON")


# The index of parts


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({}, "index.json names 0 parts, .* no part at all"),
        ({"weight_map": []}, "index.json names 0 parts"),
        (
            {"weight_map": {"a": "../model.safetensors"}},
            "names '../model.safetensors'; pa",
        ),
        ({"weight_map": {"a": "/etc/passwd"}}, "weight_map names '/etc/passwd'"),
        ({"weight_map": {"a": ["b"]}}, r"weight_map names \['b'\]"),
        (
            {"weight_map": {"a": "b", "c": "d"}},
            "2 parts, of which 2 are not there: b, d",
        ),
    ],
)
def test_an_index_that_leads_nowhere_is_refused(index, said, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, said)


def test_a_missing_part_is_named(tmp_path):
    save_pretrained(MinimalLlama(TINY), tmp_path, shard_bytes=12_000)
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    refused(tmp_path, f"of which 1 are not there: {lost.name}. Download them")


# safetensors


def header(entries, data=b"", length=None):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype, shape, start, end):
    return {
        "norm.weight": {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    }


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08\0\0",
        header({}, length=2**63),
        header({}, length=99_000_000),
        struct.pack("<Q", 8) + b"no json!",
        header(entry("F32", [32], 0, 128), b"\0" * 100),
        header(entry("F32", [32], 0, 10**15), b"\0" * 128),
        header(entry("F32", [32], 64, 192), b"\0" * 192),
        header(entry("F32", [2**62, 2**62], 0, 128), b"\0" * 128),
        header(entry("F32", [-1], 0, 128), b"\0" * 128),
        header(entry("X17", [32], 0, 128), b"\0" * 128),
        header(entry("F32", [32], 0, 128), b"\0" * 129),
    ],
    ids=[
        "empty", "short", "huge length", "length beyond the file", "no json",
        "cut off", "range beyond the file", "hole", "overflow", "negative", "no dtype",
        "rest",
    ],
)  # fmt: skip
def test_a_damaged_safetensors_file_is_refused(content, folder):
    (folder / "model.safetensors").write_bytes(content)
    refused(
        folder, r"model.safetensors is no whole safetensors file \(.*Download it again"
    )


@pytest.mark.parametrize("keep", [100, 3000, -1])
def test_a_truncated_safetensors_file_is_refused(keep, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "model.safetensors is no whole safetensors file")


def test_a_git_lfs_pointer_is_recognized(folder):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (folder / "model.safetensors").write_bytes(pointer)
    refused(folder, "It is a Git LFS pointer and not the file: run `git lfs pull`")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn])
def test_weights_of_another_type_are_refused(dtype, folder):
    edit_weights(folder, model__norm__weight=torch.ones(32).to(dtype))
    refused(folder, "model.safetensors holds model.norm.weight as .*; weights are F16")


def test_a_folder_whose_weights_are_a_bad_pickle_is_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n.")
    refused(folder, "pytorch_model.bin is no whole PyTorch file of tensors only")
    refused(folder / "pytorch_model.bin", "is a pickle of PyTorch, no file of llama2.c")


def test_files_of_no_tensors_are_refused(folder):
    save_file({}, folder / "model.safetensors")
    refused(folder, "n_layers=2 but the files hold 0 tensors")


def test_sizes_are_refused_before_anything_is_built(folder):
    class Builds(MinimalLlama):
        def __init__(self, config: LlamaConfig) -> None:
            raise AssertionError("built")

    edit_config(folder, num_hidden_layers=10**9)
    with pytest.raises(ValueError, match="n_layers=1000000000"):
        Builds.from_pretrained(folder)
