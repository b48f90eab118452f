"""Adapters travel: what the PEFT library wrote loads here, and ours loads there."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from minllama.architecture import MinimalLlama
from minllama.peft import (
    add_bitfit,
    add_houlsby,
    add_lora,
    add_vera,
    load_adapter,
    merge,
    mix_adapters,
    save_adapter,
    set_adapter,
)
from tests.conftest import make_model, random_tokens, tiny_config
from tests.peft.library import (
    METHODS,
    load_ours,
    load_theirs,
    make_base,
    our_logits,
    quiet_add,
    quiet_load,
    quiet_save,
    their_logits,
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def base(family, tied):
        if (family, tied) not in made:
            folder = tmp_path_factory.mktemp("base")
            made[family, tied] = make_base(folder, family, tied)
        return made[family, tied]

    return base


def shake(model) -> None:
    """Away from birth, where half of all mistakes would not show."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in dict.fromkeys(model.parameters()):
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape))


def some_tokens() -> torch.Tensor:
    tokens = torch.randint(0, 97, (3, 17))
    tokens[:, :2] = torch.tensor([3, 96])  # the rows that some methods train
    return tokens


def off(ours, theirs) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("name", METHODS)
def test_their_adapter_loads_here(name, bases, tmp_path):
    method, tokens = METHODS[name], some_tokens()
    base = bases(method.family, method.tied)
    theirs = quiet_add(load_theirs(base, method.family), method.theirs()).eval()
    shake(theirs)
    quiet_save(theirs, tmp_path)
    ours = load_adapter(load_ours(base), tmp_path)
    with torch.no_grad():
        before = our_logits(load_ours(base), tokens)
        expected = their_logits(theirs, tokens, method.prompt)
        assert off(our_logits(ours, tokens, method.prompt), expected) < 1e-5
        assert off(before, expected) > 1e-2  # without the adapter it is another model


@pytest.mark.parametrize("name", METHODS)
def test_our_adapter_loads_there(name, bases, tmp_path):
    method, tokens = METHODS[name], some_tokens()
    base = bases(method.family, method.tied)
    ours = method.ours(load_ours(base))
    shake(ours)
    save_adapter(ours, tmp_path)
    theirs = quiet_load(load_theirs(base, method.family), tmp_path)
    again = load_adapter(load_ours(base), tmp_path)
    with torch.no_grad():
        expected = our_logits(ours, tokens, method.prompt)
        assert off(their_logits(theirs, tokens, method.prompt), expected) < 1e-5
        assert off(our_logits(again, tokens, method.prompt), expected) < 1e-6


OURS_ALONE = {"bitfit": lambda m: add_bitfit(m, "all-linear"), "houlsby": add_houlsby}


@pytest.mark.parametrize("name", OURS_ALONE)
def test_methods_of_ours_alone_come_back(name, tmp_path):
    base, tokens = make_model("qwen2"), random_tokens(2, 9)
    model = OURS_ALONE[name](copy.deepcopy(base))
    shake(model)
    save_adapter(model, tmp_path)
    assert off(load_adapter(base, tmp_path)(tokens), model(tokens)) < 1e-6


def test_the_scale_of_a_file_matters(bases, tmp_path):
    """A planted mistake: the same tensors under another alpha are another adapter."""
    base, tokens = bases("llama", False), some_tokens()
    ours = METHODS["rslora"].ours(load_ours(base))
    shake(ours)
    save_adapter(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for spoiled in ({"lora_alpha": 9}, {"use_rslora": False}):
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps({**config, **spoiled}))
        theirs = quiet_load(load_theirs(base), tmp_path)
        with torch.no_grad():
            assert off(their_logits(theirs, tokens), ours(tokens)) > 1e-3


