"""What every adapter promises: at birth, off, trained, stacked, cached, compiled."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from minllama import generate
from minllama.architecture import MinimalLlama, StaticCaches, packed
from minllama.dist_run import checkpoint_activations
from minllama.peft import (
    adapter_names,
    add_adalora,
    add_bitfit,
    add_dora,
    add_houlsby,
    add_ia3,
    add_llama_adapter,
    add_lora,
    add_lora_fa,
    add_norm_tuning,
    add_olora,
    add_pissa,
    add_prefix,
    add_prompt,
    add_rslora,
    add_trainable_tokens,
    add_vera,
    disabled,
    prepend_prompt,
    remove_adapter,
    reset_adapters,
    set_adapter,
    trainable_parameters,
)
from minllama.peft.prefix import behind
from tests.conftest import CountingBackend, make_model, random_tokens, tiny_config

BIT_EQUAL = {
    "lora": lambda m: add_lora(m, targets="all-linear"),
    "rslora": add_rslora,
    "lora_fa": add_lora_fa,
    "dora": lambda m: add_dora(m, targets="all-linear"),
    "ia3": add_ia3,
    "vera": lambda m: add_vera(m, 8),
    "adalora": lambda m: add_adalora(m, 4),
    "llama_adapter": lambda m: add_llama_adapter(m, 3),
    "houlsby": lambda m: add_houlsby(m, 4),
    "norm_tuning": add_norm_tuning,
    "bitfit": lambda m: add_bitfit(m, "all-linear"),
}
ROUNDED = {
    "pissa": lambda m: add_pissa(m, targets="all-linear"),
    "olora": lambda m: add_olora(m, targets="all-linear"),
    "trainable_tokens": lambda m: add_trainable_tokens(m, range(0, 97, 3)),
}
CHANGED = {
    "prefix": lambda m: add_prefix(m, 5),
    "p_tuning_v2": lambda m: add_prefix(m, 5, hidden=8),
    "prompt": lambda m: add_prompt(m, 5),
    "p_tuning": lambda m: add_prompt(m, 5, hidden=8),
}
EVERY = {**BIT_EQUAL, **ROUNDED, **CHANGED}
BASE = ("q_proj.base.weight", "embed_tokens.weight", "norm.weight")


def shake(model: nn.Module) -> nn.Module:
    """Away from birth."""
    with torch.no_grad():
        for p in dict.fromkeys(model.parameters()):
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return model


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """(B, T, V), of the text alone."""
    if any("prompt" == m.spec.method for m in model.modules() if hasattr(m, "spec")):
        both = prepend_prompt(model, tokens)
        return model(both)[:, both.size(1) - tokens.size(1) :]
    return model(tokens)


def test_adding_lora_changes_no_output(any_model):
    tokens = random_tokens(3, 17)
    before = any_model(tokens)
    assert torch.equal(add_lora(any_model, targets="all-linear")(tokens), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BIT_EQUAL)
def test_at_birth_outputs_are_bit_equal(name, dtype):
    for family in ("llama", "qwen2"):
        model, tokens = make_model(family).to(dtype), random_tokens(3, 17)
        before = model(tokens)
        assert torch.equal(BIT_EQUAL[name](model)(tokens), before)


@pytest.mark.parametrize("name", ROUNDED)
def test_at_birth_outputs_are_equal_to_rounding(name):
    model = make_model("llama", tie_embeddings=name == "trainable_tokens").double()
    tokens = random_tokens(3, 17)
    before = model(tokens)
    assert_close(ROUNDED[name](model)(tokens), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CHANGED)
def test_prompts_change_outputs_at_birth_by_design(name):
    model, tokens = make_model("llama"), random_tokens(3, 17)
    before = model(tokens)
    assert (logits_of(CHANGED[name](model), tokens) - before).abs().max() > 1e-2


@pytest.mark.parametrize("name", EVERY)
def test_switched_off_or_taken_off_the_model_is_as_it_was(name):
    model = make_model("qwen2").double()
    tokens = random_tokens(3, 17)
    before = model(tokens)
    state = copy.deepcopy(model.state_dict())
    shake(EVERY[name](model))
    assert (logits_of(model, tokens) - before).abs().max() > 1e-3
    exact = dict(rtol=0, atol=1e-12) if name in ROUNDED else dict(rtol=0, atol=0)
    with disabled(model):
        assert_close(logits_of(model, tokens), before, **exact)
    remove_adapter(model, "default")
    assert adapter_names(model) == [] and model.state_dict().keys() == state.keys()
    assert_close(model(tokens), before, **exact)


@pytest.mark.parametrize("name", EVERY)
def test_only_adapter_parameters_have_gradients(name):
    model = make_model("llama")
    frozen = {id(p): p.clone() for p in model.parameters()}
    EVERY[name](model)
    shake(model)
    logits_of(model, random_tokens(3, 17)).square().mean().backward()
    learned = [p for p in model.parameters() if p.grad is not None]
    assert learned and not any(id(p) in frozen for p in learned)
    assert {id(p) for p in learned} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    assert sum(p.numel() for p in learned) == trainable_parameters(model)


@pytest.mark.parametrize("name", EVERY)
def test_cached_equals_uncached(name):
    tokens = random_tokens(3, 17)
    for family in ("llama", "mistral"):
        model = shake(EVERY[name](make_model(family).double()))
        ids = (
            prepend_prompt(model, tokens) if name in ("prompt", "p_tuning") else tokens
        )
        with torch.no_grad():
            whole = model(ids)
            for kind in (None, StaticCaches):
                some = {} if kind is None else {"kind": kind}
                caches = model.new_caches(3, 32, **some)
                rest = [9, 1, ids.size(1) - 10]
                parts = [model(part, caches=caches) for part in ids.split(rest, 1)]
                assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in EVERY if "prompt" not in n])
def test_packed_documents_stay_alone(name):
    if name == "p_tuning":
        pytest.skip("its ids stand in front of each document")
    model = shake(EVERY[name](make_model("llama").double()))
    tokens = random_tokens(2, 17)
    places = torch.cat([torch.arange(7), torch.arange(10)])[None].to(tokens.device)
    found = model(tokens, layout=packed(places))
    assert_close(found[:, :7], model(tokens[:, :7]), rtol=0, atol=1e-10)
    assert_close(found[:, 7:], model(tokens[:, 7:]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", EVERY)
def test_every_kind_of_model_takes_every_adapter(name, any_model):
    tokens = random_tokens(2, 9)
    shake(EVERY[name](any_model))
    prompted = name in ("prompt", "p_tuning")
    ids = prepend_prompt(any_model, tokens) if prompted else tokens
    out = generate(any_model, ids, max_new_tokens=3, stop_ids=())
    with torch.no_grad():
        assert torch.equal(out[:, -1], any_model(out[:, :-1])[:, -1].argmax(-1))
    copied = copy.deepcopy(any_model)
    assert torch.equal(logits_of(copied, tokens), logits_of(any_model, tokens))


TWINS = ("rslora", "lora_fa", "olora")  # of lora and pissa: the same layers


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # of PyTorch
@pytest.mark.parametrize("name", [n for n in EVERY if n not in TWINS])
def test_one_graph_holds_the_whole_model(name):
    model = shake(EVERY[name](make_model("llama", n_layers=1)))
    tokens = random_tokens(2, 9)
    tokens = prepend_prompt(model, tokens) if name in ("prompt", "p_tuning") else tokens
    backend = CountingBackend()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_close(compiled(tokens), model(tokens))
    assert backend.graphs == 1


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("name", EVERY)
def test_checkpointed_blocks_have_the_same_gradients(name, policy):
    model = shake(EVERY[name](make_model("llama").double()))
    tokens = random_tokens(2, 9)

    def gradients(model):
        model.zero_grad()
        logits_of(model, tokens).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    expected = gradients(model)
    checkpoint_activations(model, policy)
    assert_close(gradients(model), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [{}, {"dora": True}, {"rslora": True}])
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
def test_adapters_of_another_dtype_than_the_base_learn(base, kind):
    """As `minllama finetune --dtype bfloat16` has them: they learn in float32."""
    model = make_model("qwen2").to(base)
    other = torch.float32 if base == torch.bfloat16 else torch.bfloat16
    tokens = random_tokens(2, 9)
    before = model(tokens)
    add_lora(model, 4, 8, "all-linear", dtype=other, **kind)
    after = model(tokens)
    assert after.dtype == base and torch.equal(after, before)
    after.float().square().mean().backward()
    grads = [p.grad for n, p in model.named_parameters() if n.endswith(".b")]
    assert all(g is not None and g.dtype == other and g.any() for g in grads)


@pytest.mark.parametrize("name", EVERY)
def test_adapters_can_be_made_on_the_meta_device(name):
    with torch.device("meta"):
        model = MinimalLlama(tiny_config())
    EVERY[name](model)
    assert all(p.is_meta for p in model.parameters())
    plain = make_model("llama")
    EVERY[name](plain)
    model.to_empty(device="cpu")
    bases = dict(plain.named_parameters(remove_duplicate=False))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for at, p in model.named_parameters():
            if at not in trained:
                p.copy_(bases[at])
    if name in ("pissa", "olora"):  # their base is split already, so it starts anew
        return
    reset_adapters(model)
    if name in BIT_EQUAL:
        tokens = random_tokens(2, 9)
        assert torch.equal(model(tokens), plain(tokens))
    set_adapter(model, "default")


def test_text_is_generated_behind_a_learned_prompt():
    model, tokens = make_model("llama"), random_tokens(2, 9)
    before = generate(model, tokens, 4, stop_ids=())
    shake(add_prompt(model, 5))
    ids = prepend_prompt(model, tokens)
    out = generate(model, ids, 4, stop_ids=())
    assert out[:, 5:].shape == before.shape and int(out[:, ids.size(1) :].max()) < 97
    ragged = generate(model, list(ids), 4, stop_ids=())
    assert torch.equal(torch.stack(ragged), out)
    # the prompt's ids have no logit that a penalty could lower
    generate(model, ids, 4, stop_ids=(), repetition_penalty=1.3)
    generate(model, list(ids), 4, stop_ids=(), repetition_penalty=1.3)
    with pytest.raises(ValueError, match="token 102 is outside vocab_size=97"):
        generate(model, torch.full_like(ids, 102))
    with disabled(model):
        assert torch.equal(generate(model, tokens, 4, stop_ids=()), before)
        with pytest.raises(ValueError, match="token 101 is outside vocab_size=97"):
            generate(model, ids)


def test_a_prefix_before_documents_is_told_as_a_mask_only():
    places = torch.tensor([[0, 1, 0, 1, 2]])
    layout = behind(packed(places), 2)
    seen = layout.mask(7)[0, 0].int().tolist()
    assert seen[1] == [1, 1, 1, 1, 0, 0, 0] and seen[4] == [1, 1, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="is no interval of keys"):
        layout.interval(7)


def test_an_adapted_linear_layer_shows_no_weight_that_could_be_misread():
    model = add_lora(make_model("llama"), targets=["lm_head", "embed_tokens"])
    assert not hasattr(model.lm_head, "weight")
    assert model.embed_tokens.weight is model.embed_tokens.base.weight  # for its device
