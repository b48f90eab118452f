"""Merged equals unmerged; taken back bit for bit; tied and enlarged tables hold."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from minllama import MinimalLlama
from minllama.peft import (
    add_dora,
    add_ia3,
    add_lora,
    add_norm_tuning,
    add_prefix,
    add_prompt,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
    unmerge,
)
from tests.conftest import make_model, random_tokens
from tests.peft.library import quiet_load
from tests.peft.test_adapters import EVERY, shake

CANNOT = ("prefix", "p_tuning_v2", "prompt", "p_tuning", "llama_adapter", "houlsby")
CAN = [name for name in EVERY if name not in CANNOT]


@pytest.mark.parametrize("name", CAN)
def test_merged_equals_unmerged(name, any_model):
    model, tokens = any_model.double(), random_tokens(2, 9)
    tied = model.config.tie_embeddings
    plain = {n for n, _ in model.named_modules()}
    shake(EVERY[name](model))
    expected = model(tokens)
    merge(model)
    assert_close(model(tokens), expected, rtol=0, atol=1e-10)
    assert {n for n, _ in model.named_modules()} == plain
    assert model.config.tie_embeddings == tied  # alike on both sides, or untouched


@pytest.mark.parametrize("name", ["lora", "pissa", "olora"])
def test_merged_equals_unmerged_of_any_weight(name):
    """Two of them at once: a second one stands on what the first left of the weight."""
    model, tokens = make_model("qwen2").double(), random_tokens(2, 9)
    shake(EVERY[name](model))
    shake(add_lora(model, name="other", targets="all-linear"))
    set_adapter(model, {"default": 0.3, "other": -2.0})
    expected = model(tokens)
    unmerge(merge(model, ("default", "other"), keep=True))
    assert torch.equal(model(tokens), expected)
    merge(model, ("default", "other"))
    assert_close(model(tokens), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CAN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerged_bit_for_bit(name, dtype):
    for tied in (False, True):
        model = make_model("qwen2", tie_embeddings=tied).to(dtype)
        shake(EVERY[name](model))
        tokens = random_tokens(2, 9)
        before = copy.deepcopy(model.state_dict())
        expected = model(tokens)
        unmerge(merge(model, keep=True))
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert torch.equal(model(tokens), expected)
        shared = model.lm_head.weight if name != "trainable_tokens" else None
        assert shared is None or (shared is model.embed_tokens.weight) == tied


def test_what_was_not_kept_cannot_be_taken_back():
    model = merge(shake(add_lora(make_model("llama"))))
    with pytest.raises(ValueError, match="were not kept"):
        unmerge(model)


@pytest.mark.parametrize("name", CANNOT)
def test_what_is_no_change_of_a_weight_refuses(name):
    model = EVERY[name](make_model("llama"))
    names = [n for n, _ in model.named_modules()]
    with pytest.raises(ValueError, match="is no change of a weight"):
        merge(model)
    assert [n for n, _ in model.named_modules()] == names


def test_doubtful_merges_are_refused():
    model = make_model("llama")
    with pytest.raises(ValueError, match="no adapter to merge"):
        merge(model)
    add_lora(model, name="anna")
    with pytest.raises(ValueError, match="'eve' is none of anna"):
        merge(model, "eve")
    add_lora(model, name="bob")
    with pytest.raises(ValueError, match="several adapters: anna, bob"):
        merge(model)
    with pytest.raises(ValueError, match="'bob' would be left"):
        merge(model, "anna")
    set_adapter(model, "anna")
    with pytest.raises(ValueError, match="'bob' is off"):
        merge(model, ("anna", "bob"))
    set_adapter(model, ("anna", "bob"))
    merge(model, ("anna", "bob"), keep=True)
    add_lora(model)
    with pytest.raises(ValueError, match="an earlier merge is still kept"):
        merge(model)


STACKS = {
    "lora in ia3": lambda m: add_ia3(shake(add_lora(m)), name="outer"),
    "ia3 in lora": lambda m: add_lora(
        shake(add_ia3(m)), targets="all-linear", name="outer"
    ),
    "dora in lora": lambda m: add_lora(shake(add_dora(m)), name="outer"),
    "lora in dora": lambda m: add_dora(shake(add_lora(m)), name="outer"),
    "lora beside norms": lambda m: add_norm_tuning(shake(add_lora(m)), name="outer"),
}


@pytest.mark.parametrize("name", STACKS)
def test_adapters_stack_and_merge_together(name):
    model, tokens = make_model("qwen2").double(), random_tokens(2, 9)
    shake(STACKS[name](model))
    set_adapter(model, ("default", "outer"))
    expected = model(tokens)
    merge(model, ("default", "outer"))
    assert_close(model(tokens), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "where", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]]
)
def test_a_tied_table_is_parted_when_one_side_changed(where, tmp_path):
    model = make_model("llama", tie_embeddings=True).double()
    tokens = random_tokens(2, 9)
    shake(add_lora(model, 2, targets=where))
    expected = model(tokens)
    merge(model)
    assert not model.config.tie_embeddings
    assert_close(model(tokens), expected, rtol=0, atol=1e-10)
    model.save_pretrained(tmp_path)
    again = MinimalLlama.from_pretrained(tmp_path)
    assert torch.equal(again(tokens), model(tokens))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_no_part_is_taken_out_of_a_tied_table(init):
    model = make_model("llama", tie_embeddings=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"init='{init}' on lm_head would take its"):
        add_lora(model, 4, targets=["q_proj", "lm_head"], init=init)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    parted, tokens = make_model("llama"), random_tokens(2, 9)
    expected = parted(tokens)
    add_lora(parted, 4, targets=["lm_head"], init=init)
    assert_close(parted(tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_weight_has_no_part_of_a_higher_rank(init):
    """k_proj is 16 by 32; what was split before it would be rounded by going back."""
    model = make_model("llama")
    before = copy.deepcopy(model.state_dict())
    for settings in ({"rank": 17}, {"rank": 4, "rank_pattern": {"k_proj": 17}}):
        with pytest.raises(
            ValueError, match=r"rank=17 of layers\.0\.\S+k_proj exceeds 16"
        ):
            add_lora(model, targets=["q_proj", "k_proj"], init=init, **settings)
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before)
    add_lora(model, 16, targets=["k_proj"], init=init)


@pytest.mark.parametrize("what", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_pattern_gives_no_layer_nothing(what, value):
    with pytest.raises(ValueError, match=f"{what} gives 'k_proj' {value}, which must"):
        add_lora(
            make_model("llama"), 4, targets="all-linear", **{what: {"k_proj": value}}
        )


def enlarge(model: MinimalLlama, rows: int) -> MinimalLlama:
    """Some words more, as the chapter large_vocab will do it."""
    tied, D = model.config.tie_embeddings, model.config.dim
    size = model.config.vocab_size + rows
    model.config = replace(model.config, vocab_size=size)
    for name in ("embed_tokens", "lm_head"):
        old = model.get_submodule(name).weight
        table = nn.Embedding(size, D) if name[0] == "e" else nn.Linear(D, size, False)
        table = table.to(old)
        with torch.no_grad():
            table.weight[: len(old)] = old
        model.set_submodule(name, table)
    if tied:
        model.tie_weights()
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_an_enlarged_vocabulary_survives_every_stage(tied, tmp_path):
    """Enlarge, LoRA and new rows, train, save, load, merge, save, in transformers."""
    new = [97, 98, 99, 100, 101]
    model = enlarge(make_model("llama", tie_embeddings=tied), len(new))
    plain = copy.deepcopy(model)
    tokens = random_tokens(3, 11, vocab_size=102)
    tokens[:, 3] = torch.tensor([97, 99, 101])
    before = model(tokens)
    rows = new if tied else {"embed_tokens": new, "lm_head": new}
    add_lora(model, 4, targets="all-linear", trainable_tokens=rows)
    assert_close(model(tokens), before)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(10):
        logits = model(tokens)[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    learned = model(tokens).detach()
    old = plain.embed_tokens.weight
    assert torch.equal(model.embed_tokens.base.weight, old)

    save_adapter(model, tmp_path / "adapter")
    plain.save_pretrained(tmp_path / "plain")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").to(tokens.device)
    theirs = quiet_load(base, tmp_path / "adapter")  # in the PEFT library
    near = 1e-5 * learned.abs().max().item()
    with torch.no_grad():
        assert_close(theirs(tokens).logits, learned, rtol=1e-5, atol=near)

    loaded = load_adapter(plain, tmp_path / "adapter")
    assert_close(loaded(tokens), learned)

    merge(model)
    assert_close(model(tokens), learned, rtol=1e-4, atol=1e-4)
    assert model.config.tie_embeddings == tied
    assert torch.equal(model.embed_tokens.weight[:97], old[:97])  # only new rows moved
    assert not torch.equal(model.embed_tokens.weight[97:], old[97:])

    model.save_pretrained(tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").to(tokens.device)
    with torch.no_grad():
        found = theirs.eval()(tokens).logits
    assert_close(found, model(tokens), rtol=1e-5, atol=near)
    assert theirs.config.tie_word_embeddings == tied


def test_prompts_stay_beside_a_merged_lora():
    model = make_model("llama").double()
    tokens = random_tokens(2, 9)
    shake(add_lora(model))
    merge(model)
    before = model(tokens)
    add_prompt(add_prefix(model, 3), 2, name="prompt")
    with pytest.raises(ValueError, match="several adapters"):
        merge(model)
    assert not torch.equal(model(tokens), before)