def test_names_are_as_short_as_they_can_be(tmp_path):
    model = add_lora(make_model("llama"), 4, 8, ["q_proj"], rank_pattern={"q_proj": 2})
    save_adapter(model, tmp_path / "all", base_model="some/model")
    config = json.loads((tmp_path / "all/adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"]
    assert config["base_model_name_or_path"] == "some/model"
    some = add_lora(make_model("llama"), targets=r"layers\.1\..*q_proj")
    save_adapter(some, tmp_path / "some")
    config = json.loads((tmp_path / "some/adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]


def test_one_of_several_is_saved_and_loading_switches(tmp_path):
    model, tokens = make_model("llama"), random_tokens(2, 9)
    for name in ("anna", "bob"):
        shake(add_lora(model, name=name))
    set_adapter(model, "bob")
    bob = model(tokens)
    with pytest.raises(ValueError, match=r"2 adapters \(anna, bob\)"):
        save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="adapter 'eve' is none of anna, bob"):
        save_adapter(model, tmp_path, "eve")
    save_adapter(model, tmp_path, "bob")
    set_adapter(model, ("anna", "bob"))
    load_adapter(model, tmp_path, "bob again")
    assert_close(model(tokens), bob)


def spoil(folder, config=None, tensors=None) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
    if tensors is not None:
        path = folder / "adapter_model.safetensors"
        save_file(tensors(load_file(path)), path)


EMBEDDED = "base_model.model.model.embed_tokens.base_layer.weight"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
SPOILED = {
    "peft_type='LOHA' is not built": dict(config={"peft_type": "LOHA"}),
    "use_qalora=True is not built": dict(config={"use_qalora": True}),
    "init_lora_weights='loftq' changed": dict(config={"init_lora_weights": "loftq"}),
    "lora_B.weight is missing": dict(
        tensors=lambda t: {k: v for k, v in t.items() if k != f"{Q0}.lora_B.weight"}
    ),
    r"has shape \(3, 4\) in the file": dict(
        tensors=lambda t: {**t, f"{Q0}.lora_B.weight": torch.zeros(3, 4)}
    ),
    "target 'layers.9.mlp.up_proj' is none of": dict(
        tensors=lambda t: {
            **t,
            Q0.replace("0.self_attn.q", "9.mlp.up") + ".lora_A.weight": torch.ones(
                4, 4
            ),
        }
    ),
    r"embed_tokens.base_layer.weight of shape \(97, 32\) is not this model's": dict(
        tensors=lambda t: {**t, EMBEDDED: torch.zeros(97, 32)}
    ),
    r"embed_tokens.base_layer.weight of shape \(99, 32\)": dict(
        tensors=lambda t: {**t, EMBEDDED: torch.zeros(99, 32)}
    ),
    "1 tensors of the file belong nowhere": dict(
        tensors=lambda t: {**t, f"{Q0}.lora_C.weight": torch.zeros(1)}
    ),
}


@pytest.mark.parametrize("message", SPOILED)
def test_a_spoiled_file_is_refused_and_changes_nothing(message, tmp_path):
    save_adapter(add_lora(make_model("llama"), 4, 8, ["q_proj"]), tmp_path)
    spoil(tmp_path, **SPOILED[message])
    model = make_model("llama")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert [name for name, _ in model.named_modules()] == names


def test_a_table_in_the_file_may_be_the_models_own_rounded(tmp_path):
    model = make_model("llama")
    plain = copy.deepcopy(model)
    save_adapter(add_lora(model, 4, 8, ["q_proj"]), tmp_path)
    table = plain.embed_tokens.weight.detach().bfloat16().cpu()
    spoil(tmp_path, tensors=lambda t: {**t, EMBEDDED: table})
    before = plain.embed_tokens.weight.clone()
    load_adapter(plain, tmp_path)
    assert torch.equal(plain.embed_tokens.weight, before)


def test_files_that_are_not_there_or_not_whole_are_refused(tmp_path):
    model = make_model("llama")
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"0 adapters \(none\)"):
        save_adapter(model, tmp_path)
    save_adapter(add_lora(make_model("llama")), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is no whole file"):
        load_adapter(model, tmp_path)
    with torch.device("meta"):
        empty = add_lora(MinimalLlama(tiny_config()))
    with pytest.raises(ValueError, match="is a meta tensor"):
        save_adapter(empty, tmp_path)


def test_a_mix_is_neither_saved_nor_merged(tmp_path):
    model = add_lora(add_lora(make_model("llama"), name="anna"), name="bob")
    mix_adapters(model)
    tokens = random_tokens(1, 5)
    before = model(tokens)
    for refused in (lambda: save_adapter(model, tmp_path), lambda: merge(model)):
        with pytest.raises(ValueError, match="anna, bob are mixed.*save or merge them"):
            refused()
    assert torch.equal(model(tokens), before) and not list(tmp_path.iterdir())
    named = add_lora(make_model("llama"), name="mixed")  # a word like any other
    save_adapter(named, tmp_path)
    merge(named)


def test_vera_without_its_matrices_is_refused(tmp_path):
    save_adapter(add_vera(make_model("llama"), 4), tmp_path)
    spoil(tmp_path, tensors=lambda t: {k: v for k, v in t.items() if "vera_A" not in k})
    with pytest.raises(ValueError, match="the file has no vera_A"):
        load_adapter(make_model("llama"), tmp_path)
