"""LoRA in use: targets, strange bases, several adapters, rows of a batch."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from minllama import generate
from minllama.architecture import StaticCaches, replace_modules
from minllama.peft import (
    adapter_names,
    adapter_rows,
    add_bitfit,
    add_dora,
    add_houlsby,
    add_ia3,
    add_llama_adapter,
    add_lora,
    add_pissa,
    add_prefix,
    add_prompt,
    add_trainable_tokens,
    add_vera,
    disabled,
    lora_plus_groups,
    merge,
    mix_adapters,
    prepend_prompt,
    remove_adapter,
    reset_adapters,
    set_adapter,
    set_rows,
    trainable_parameters,
)
from minllama.peft.lora import LoRALinear
from minllama.peft.lora_layers import linear_with_low_rank
from tests.conftest import CountingBackend, make_model, random_tokens
from tests.peft.test_adapters import shake


class Int8Linear(nn.Module):
    """A stand-in for what the chapter quantize makes: no float weight anywhere."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        whole = (linear.weight.detach() / scale).round().to(torch.int8)
        self.register_buffer("weight", whole)
        self.register_buffer("scale", scale.float())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)
        return F.linear(x, weight, self.bias)


def quantize(model: nn.Module) -> nn.Module:
    return replace_modules(
        model, lambda n, m: n.endswith("_proj") and "." in n, Int8Linear
    )


def adapted(model: nn.Module) -> set[str]:
    return {n for n, m in model.named_modules() if isinstance(m, LoRALinear)}


@pytest.mark.parametrize(
    "targets, count",
    [
        (("q_proj", "v_proj"), 4),
        (["mlp.up_proj"], 2),
        ("q_proj", 2),
        ("all-linear", 14),
        (r"layers\.1\..*_proj", 7),
        (r"model\.layers\.\d\.mlp\.(gate|up)_proj", 4),
        (["layers.0.self_attn.q_proj", "lm_head"], 2),
    ],
)
def test_targets_are_said_as_people_say_them(targets, count):
    assert len(adapted(add_lora(make_model("llama"), targets=targets))) == count


def test_all_linear_leaves_the_head_alone_and_takes_what_a_subclass_added():
    names = adapted(add_lora(make_model("gated"), targets="all-linear"))
    assert "lm_head" not in names and "layers.0.self_attn.gate_proj" in names


def test_patterns_and_layers():
    model = add_lora(
        make_model("llama"), 8, 16, "all-linear", layers_to_transform=[1],
        rank_pattern={"q_proj": 2, r"mlp\..*": 3}, alpha_pattern={"mlp.up_proj": 9},
    )  # fmt: skip
    block = model.layers[1]
    assert block.self_attn.q_proj.rank == 2 and block.self_attn.k_proj.rank == 8
    assert block.mlp.up_proj.rank == 3 and block.mlp.up_proj.scale == 9 / 3
    assert not any(name.startswith("layers.0") for name in adapted(model))


WRONG = {
    "target 'q_porj' is none of .*q_proj": dict(targets=["v_proj", "q_porj"]),
    "targets='attention' fits none of .*down_proj": dict(targets="attention"),
    r"targets=\(\) adapts nothing": dict(targets=()),
    r"layers=\[1, 7\]: targets are in blocks \[0, 1\]": dict(
        layers_to_transform=[1, 7]
    ),
    "rank_pattern has 'up_proj'": dict(rank_pattern={"up_proj": 2}),
    "alpha_pattern has 'x'": dict(alpha_pattern={"x": 2}),
    "target 'lm_hed' is none of .*lm_head": dict(modules_to_save=["lm_hed"]),
    "bias='some' must be": dict(bias="some"),
    "bias='all', but none of these layers has a bias": dict(bias="all"),
    "rank=0 must be at least 1": dict(rank=0),
    "alpha=-1 must be above 0": dict(alpha=-1),
    "dropout=1.5 must lie": dict(dropout=1.5),
    "init='pisa' is none of .*pissa": dict(init="pisa"),
    "dora=True with init='olora'": dict(dora=True, init="olora"),
    "dora=True on the embedding embed_tokens": dict(
        dora=True, targets=["q_proj", "embed_tokens"]
    ),
    r"token ids \[97\]": dict(trainable_tokens=[97]),
    "name='a.b' must be a word": dict(name="a.b"),
    "target 'head' is none of": dict(trainable_tokens={"head": [1]}),
}


