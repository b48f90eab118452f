"""The registry holds the numbers of the real models; a wrong number is refused."""

import copy
import dataclasses
import json
import math
import pickle

import pytest
import torch
import transformers

from minllama.architecture.config import (
    REGISTRY,
    LlamaConfig,
    check_rope_scaling,
    llama3_scaling,
)
from minllama.architecture.model import MinimalLlama
from tests.conftest import SCALING, tiny_config

PUBLISHED = {  # parameters, as the safetensors files on Hugging Face count them
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}

# What no count of parameters shows: norm_eps, rope_theta, factor, tokens, tie.
CONSTANTS = {
    "llama-2-7b": (1e-5, 1e4, None, 4096, False),
    "llama-2-13b": (1e-5, 1e4, None, 4096, False),
    "llama-2-70b": (1e-5, 1e4, None, 4096, False),
    "llama-3-8b": (1e-5, 5e5, None, 8192, False),
    "llama-3-70b": (1e-5, 5e5, None, 8192, False),
    "llama-3.1-8b": (1e-5, 5e5, 8.0, 131072, False),
    "llama-3.1-70b": (1e-5, 5e5, 8.0, 131072, False),
    "llama-3.1-405b": (1e-5, 5e5, 8.0, 131072, False),
    "llama-3.2-1b": (1e-5, 5e5, 32.0, 131072, True),
    "llama-3.2-3b": (1e-5, 5e5, 32.0, 131072, True),
    "llama-3.3-70b": (1e-5, 5e5, 8.0, 131072, False),
    "mistral-7b-v0.1": (1e-5, 1e4, None, 32768, False),
    "mistral-7b-v0.2": (1e-5, 1e6, None, 32768, False),
    "mistral-7b-v0.3": (1e-5, 1e6, None, 32768, False),
    "qwen2.5-0.5b": (1e-6, 1e6, None, 32768, True),
    "qwen2.5-1.5b": (1e-6, 1e6, None, 131072, True),
    "qwen2.5-3b": (1e-6, 1e6, None, 32768, True),
    "qwen2.5-7b": (1e-6, 1e6, None, 131072, False),
    "qwen2.5-14b": (1e-5, 1e6, None, 131072, False),
    "qwen2.5-32b": (1e-5, 1e6, None, 131072, False),
    "qwen2.5-72b": (1e-5, 1e6, None, 131072, False),
    "qwen3-0.6b": (1e-6, 1e6, None, 40960, True),
    "qwen3-1.7b": (1e-6, 1e6, None, 40960, True),
    "qwen3-4b": (1e-6, 1e6, None, 40960, True),
    "qwen3-8b": (1e-6, 1e6, None, 40960, False),
    "qwen3-14b": (1e-6, 1e6, None, 40960, False),
    "qwen3-32b": (1e-6, 1e6, None, 40960, False),
}

TOKENS = {  # by family: begin of text, and where generation stops
    "llama-2": (1, {2}),
    "llama-3-": (128000, {128001, 128009}),
    "llama-3.": (128000, {128001, 128008, 128009}),
    "mistral": (1, {2}),
    "qwen": (151643, {151643, 151645}),
}


def on_meta(config: LlamaConfig) -> MinimalLlama:
    with torch.device("meta"):
        return MinimalLlama.from_config(config)


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ---- The registry


def test_every_name_is_checked_here():
    assert REGISTRY.keys() == PUBLISHED.keys() == CONSTANTS.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name):
    assert count(on_meta(LlamaConfig.from_name(name))) == PUBLISHED[name]


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_are_those_of_the_config_files(name):
    c = LlamaConfig.from_name(name)
    factor = c.rope_scaling and c.rope_scaling["factor"]
    got = (c.norm_eps, c.rope_theta, factor, c.max_seq_len, c.tie_embeddings)
    assert got == CONSTANTS[name]
    assert c.rope_scaling in (None, llama3_scaling(factor))
    assert c.sliding_window == (4096 if name == "mistral-7b-v0.1" else None)


@pytest.mark.parametrize("name", REGISTRY)
def test_special_tokens_are_those_of_the_family(name):
    config = LlamaConfig.from_name(name)
    [expected] = [tokens for start, tokens in TOKENS.items() if name.startswith(start)]
    assert (config.bos_id, set(config.eos_ids)) == expected


@pytest.mark.parametrize(
    "name",
    ["llama-2-7b", "llama-3.2-3b", "mistral-7b-v0.3", "qwen2.5-0.5b", "qwen3-4b"],
)
def test_shapes_are_those_that_transformers_builds(name):
    c = LlamaConfig.from_name(name)
    settings = transformers.AutoConfig.for_model(
        c.model_type, vocab_size=c.vocab_size, hidden_size=c.dim,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim,
        intermediate_size=c.ffn_dim, tie_word_embeddings=c.tie_embeddings,
    )  # fmt: skip
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(settings)
    ours = on_meta(c)
    assert count(theirs) == count(ours) == PUBLISHED[name]
    shapes = {k.removeprefix("model."): w.shape for k, w in theirs.state_dict().items()}
    assert {k: w.shape for k, w in ours.state_dict().items()} == shapes


def test_an_unknown_name_lists_those_that_exist():
    with pytest.raises(ValueError, match="'llama-3-9b'.*llama-2-13b, .*qwen3-8b"):
        LlamaConfig.from_name("llama-3-9b")


@pytest.mark.parametrize("name", ["llama", "LLAMA-3-8B", "llama-3-8b ", "8b", ""])
def test_names_are_exact(name):
    with pytest.raises(ValueError, match=f"no config is named '{name}'"):
        LlamaConfig.from_name(name)


# ---- A config


