"""Adapters travel: what the PEFT library wrote loads here, and ours loads there."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from minllama.architecture import MinimalLlama
from minllama.peft import (
    add_adalora,
    add_bitfit,
    add_houlsby,
    add_ia3,
    add_llama_adapter,
    add_lora,
    add_prompt,
    add_trainable_tokens,
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
    C,
    load_ours,
    load_theirs,
    our_logits,
    quiet_add,
    quiet_load,
    quiet_save,
    their_logits,
)


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


Q_HEAD = dict(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type=C)
ADALORA = dict(init_r=4, target_r=2, total_step=9)
PARTS = {  # what the library trains beside a method, or writes in a way of its own
    "alpha-unused": peft.LoraConfig(
        r=4, target_modules=["q_proj"], task_type=C, alpha_pattern={"o_proj": 1},
    ),
    "alpha-anchored": peft.LoraConfig(  # names have "model." in front there: fits none
        r=4, target_modules=["q_proj"], task_type=C,
        alpha_pattern={r"^layers.0.self_attn.q_proj": 1},
    ),
    "bias-all-saved": peft.LoraConfig(
        r=4, target_modules=["q_proj"], task_type=C, bias="all",
        modules_to_save=["k_proj"],
    ),
    "ia3-saved": peft.IA3Config(
        target_modules=["k_proj"], feedforward_modules=[], task_type=C,
        modules_to_save=["lm_head"],
    ),
    "norms-saved": peft.LNTuningConfig(
        target_modules=["norm"], task_type=C, modules_to_save=["lm_head"]
    ),
    "vera-saved": peft.VeraConfig(r=5, bias="all", **Q_HEAD),
    "vera-bias": peft.VeraConfig(
        r=5, target_modules=["q_proj"], task_type=C, bias="vera_only"
    ),
    "adalora-saved": peft.AdaLoraConfig(bias="all", **ADALORA, **Q_HEAD),
    "adalora-cut": peft.AdaLoraConfig(
        target_modules=["q_proj", "o_proj"], task_type=C, **ADALORA
    ),
    "tokens-of-two-tables": peft.TrainableTokensConfig(
        token_indices=[96, 3], target_modules=["embed_tokens", "lm_head"], task_type=C
    ),
    "head-and-tokens-tied": peft.LoraConfig(
        r=4, target_modules=["lm_head", "q_proj"], task_type=C,
        trainable_token_indices=[96, 3],
    ),
}  # fmt: skip


def cut(model) -> None:
    """Other ranks than the first, as the library's own allocator leaves them."""
    kept = {
        "model.layers.0.self_attn.q_proj.lora_E": [True, False, True, True],
        "model.layers.1.self_attn.q_proj.lora_E": [False, False, True, False],
        "model.layers.0.self_attn.o_proj.lora_E": [True, True, True, True],
        "model.layers.1.self_attn.o_proj.lora_E": [False, True, True, False],
    }
    model.peft_config["default"].rank_pattern = kept
    with torch.no_grad():
        for key, keep in kept.items():
            layer = model.base_model.model.get_submodule(key.rpartition(".")[0])
            layer.lora_E["default"] *= torch.tensor(keep)[:, None]


@pytest.mark.parametrize("name", PARTS)
def test_parts_beside_a_method_travel_both_ways(name, bases, tmp_path):
    base, tokens = bases("qwen2", name.endswith("tied")), some_tokens()
    theirs = quiet_add(load_theirs(base, "qwen2"), copy.deepcopy(PARTS[name])).eval()
    shake(theirs)
    if name == "adalora-cut":
        cut(theirs)
    with torch.no_grad():
        expected = their_logits(theirs, tokens)
        quiet_save(theirs, tmp_path / "theirs")
        ours = load_adapter(load_ours(base), tmp_path / "theirs")
        assert off(our_logits(ours, tokens), expected) < 1e-5
        save_adapter(ours, tmp_path / "ours")
        theirs = quiet_load(load_theirs(base, "qwen2"), tmp_path / "ours")
        again = load_adapter(load_ours(base), tmp_path / "ours")
        assert off(their_logits(theirs, tokens), expected) < 1e-5
        assert off(our_logits(again, tokens), expected) < 1e-5


OURS = {  # names and numbers that their config says in another way than ours
    "norm-alone": lambda m: add_lora(m, 4, modules_to_save=["norm"]),
    "norm-and-head": lambda m: add_lora(m, 4, modules_to_save=["lm_head", "norm"]),
    "ia3-one-of-a-name": lambda m: add_ia3(
        m, ["down_proj"], ["layers.1.mlp.down_proj"]
    ),
    "adalora-ranks": lambda m: add_adalora(m, 5, 8, rank_pattern={"q_proj": 2}),
    "adalora-more": lambda m: add_adalora(m, 5, 8, rank_pattern={"q_proj": 9}),
    "tokens-of-two-tables": lambda m: add_trainable_tokens(
        m, {"embed_tokens": [96, 3], "lm_head": [96, 3]}
    ),
    "tokens-of-the-head": lambda m: add_trainable_tokens(m, {"lm_head": [96, 3]}),
}