@pytest.mark.parametrize("add", [add_lora, add_dora, add_pissa])
def test_who_watches_the_base_sees_its_own_output(add):
    """Where nobody watches, the change is added in place: the same outputs."""
    tokens = random_tokens(3, 17)
    model = add(make_model("qwen2").double())
    layer = model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.b.add_(0.3 * torch.randn_like(layer.b))
    unwatched, x, seen = model(tokens), torch.randn(3, 17, 32).double(), []
    x = x.to(tokens.device)
    own = layer.base(x)
    handle = layer.base.register_forward_hook(lambda m, args, y: seen.append(y))
    assert (layer(x) - own).abs().max() > 1e-2
    same = [y for y in seen if y.shape == own.shape]  # DoRA asks for A W^T, too
    assert len(same) == 1 and torch.equal(same[0], own)
    assert_close(model(tokens), unwatched, rtol=0, atol=1e-12)
    handle.remove()


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_refused_and_change_nothing(message):
    model = make_model("llama")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        add_lora(model, **WRONG[message])
    assert [name for name, _ in model.named_modules()] == names
    assert all(p.requires_grad for p in model.parameters())


def test_the_other_methods_refuse_wrong_arguments():
    model = make_model("llama")
    for message, add in {
        "target 'k' is none of": partial(add_ia3, model, ["k"]),
        "rank=0 must": partial(add_vera, model, 0),
        "size=0 must": partial(add_houlsby, model, 0),
        "size=0 and hidden=None must": partial(add_prefix, model, 0),
        "size=4 and hidden=0 must": partial(add_prompt, model, 4, hidden=0),
        r"words=\[97\] are no tokens": partial(add_prompt, model, 4, [97]),
        r"layers=3 within 1\.\.2": partial(add_llama_adapter, model, 4, 3),
        "no layer has a bias": partial(add_bitfit, model),
        "no B of a LoRA": partial(lora_plus_groups, model, 1e-3),
        "the model has no prompt": partial(prepend_prompt, model, random_tokens(1, 1)),
        "adapter 'x' is none of none at all": partial(set_adapter, model, "x"),
        "adapter 'y' is none of none at all": partial(remove_adapter, model, "y"),
    }.items():
        with pytest.raises(ValueError, match=message):
            add()
    tied = make_model("llama", tie_embeddings=True)
    with pytest.raises(ValueError, match="lm_head shares the weight of embed_tokens"):
        add_trainable_tokens(tied, {"lm_head": [1]})
    add_prompt(model, 3)
    with pytest.raises(ValueError, match="has a prompt already"):
        add_prompt(model, 3, name="second")
    with pytest.raises(ValueError, match="name='default' is taken .prompt."):
        add_lora(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "add", [partial(add_lora, targets="all-linear"), add_dora, add_ia3, add_houlsby]
)
def test_an_adapter_needs_no_weight_only_a_call(add, dtype):
    model = quantize(make_model("qwen2").to(dtype))
    tokens = random_tokens(2, 9)
    before = model(tokens)
    assert torch.equal(add(model)(tokens), before)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
    shake(model)
    model(tokens).float().square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert generate(model, tokens, max_new_tokens=2, stop_ids=()).shape == (2, 11)


def test_dora_over_int8_is_dora_over_its_floats():
    plain = make_model("llama").double()
    quantized = quantize(copy.deepcopy(plain))
    for (_, q), (_, p) in zip(
        (x for x in quantized.named_modules() if isinstance(x[1], Int8Linear)),
        (x for x in plain.named_modules() if x[0].endswith("_proj")),
    ):
        p.weight.data = q.weight.double() * q.scale
    torch.manual_seed(1)
    shake(add_dora(plain, targets="all-linear"))
    add_dora(quantized, targets="all-linear")
    trained = [p for p in plain.parameters() if p.requires_grad]
    mine = [p for p in quantized.parameters() if p.requires_grad]
    with torch.no_grad():
        for to, source in zip(mine, trained, strict=True):
            to.copy_(source)
    tokens = random_tokens(2, 9)
    # |W| was measured in the int8 layer's float32
    assert_close(quantized(tokens), plain(tokens), rtol=0, atol=1e-5)