def test_what_is_left_out_follows_from_the_rest():
    config = LlamaConfig(vocab_size=10, dim=64, n_layers=1, n_heads=4)
    assert (config.n_kv_heads, config.head_dim, config.ffn_dim) == (4, 16, 192)


@pytest.mark.parametrize("dim", [8, 64, 96, 288, 4096])
def test_the_usual_feed_forward_has_eight_thirds_of_the_width(dim):
    width = LlamaConfig(vocab_size=10, dim=dim, n_layers=1, n_heads=1).ffn_dim
    assert width % 32 == 0 and 0 <= width - dim * 8 / 3 < 32


def test_heads_need_not_fill_the_width():
    assert tiny_config(dim=30, n_heads=4, head_dim=12).head_dim == 12


def test_a_config_cannot_be_changed_but_replaced():
    config = tiny_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dim = 64
    assert dataclasses.replace(config, dim=64).head_dim == config.head_dim


def test_a_config_survives_its_dict_json_and_copies():
    config = tiny_config(rope_scaling=SCALING, eos_ids=[3, 5], bos_id=1)
    assert config.eos_ids == (3, 5)
    assert LlamaConfig(**config.to_dict()) == config
    assert LlamaConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


# ---- Refusals, each with the value that is wrong

WHOLE = ["vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim",
         "ffn_dim", "max_seq_len", "sliding_window"]  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [0, -4, 4.0, "4", True])
def test_sizes_are_whole_and_positive(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} must be a whole number"):
        tiny_config(**{name: value})


@pytest.mark.parametrize("name", ["vocab_size", "dim", "n_layers", "n_heads"])
def test_sizes_that_follow_from_nothing_must_be_given(name):
    with pytest.raises(ValueError, match=f"{name}=None must be a whole number"):
        tiny_config(**{name: None})


def test_heads_that_do_not_divide_the_width_need_a_head_dim():
    with pytest.raises(ValueError, match="dim=33 is no multiple of n_heads=4; state"):
        tiny_config(dim=33)


def test_query_heads_are_shared_out_evenly():
    with pytest.raises(ValueError, match="n_heads=4 is no multiple of n_kv_heads=3"):
        tiny_config(n_kv_heads=3)


def test_an_odd_head_has_no_pairs():
    with pytest.raises(ValueError, match="head_dim=7 is odd"):
        tiny_config(head_dim=7)


@pytest.mark.parametrize("name", ["norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, "1e-5", None])
def test_constants_are_numbers_above_zero(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} must be a number above 0"):
        tiny_config(**{name: value})


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"bos_id": 97}, "97"),
        ({"bos_id": -1}, "-1"),
        ({"eos_ids": (3, 200)}, "200"),
        ({"eos_ids": ("</s>",)}, "'</s>'"),
        ({"eos_ids": (1.0,)}, "1.0"),
    ],
)
def test_special_tokens_are_tokens(changes, value):
    with pytest.raises(ValueError, match=f"hold {value}, which is no token .*size=97"):
        tiny_config(**changes)


@pytest.mark.parametrize("kind", ["yarn", "linear", "default", None])
def test_a_scaling_that_the_hub_cannot_build_is_named(kind):
    with pytest.raises(ValueError, match=f"rope_type={kind!r}; the hub knows llama3"):
        tiny_config(rope_scaling={**SCALING, "rope_type": kind})


@pytest.mark.parametrize("key", ["factor", "low_freq_factor", "high_freq_factor"])
@pytest.mark.parametrize("value", [0, -8.0, math.nan, math.inf, "8", None])
def test_factors_of_a_scaling_are_numbers_above_zero(key, value):
    with pytest.raises(ValueError, match=f"{key}={value!r}; llama3 scaling needs"):
        check_rope_scaling({**SCALING, key: value})


@pytest.mark.parametrize("value", [0, 8192.0, None])
def test_the_original_context_is_a_number_of_tokens(value):
    key = "original_max_position_embeddings"
    with pytest.raises(ValueError, match=f"{key}={value!r} must be a whole number"):
        check_rope_scaling({**SCALING, key: value})


@pytest.mark.parametrize("key", [key for key in SCALING if key != "rope_type"])
def test_a_scaling_must_be_complete(key):
    scaling = {name: value for name, value in SCALING.items() if name != key}
    with pytest.raises(ValueError, match=f"{key}=None"):
        check_rope_scaling(scaling)


@pytest.mark.parametrize("high", [1.0, 0.5])
def test_high_frequencies_lie_above_low_ones(high):
    with pytest.raises(
        ValueError, match=f"high_freq_factor={high} not above low.*=1.0"
    ):
        check_rope_scaling({**SCALING, "high_freq_factor": high})


def test_no_scaling_needs_no_check():
    assert check_rope_scaling(None) is None


def test_a_misspelled_field_is_no_field():
    with pytest.raises(TypeError, match="n_head"):
        tiny_config(n_head=4)


def test_changing_a_scaling_changes_no_other_config():
    config = LlamaConfig.from_name("llama-3.1-8b")
    config.rope_scaling["factor"] = 4.0
    config.to_dict()["rope_scaling"]["factor"] = 5.0
    assert LlamaConfig.from_name("llama-3.1-8b").rope_scaling["factor"] == 8.0
    assert config.rope_scaling["factor"] == 4.0 and hash(config) is not None


def test_a_single_end_id_is_taken_as_one():
    assert tiny_config(eos_ids=2).eos_ids == (2,)


def test_a_scaling_that_is_no_dict_is_refused():
    with pytest.raises(ValueError, match="rope_scaling=8.0 must be None or a dict"):
        tiny_config(rope_scaling=8.0)