@pytest.mark.parametrize("name", OURS)
def test_what_their_config_says_otherwise_loads_there(name, bases, tmp_path):
    base, tokens = bases("llama", False), some_tokens()
    ours = OURS[name](load_ours(base))
    shake(ours)
    save_adapter(ours, tmp_path)
    theirs = quiet_load(load_theirs(base), tmp_path)
    again = load_adapter(load_ours(base), tmp_path)
    with torch.no_grad():
        expected = our_logits(ours, tokens)
        assert off(their_logits(theirs, tokens), expected) < 1e-5
        assert off(our_logits(again, tokens), expected) < 1e-6


NO_FILE = {
    r"token ids \[3\] of embed_tokens and \[4, 5\] of lm_head differ": (
        lambda m: add_trainable_tokens(m, {"embed_tokens": [3], "lm_head": [4, 5]})
    ),
    "trains rows of embed_tokens and changes it as LoRAEmbedding": (
        lambda m: add_lora(m, 4, targets=["embed_tokens"], trainable_tokens=[3])
    ),
    "trains rows of embed_tokens and changes it as TrainedCopy": (
        lambda m: add_lora(m, 4, modules_to_save=["embed_tokens"], trainable_tokens=[3])
    ),
}


def test_rows_below_a_dora_of_a_tied_head_are_refused(bases, tmp_path):
    base = bases("llama", True)
    config = peft.LoraConfig(
        r=4, target_modules=["lm_head"], task_type=C, use_dora=True,
        trainable_token_indices=[3],
    )  # fmt: skip
    quiet_save(quiet_add(load_theirs(base), config), tmp_path)
    with pytest.raises(
        ValueError, match="rows of lm_head and changes it as DoRALinear"
    ):
        load_adapter(load_ours(base), tmp_path)


@pytest.mark.parametrize("message", NO_FILE)
def test_what_no_file_holds_is_refused_when_saved(message, tmp_path):
    model = NO_FILE[message](make_model("llama"))
    with pytest.raises(ValueError, match=message):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


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
    r"peft_type=\['LORA'\] is not built": dict(config={"peft_type": ["LORA"]}),
    "use_qalora=True is not built": dict(config={"use_qalora": True}),
    "lora_bias=True is not built": dict(config={"lora_bias": True}),
    "r=None in adapter_config.json must be a number": dict(config={"r": None}),
    "r='4' in adapter_config.json must be a number": dict(config={"r": "4"}),
    "r=True in adapter_config.json must be a number": dict(config={"r": True}),
    "r=4.5 in adapter_config.json must be a whole number": dict(config={"r": 4.5}),
    "lora_alpha='8' in adapter_config.json must be": dict(config={"lora_alpha": "8"}),
    r"alpha_pattern=\['q'\] must say": dict(config={"alpha_pattern": ["q"]}),
    "layers.0.self_attn.q_proj='1' in adapter_config.json must be a number": dict(
        config={"alpha_pattern": {"q_proj": "1"}}
    ),
    "trainable_token_indices=3 in adapter_config.json must be a list": dict(
        config={"trainable_token_indices": 3}
    ),
    "lora_A.weight is of torch.int8": dict(
        tensors=lambda t: {k: x.to(torch.int8) for k, x in t.items()}
    ),
    "lora_A.weight is one number": dict(
        tensors=lambda t: {**t, f"{Q0}.lora_A.weight": torch.ones(())}
    ),
    "1 tensors of the file belong nowhere in this model: .*lora_B": dict(
        tensors=lambda t: {k: v for k, v in t.items() if k != f"{Q0}.lora_A.weight"}
    ),
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
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert [name for name, _ in model.named_modules()] == names
    assert all(p.requires_grad for p in model.parameters())


def test_a_name_that_is_taken_stays_as_it_is(tmp_path):
    model = add_lora(make_model("llama"), 4, 8, ["q_proj"])
    save_adapter(model, tmp_path)
    learned = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="adapter name='default' is taken"):
        load_adapter(model, tmp_path)
    assert [p.requires_grad for p in model.parameters()] == learned and any(learned)


LACKING = {
    "r": lambda m: add_lora(m, 4),
    "init_r": lambda m: add_adalora(m, 4),
    "adapter_len": lambda m: add_llama_adapter(m, 3),
    "size": add_houlsby,
    "token_indices": lambda m: add_trainable_tokens(m, [3]),
}


@pytest.mark.parametrize("key", LACKING)
def test_a_config_that_lacks_a_number_is_refused(key, tmp_path):
    save_adapter(LACKING[key](make_model("llama")), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{key}=None in adapter_config.json must be"):
        load_adapter(make_model("llama"), tmp_path)


def test_a_prompt_file_without_its_prompt_is_refused(tmp_path):
    save_adapter(add_prompt(make_model("llama"), 3), tmp_path)
    spoil(tmp_path, tensors=lambda t: {"prompt": t["prompt_embeddings"]})
    with pytest.raises(ValueError, match="the file has no table prompt_embeddings"):
        load_adapter(make_model("llama"), tmp_path)


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