def test_what_needs_a_weight_refuses_int8():
    for message, add in {
        "has no plain one of its own": add_pissa,
        "holds no plain weight, so no row": partial(
            add_trainable_tokens, tokens={"layers.0.mlp.up_proj": [1]}
        ),
        "has no plain weights to train in full": partial(
            add_lora, modules_to_save=["up_proj"]
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            add(quantize(make_model("llama")))
    model = add_lora(quantize(make_model("llama")))
    with pytest.raises(ValueError, match="q_proj is Int8Linear, which holds no plain"):
        merge(model)


def test_dtype_is_the_layers_or_what_is_asked_for():
    model = make_model("llama").bfloat16()
    add_lora(model, dtype=torch.float32)
    assert model.layers[0].self_attn.q_proj.a.dtype == torch.float32
    assert model(random_tokens(2, 5)).dtype == torch.bfloat16
    model = make_model("llama")
    add_lora(model)
    with torch.autocast(random_tokens(1, 1).device.type, torch.bfloat16):
        model(random_tokens(2, 5)).float().sum().backward()
    assert model.layers[0].self_attn.q_proj.b.grad.dtype == torch.float32


def test_dropout_is_for_training_only():
    model = shake(add_lora(make_model("llama"), dropout=0.5))
    tokens = random_tokens(2, 9)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_lora_plus_gives_b_a_higher_rate():
    model = add_lora(make_model("llama"), trainable_tokens=[5])
    rest, fast = lora_plus_groups(model, lr=1e-3, ratio=16)
    assert fast["lr"] == 16e-3 and rest["lr"] == 1e-3
    assert len(fast["params"]) == 4 and len(rest["params"]) == 5
    torch.optim.AdamW([rest, fast])


def two(family: str = "llama", **changes) -> nn.Module:
    """A model with adapters anna and bob, of different rank and places."""
    model = make_model(family, **changes).double()
    shake(add_lora(model, 4, 8, "all-linear", name="anna"))
    model.requires_grad_(False)
    shake(add_lora(model, 2, 8, ("q_proj", "up_proj"), name="bob"))
    return model


def alone(model: nn.Module, name: str | None, tokens: Tensor) -> Tensor:
    if name is None:
        with disabled(model):
            return model(tokens)
    return set_adapter(model, name)(tokens)


def test_adapters_are_switched_by_name():
    model, tokens = two(), random_tokens(2, 9)
    assert adapter_names(model) == ["anna", "bob"]
    anna, bob = alone(model, "anna", tokens), alone(model, "bob", tokens)
    assert (anna - bob).abs().max() > 1e-2
    assert trainable_parameters(model) == sum(
        m.a.numel() + m.b.numel() for m in model.modules()
        if isinstance(m, LoRALinear) and m.spec.name == "bob"
    )  # fmt: skip
    remove_adapter(model, "bob")
    assert torch.equal(alone(model, "anna", tokens), anna)


def test_weighted_adapters_add_up():
    model, tokens = two(), random_tokens(2, 9)
    set_adapter(model, {"anna": 0.3, "bob": -0.5})
    mixed = model(tokens)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            factor = {"anna": 0.3, "bob": -0.5}[layer.spec.name]
            layer.b.data *= factor
    set_adapter(model, ["anna", "bob"])
    assert_close(model(tokens), mixed, rtol=0, atol=1e-12)
    merge(model, names=("anna", "bob"))
    assert_close(model(tokens), mixed, rtol=0, atol=1e-12)


def test_what_does_not_add_cannot_be_weighted():
    model = add_ia3(make_model("llama"))
    with pytest.raises(ValueError, match="weight 0.5 of 'default': ia3 adds nothing"):
        set_adapter(model, {"default": 0.5})


def test_two_doras_switch_and_stack():
    model, tokens = make_model("qwen2").double(), random_tokens(2, 9)
    shake(add_dora(model, name="one"))
    model.requires_grad_(False)
    alone_one = model(tokens)
    assert torch.equal(add_dora(model, name="two")(tokens), alone_one) is False
    set_adapter(model, "one")
    assert torch.equal(model(tokens), alone_one)


def test_the_hand_written_backward_is_right_and_may_be_derived_again():
    base = nn.Linear(6, 7).double().requires_grad_(False)
    x, a, b = (torch.randn(s, dtype=torch.double, requires_grad=True)
               for s in ((5, 6), (3, 6), (7, 3)))  # fmt: skip
    layer = lambda x, a, b: linear_with_low_rank(base, x, x, a, b, 0.7)
    assert torch.autograd.gradcheck(layer, (x, a, b))
    assert torch.autograd.gradgradcheck(layer, (x, a, b))
    frozen = lambda x, b: linear_with_low_rank(base, x, x, a.detach(), b, 0.7)
    assert torch.autograd.gradcheck(frozen, (x, b))
    assert torch.autograd.gradgradcheck(frozen, (x, b))


def test_who_learns_or_watches_below_a_lora_is_not_left_out():
    model = add_lora(make_model("qwen2"), 4, 8, "all-linear")
    attention, tokens = model.layers[1].self_attn, random_tokens(2, 9)
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    seen = []
    q.base.bias.requires_grad_(True)
    k.base.register_full_backward_hook(lambda *_: seen.append("backward"))
    plain = v.base.forward
    v.base.forward = lambda x: seen.append("forward") or plain(x)
    model(tokens).square().mean().backward()
    assert q.base.bias.grad is not None and q.base.bias.grad.any()
    assert sorted(seen) == ["backward", "forward"]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap
@pytest.mark.parametrize("dora", [False, True])
def test_functions_of_the_parameters_can_be_transformed(dora):
    """torch.func: gradients and a batch of models."""
    model, tokens = make_model("llama").double(), random_tokens(2, 9)
    shake(add_lora(model, 4, 8, "all-linear", dora=dora))
    learned = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (tokens,)).square().mean()

    loss(dict(model.named_parameters())).backward()
    for name, grad in torch.func.grad(loss)(learned).items():
        assert_close(grad, model.get_parameter(name).grad, rtol=0, atol=1e-12)
    stacked = {n: torch.stack([p, 2 * p]) for n, p in learned.items()}
    assert_close(torch.func.vmap(loss)(stacked)[0], loss(learned))


def test_a_row_of_zeros_does_not_make_dora_nan():
    model, tokens = make_model("llama"), random_tokens(2, 9)
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[3] = 0
    before = model(tokens)
    add_lora(model, 4, 8, "all-linear", dora=True)
    assert torch.equal(model(tokens), before)
    logits = shake(model)(tokens)
    assert logits.isfinite().all()
    assert_close(merge(model)(tokens), logits, rtol=1e-4, atol=1e-4)


ROWS = ["bob", None, "anna", "anna", "bob"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gated"])
def test_each_row_takes_its_own_adapter(family):
    model, tokens = two(family), random_tokens(5, 9)
    expected = [alone(model, n, tokens[i : i + 1]) for i, n in enumerate(ROWS)]
    with disabled(model):
        base = model(tokens)
    mix_adapters(model)
    with adapter_rows(model, ROWS), torch.no_grad():
        assert_close(model(tokens), torch.cat(expected), rtol=0, atol=1e-10)
        for kind in ({}, {"kind": StaticCaches}):
            caches = model.new_caches(5, 16, **kind)
            parts = [model(t, caches=caches) for t in tokens.split([6, 1, 2], 1)]
            assert_close(torch.cat(parts, 1), torch.cat(expected), rtol=0, atol=1e-10)
    assert torch.equal(model(tokens), base)


def test_new_rows_write_where_the_old_ones_were():
    """So a captured graph, which knows addresses only, sees the new rows."""
    model, tokens = two(), random_tokens(5, 9)
    wanted = [alone(model, n, tokens[i : i + 1]) for i, n in enumerate(ROWS)]
    set_rows(mix_adapters(model), [None] * 5)
    layer = model.layers[0].self_attn.k_proj
    before = layer.row_b.data_ptr(), layer.siblings.a.data_ptr()
    with torch.inference_mode():
        model(tokens)
    set_rows(model, torch.tensor([1, -1, 0, 0, 1]))
    assert (layer.row_b.data_ptr(), layer.siblings.a.data_ptr()) == before
    assert_close(model(tokens), torch.cat(wanted), rtol=0, atol=1e-10)


def test_rows_compile_to_one_graph_and_new_ids_make_no_other():
    model, tokens = two(), random_tokens(3, 9)
    set_rows(mix_adapters(model), [0, 1, None])
    backend = CountingBackend()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(tokens), model(tokens))
        set_rows(model, [1, 1, 0])
        assert_close(compiled(tokens), model(tokens))
    assert backend.graphs == 1


def test_a_step_of_rows_is_one_graph():
    model, tokens = two().float(), random_tokens(3, 1)
    set_rows(mix_adapters(model), [0, 1, None])
    backend = CountingBackend()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(tokens), model(tokens))
        set_rows(model, [1, None, 0])
        assert_close(compiled(tokens), model(tokens))
    assert backend.graphs == 1


