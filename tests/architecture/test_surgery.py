"""Modules are swapped in place, each once, and nothing matched is an error."""

import copy

import pytest
import torch
from torch import nn

from minllama.architecture.model import MinimalLlama
from minllama.architecture.surgery import replace_modules
from tests.conftest import make_model, random_tokens, tiny_config


class Wrapped(nn.Module):
    """Around another module, which it calls `base`."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, *args):
        return self.base(*args)


def is_linear(_, module: nn.Module) -> bool:
    return type(module) is nn.Linear


def ends_with(*words: str):
    return lambda name, _: name.split(".")[-1] in words


def test_the_model_is_changed_in_place_and_returned():
    model = make_model("llama")
    assert replace_modules(model, ends_with("core"), Wrapped) is model
    assert all(type(layer.self_attn.core) is Wrapped for layer in model.layers)


def test_each_match_is_made_from_the_module_it_replaces(any_model):
    before = {n: m for n, m in any_model.named_modules() if is_linear(n, m)}
    replace_modules(any_model, is_linear, Wrapped)
    after = {n: m.base for n, m in any_model.named_modules() if type(m) is Wrapped}
    assert before == after and "layers.1.self_attn.q_proj" in after


def test_wrapping_in_nothing_changes_no_output(any_model):
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        before = any_model(tokens)
        for match in (is_linear, ends_with("core", "embed_tokens", "input_layernorm")):
            replace_modules(any_model, match, Wrapped)
            assert torch.equal(any_model(tokens), before)
        replace_modules(any_model, ends_with("rope"), Wrapped)
        assert torch.equal(any_model(tokens), before)


def test_whole_layers_can_be_wrapped_and_keep_their_caches(any_model):
    """`new_cache` must still be found: the wrapper hands on what it does not know."""

    class Layer(Wrapped):
        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("base"), name)

    tokens = random_tokens(2, 9)
    with torch.no_grad():
        before = any_model(tokens)
        replace_modules(any_model, ends_with("0", "1"), Layer)
        assert torch.equal(any_model(tokens, caches=any_model.new_caches(2, 9)), before)


def test_names_of_what_was_not_touched_are_kept():
    model = make_model("llama")
    before = set(model.state_dict())
    replace_modules(model, ends_with("q_proj"), Wrapped)
    after = set(model.state_dict())
    moved = {f"layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
    assert before - after == moved
    assert after - before == {n.replace("weight", "base.weight") for n in moved}


def test_a_wrapper_around_a_match_is_not_matched_again():
    model = make_model("llama")
    replace_modules(model, ends_with("q_proj", "base"), Wrapped)
    assert type(model.layers[0].self_attn.q_proj.base) is nn.Linear
    replace_modules(model, ends_with("q_proj"), Wrapped)  # a second call wraps again
    assert type(model.layers[0].self_attn.q_proj.base) is Wrapped


def test_the_model_itself_is_never_swapped():
    model = make_model("llama")
    with pytest.raises(ValueError, match="no module matched"):
        replace_modules(model, lambda name, module: module is model, Wrapped)


def test_nothing_matched_lists_the_names_that_exist():
    model = make_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match="no module matched.* core, .* q_proj, .*v_proj"
    ):
        replace_modules(model, ends_with("q_porj"), Wrapped)
    assert all(torch.equal(before[n], w) for n, w in model.state_dict().items())


def test_swaps_work_on_the_meta_device():
    with torch.device("meta"):
        model = MinimalLlama(tiny_config())
    replace_modules(model, is_linear, Wrapped)
    assert all(weight.is_meta for weight in model.parameters())


def test_a_module_and_another_inside_it_are_not_both_replaced():
    model, names = make_model("llama"), ("layers.0.mlp", "layers.0.mlp.up_proj")
    words = r"layers.0.mlp matches, and so does layers.0.mlp.up_proj"
    with pytest.raises(ValueError, match=words):
        replace_modules(model, lambda name, _: name in names, lambda _: nn.Identity())
    assert not isinstance(model.layers[0].mlp, nn.Identity)  # nothing was done


def test_a_module_of_two_names_stays_one_module():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": shared})
    is_linear = lambda _, module: isinstance(module, nn.Linear)
    replace_modules(model, is_linear, lambda module: nn.Identity())
    assert model["a"] is model["b"] and isinstance(model["a"], nn.Identity)