@pytest.mark.parametrize("T", [1, 9])
def test_who_watches_the_base_of_mixed_rows_sees_its_own_output(T):
    model, tokens = two(), random_tokens(2, T)
    set_rows(mix_adapters(model), ["anna", "bob"])
    base, seen = model.layers[0].self_attn.k_proj.base, []
    with torch.no_grad():
        expected = model(tokens)
        base.register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
        assert_close(model(tokens), expected, rtol=0, atol=1e-12)
        ((x, y),) = seen
        assert torch.equal(y, x @ base.weight.t())


def test_rows_of_adapters_in_another_dtype_than_the_model():
    """As far from the float32 model as a model with one adapter: rounding, no more."""
    model, tokens = make_model("llama").bfloat16(), random_tokens(2, 9)
    for name in ("anna", "bob"):
        add_lora(model, 4, 8, "all-linear", name=name, dtype=torch.float32)
        shake(model).requires_grad_(False)
    exact = set_adapter(copy.deepcopy(model).float(), "anna")(tokens[:1])
    alone = set_adapter(model, "anna")(tokens[:1])
    set_rows(mix_adapters(model), ["anna", "bob"])
    with torch.no_grad():
        mixed = model(tokens)
        caches = model.new_caches(2, 9)
        parts = [model(part, caches=caches) for part in tokens.split([8, 1], 1)]
    assert mixed.dtype == torch.bfloat16
    rounding = (alone.float() - exact).norm()
    for y in (mixed, torch.cat(parts, 1)):
        assert (y[:1].float() - exact).norm() < 2 * rounding < 0.2 * exact.norm()


def test_rows_launch_few_operations():
    """Queries, keys and values share one product down; each layer adds with one up."""
    model, tokens = two(), random_tokens(3, 1)
    set_rows(mix_adapters(model), [0, 1, None])
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.__name__.split(".")[0]
            self.seen[name] = self.seen.get(name, 0) + 1
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Count() as count:
        model(tokens)
    assert count.seen["baddbmm_"] == 2 * 7 and count.seen["bmm"] <= 2 * 4 + 2 * 2


def test_wrong_rows_are_refused():
    model, tokens = two(), random_tokens(3, 9)
    with pytest.raises(ValueError, match="mixes no adapters"):
        set_rows(model, [0])
    with pytest.raises(ValueError, match=r"names=\['eve'\] must be some of anna, bob"):
        mix_adapters(model, ["eve"])
    mix_adapters(model)
    with pytest.raises(ValueError, match="adapter 'mixed' .* has no beginning to go"):
        reset_adapters(model)
    with pytest.raises(ValueError, match="row 'eve' is no adapter; they are anna, bob"):
        set_rows(model, ["eve"])
    with pytest.raises(ValueError, match="row 2 is no adapter"):
        set_rows(model, [0, 2])
    set_rows(model, [0, 1])
    with pytest.raises(ValueError, match=r"\(3, 9, 32\) does not fit 2 rows"):
        model(tokens)
    dora = add_dora(make_model("llama"))
    with pytest.raises(ValueError, match="is a DoRALinear; rows mix plain LoRA"):
        mix_adapters(dora)


def test_rslora_scales_by_the_root_of_the_rank():
    model = add_lora(make_model("llama"), 16, 8, rslora=True)
    assert model.layers[0].self_attn.q_proj.scale == 8 / math.sqrt(16)
