"""What holds for every Llama: causality, shapes, ties, dtypes, gradients."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from minllama.architecture.config import LlamaConfig
from minllama.architecture.families import FAMILIES, Mistral, Qwen2, Qwen3
from minllama.architecture.layout import Layout
from minllama.architecture.model import (
    AttentionCore,
    FeedForward,
    MinimalLlama,
    RMSNorm,
)
from minllama.architecture.rope import Rotation
from tests.conftest import (
    DEVICE,
    MODELS,
    GatedLlama,
    make_model,
    random_tokens,
    tiny_config,
    widen,
)


def triangle(T: int, start: int = 0) -> Layout:
    return Layout(positions=torch.arange(start, start + T, device=DEVICE)[None])


# ---- Causality


def test_future_tokens_do_not_matter(any_model):
    tokens = random_tokens(2, 19)
    changed = tokens.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % 97
    with torch.no_grad():
        before, after = any_model(tokens), any_model(changed)
    assert_close(after[:, :11], before[:, :11], rtol=0, atol=1e-5)
    assert (after[:, 11:] != before[:, 11:]).flatten(2).any(-1).all()


def test_no_gradient_comes_from_the_future(any_model):
    x = any_model.embed(random_tokens(1, 13)).detach().requires_grad_()
    hidden = any_model.hidden_states(None, embeds=x)
    (dx,) = torch.autograd.grad(hidden[:, 6].square().sum(), x)
    size = dx.abs().sum(-1)[0]  # (T,)
    assert (size[7:] == 0).all() and (size[:7] > 0).all()


def test_a_window_reaches_as_far_as_its_layers_hand_on():
    """N layers of a window of 4: N * 3 tokens back, and not one more."""
    model = make_model("mistral", sliding_window=4, n_layers=3)
    x = model.embed(random_tokens(1, 20)).detach().requires_grad_()
    hidden = model.hidden_states(None, embeds=x)
    (dx,) = torch.autograd.grad(hidden[:, 15].square().sum(), x)
    reached = (dx.abs().sum(-1)[0] > 0).nonzero().flatten().tolist()
    assert reached == list(range(15 - 3 * 3, 16))


def test_rows_do_not_meet(any_model):
    any_model.double()
    tokens = random_tokens(3, 9)
    with torch.no_grad():
        together = any_model(tokens)
        alone = torch.cat([any_model(row[None]) for row in tokens])
    assert_close(together, alone, rtol=0, atol=1e-12)


def test_only_distances_between_positions_matter(any_model):
    """Shifted by 100 tokens; float32 angles differ by about 100 * 2^-24."""
    any_model.double()
    tokens = random_tokens(2, 19)
    with torch.no_grad():
        here = any_model(tokens, layout=triangle(19))
        there = any_model(tokens, layout=triangle(19, start=100))
        order = any_model(tokens.flip(1), layout=triangle(19)).flip(1)
    scale = here.abs().max()
    assert (there - here).abs().max() / scale < 1e-4
    assert (order - here).abs().max() / scale > 0.1


# ---- What forward takes and gives


def test_at_gives_a_slice_of_all_logits(any_model):
    tokens = random_tokens(3, 9)
    rows, places = torch.arange(3), torch.tensor([2, 0, 8])
    with torch.no_grad():
        logits = any_model(tokens)
        for at in (-1, 0, 4):
            expected = logits[:, at, None]
            assert_close(any_model(tokens, at=at), expected, rtol=0, atol=1e-5)
        got = any_model(tokens, at=places.to(DEVICE))
    assert_close(got, logits[rows, places][:, None], rtol=0, atol=1e-5)


def test_at_spares_the_head_all_other_tokens(any_model):
    shapes = []
    any_model.lm_head.register_forward_pre_hook(lambda _, x: shapes.append(x[0].shape))
    any_model(random_tokens(2, 9), at=-1)
    assert shapes == [(2, 1, 32)]


def test_embeds_stand_for_tokens(any_model):
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        x = any_model.embed(tokens)
        assert torch.equal(any_model(None, embeds=x), any_model(tokens))
        caches = any_model.new_caches(2, 9)
        any_model(tokens[:, :4], caches=caches)
        got = any_model(None, caches=caches, embeds=x[:, 4:])
        assert_close(got, any_model(tokens)[:, 4:], rtol=0, atol=1e-5)


def test_logits_are_the_head_of_the_hidden_states(any_model):
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        hidden = any_model.hidden_states(tokens)
        assert hidden.shape == (2, 9, 32)
        assert torch.equal(any_model.lm_head(hidden), any_model(tokens))


@pytest.mark.parametrize(
    ("inputs", "shape"),
    [
        ({"tokens": None}, "None"),
        ({"tokens": torch.zeros(7, dtype=torch.long)}, r"\(7,\)"),
        ({"tokens": torch.zeros(2, 7, 32)}, r"\(2, 7, 32\)"),
        ({"tokens": None, "embeds": torch.zeros(7, 32)}, r"\(7, 32\)"),
        ({"tokens": None, "embeds": torch.zeros(2, 7, 32, 1)}, r"\(2, 7, 32, 1\)"),
    ],
)
def test_inputs_of_another_shape_are_refused(inputs, shape):
    model = make_model("llama")
    for call in (model, model.hidden_states):
        with pytest.raises(ValueError, match=f"input of shape {shape}: give tokens"):
            call(**inputs)


@pytest.mark.parametrize("T", [1, 2, 7])
def test_texts_of_any_length_work(any_model, T):
    assert any_model(random_tokens(1, T)).shape == (1, T, 97)


def test_a_model_holds_no_state_between_calls(any_model):
    tokens = random_tokens(2, 9)
    before = {name: weight.clone() for name, weight in any_model.state_dict().items()}
    with torch.no_grad():
        first = any_model(tokens)
        any_model(random_tokens(3, 4), caches=any_model.new_caches(3, 8))
        assert torch.equal(any_model(tokens), first)
    after = any_model.state_dict()
    assert before.keys() == after.keys() and not list(any_model.buffers())
    assert all(torch.equal(before[name], after[name]) for name in before)


# ---- The parts, each against its definition in float64


def test_rms_norm_is_its_formula_and_torchs():
    norm = widen(RMSNorm(33, 1e-3)).double()
    x = torch.randn(2, 5, 33, dtype=torch.float64)
    mean = (x * x).sum(-1, keepdim=True) / 33
    assert_close(norm(x), norm.weight * x / (mean + 1e-3).sqrt(), rtol=0, atol=1e-15)
    torchs = nn.RMSNorm(33, 1e-3).double()
    torchs.load_state_dict(norm.state_dict())
    assert_close(norm(x), torchs(x), rtol=0, atol=0)


def test_rms_norm_ignores_the_scale_and_keeps_zero():
    norm = widen(RMSNorm(33, 1e-12))
    x = torch.randn(2, 33)
    assert_close(norm(1000 * x), norm(x))
    assert torch.equal(norm(torch.zeros(2, 33)), torch.zeros(2, 33))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_computes_its_statistics_in_float32(dtype):
    """The mean of 4,096 squares of 200 overflows float16 and rounds in bfloat16."""
    x = (200 + torch.randn(3, 4096)).to(dtype).to(DEVICE)
    norm = RMSNorm(4096, 1e-5).to(DEVICE, dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    eps = torch.finfo(dtype).eps
    assert_close(norm(x).double(), exact, rtol=eps, atol=0)


def test_feed_forward_is_swiglu():
    mlp = widen(FeedForward(tiny_config())).double()
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    expected = (gate / (1 + (-gate).exp()) * up) @ mlp.down_proj.weight.T
    assert_close(mlp(x), expected, rtol=0, atol=1e-13)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """A loop over rows, tokens and heads; keys are taken one by one."""
    (B, T, H, d), (S, K) = q.shape, k.shape[1:3]
    first, last = (x.expand(B, T) for x in layout.interval(S))
    y = torch.zeros(B, T, H, v.size(-1), dtype=q.dtype)
    for b in range(B):
        for t in range(T):
            keys = range(int(first[b, t]), int(last[b, t]) + 1)
            for h in range(H):
                own = h // (H // K)
                scores = [float(q[b, t, h] @ k[b, s, own]) / math.sqrt(d) for s in keys]
                weights = [math.exp(score) for score in scores]
                for s, weight in zip(keys, weights):
                    y[b, t, h] += weight / sum(weights) * v[b, s, own]
    return y


@pytest.mark.parametrize("K", [4, 2, 1])
@pytest.mark.parametrize(
    "layout",
    [
        triangle(5),
        triangle(3, start=2),
        triangle(1, start=4),
        triangle(5).within(2, 5),
        Layout(positions=torch.tensor([[3], [1]]), last=torch.tensor([[3], [1]])),
        Layout(
            positions=torch.tensor([[3, 4], [1, 2]]),
            last=torch.tensor([[3, 4], [1, 2]]),
            first=torch.tensor([[0, 3], [1, 1]]),
        ),
    ],
    ids=["whole", "chunk", "step", "window", "step in slots", "slots"],
)
@pytest.mark.skipif(DEVICE != "cpu", reason="the layouts above are on the CPU")
def test_the_attention_core_is_a_naive_loop(layout, K):
    T, S = layout.positions.size(1), 5
    q = torch.randn(2, T, 4, 6, dtype=torch.float64)
    k, v = torch.randn(2, 2, S, K, 6, dtype=torch.float64)
    got = AttentionCore()(q, k, v, layout)
    assert_close(got, naive_attention(q, k, v, layout), rtol=0, atol=1e-14)


@pytest.mark.parametrize("T", [1, 3, 5])
def test_values_may_be_wider_than_keys(T):
    """Latent and differential attention need it, at a step as at a prefill."""
    q, k = torch.randn(2, T, 4, 6), torch.randn(2, 5, 2, 6)
    v = torch.randn(2, 5, 2, 10)
    layout = Layout(positions=torch.arange(5 - T, 5)[None])
    got = AttentionCore()(q, k, v, layout)
    assert_close(got, naive_attention(q, k, v, layout))


# ---- Weights


def test_random_weights_keep_the_stream_from_growing_with_depth():
    model = MinimalLlama(tiny_config(dim=128, n_layers=8, n_heads=4, ffn_dim=320))
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert_close(weight.std().item(), 0.02 / 4, rtol=0.05, atol=0)
        elif weight.dim() > 1:
            assert_close(weight.std().item(), 0.02, rtol=0.05, atol=0)
        else:
            assert (weight == 1).all()


def test_an_untrained_model_knows_nothing(any_model):
    """Its loss is that of a guess among all tokens, log V."""
    fresh = type(any_model)(any_model.config).to(DEVICE)
    tokens = random_tokens(4, 65)
    with torch.no_grad():
        logits = fresh(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() - math.log(97)) < 0.05


def test_the_same_seed_draws_the_same_weights():
    a, b = (torch.manual_seed(3) and MinimalLlama(tiny_config()) for _ in range(2))
    for x, y in zip(a.parameters(), b.parameters()):
        assert torch.equal(x, y)


def test_every_parameter_learns(any_model):
    any_model(random_tokens(2, 19)).square().mean().backward()
    for name, weight in any_model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


# ---- Ties


def is_tied(model: MinimalLlama) -> bool:
    return model.lm_head.weight is model.embed_tokens.weight


def test_a_tie_is_what_the_config_says(any_model):
    assert is_tied(any_model) == any_model.config.tie_embeddings


def test_a_tied_head_counts_and_learns_once():
    tied, untied = (make_model("llama", tie_embeddings=tie) for tie in (True, False))
    counts = [sum(p.numel() for p in m.parameters()) for m in (tied, untied)]
    assert counts[1] - counts[0] == 97 * 32
    tokens = random_tokens(2, 9)
    untied.load_state_dict(tied.state_dict())
    for model in (tied, untied):
        model(tokens).square().mean().backward()
    both = untied.embed_tokens.weight.grad + untied.lm_head.weight.grad
    assert_close(tied.embed_tokens.weight.grad, both)


def test_a_deep_copy_keeps_the_tie_and_shares_nothing(any_model):
    twin = copy.deepcopy(any_model)
    assert is_tied(twin) == is_tied(any_model)
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        before = any_model(tokens)
        assert torch.equal(twin(tokens), before)
        for weight in twin.parameters():
            weight.mul_(2)
        assert torch.equal(any_model(tokens), before)


def test_a_tie_survives_moving_and_casting():
    model = make_model("llama", tie_embeddings=True)
    assert is_tied(model.double().to(DEVICE).bfloat16())


def test_a_tie_is_made_anew_after_assign_loading_and_to_empty(any_model):
    weights = any_model.state_dict()
    with torch.device("meta"):
        model = type(any_model)(any_model.config)
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    assert is_tied(model) == any_model.config.tie_embeddings
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(model(tokens), any_model(tokens))
    model.to_empty(device=DEVICE).tie_weights()
    assert is_tied(model) == any_model.config.tie_embeddings


def test_to_empty_alone_unties():
    """So that `tie_weights` in the test above is not for nothing."""
    with torch.device("meta"):
        model = MinimalLlama(tiny_config(tie_embeddings=True))
    assert is_tied(model)
    assert not is_tied(model.to_empty(device="cpu"))


def test_a_rewritten_head_is_not_tied_away():
    class Int8Linear(nn.Linear):
        pass

    model = make_model("llama", tie_embeddings=True)
    model.lm_head = Int8Linear(32, 97, bias=False)
    with pytest.raises(ValueError, match="lm_head is Int8Linear"):
        model.tie_weights()
    untied = make_model("llama")
    untied.lm_head = Int8Linear(32, 97, bias=False)
    untied.tie_weights()  # nothing to tie, nothing to refuse


# ---- Meta device


def test_a_model_of_the_meta_device_has_no_buffer_to_repair(any_model):
    with torch.device("meta"):
        model = type(any_model)(any_model.config)
    assert all(weight.is_meta for weight in model.state_dict().values())
    assert list(model.state_dict()) == list(any_model.state_dict())
    model.load_state_dict(any_model.state_dict(), assign=True)
    assert not list(model.buffers())
    assert not any(weight.is_meta for weight in model.parameters())


def test_a_forward_pass_on_the_meta_device_gives_shapes(any_model):
    any_model.to("meta")
    tokens = torch.empty(2, 9, dtype=torch.long, device="meta")
    assert any_model(tokens).shape == (2, 9, 97)


# ---- Dtypes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_have_the_dtype_of_the_weights(any_model, dtype):
    assert any_model.to(dtype)(random_tokens(2, 5)).dtype == dtype


def test_bfloat16_logits_are_near_the_float32_ones(any_model):
    tokens = random_tokens(2, 19)
    with torch.no_grad():
        exact = any_model(tokens)
        rounded = any_model.bfloat16()(tokens).float()
    # a number is rounded by up to 2^-9, some ten times in a row, and grows no worse
    assert (rounded - exact).norm() / exact.norm() < 10 * 2**-8


def test_float64_is_float64_throughout(any_model):
    """A rounding to float32 anywhere would bury a change of 1e-12 in the input."""
    any_model.double()
    x = any_model.embed(random_tokens(1, 6)).detach()
    step = torch.zeros_like(x)
    step[0, 2] = 1e-12
    with torch.no_grad():
        once = any_model.hidden_states(None, embeds=x + step)
        twice = any_model.hidden_states(None, embeds=x + 2 * step)
        base = any_model.hidden_states(None, embeds=x)
    change = once - base
    assert change[0, 2:].abs().max() > 1e-14
    # a line at this scale, down to the rounding of numbers of size 10
    assert_close(twice - base, 2 * change, rtol=0, atol=1e-13)


def test_gradients_are_those_of_finite_differences(any_model):
    """A step of 1e-6 is seen in float64; float32's roundings are as large as it."""
    any_model.double()
    x = any_model.embed(random_tokens(1, 4)).detach().requires_grad_()
    direction, h = torch.randn_like(x), 1e-6
    hidden = any_model.hidden_states(None, embeds=x)
    weights = torch.randn_like(hidden)
    (dx,) = torch.autograd.grad((hidden * weights).sum(), x)
    with torch.no_grad():
        up = any_model.hidden_states(None, embeds=x + h * direction)
        down = any_model.hidden_states(None, embeds=x - h * direction)
    slope = ((up - down) / (2 * h) * weights).sum()
    assert_close(slope, (dx * direction).sum(), rtol=1e-6, atol=1e-6)


def test_gradcheck_of_a_whole_model():
    model = make_model(
        "qwen3", dim=4, n_heads=2, n_kv_heads=1, head_dim=4, ffn_dim=4
    ).double()
    x = torch.randn(1, 3, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    torch.autograd.gradcheck(lambda x: model(None, embeds=x), x)


def test_autocast_trains_without_a_warning(any_model):
    """bfloat16 activations meet float32 norms in there (Qwen3's heads)."""
    torch.set_warn_always(True)  # else only the first model of a process could warn
    try:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = any_model(random_tokens(2, 9)).float().square().mean()
        loss.backward()
    finally:
        torch.set_warn_always(False)
    assert all(weight.grad.isfinite().all() for weight in any_model.parameters())


# ---- Which class builds a config


def test_a_config_is_built_by_the_class_it_names():
    classes = {
        "llama": MinimalLlama,
        "qwen2": Qwen2,
        "qwen3": Qwen3,
        "mistral": Mistral,
    }
    assert FAMILIES == classes
    for name, family in classes.items():
        config = tiny_config(model_type=name)
        assert type(MinimalLlama.from_config(config)) is family
    assert type(MinimalLlama.from_config(tiny_config())) is MinimalLlama


def test_a_subclass_builds_itself():
    class MyQwen(Qwen2):
        pass

    class Newcomer(MinimalLlama):
        model_type = "newcomer"

    assert type(GatedLlama.from_config(tiny_config(model_type="llama"))) is GatedLlama
    assert type(MyQwen.from_config(tiny_config(model_type="qwen2"))) is MyQwen
    assert type(Qwen2.from_config(tiny_config())) is Qwen2
    assert type(Newcomer.from_config(tiny_config())) is Newcomer
    assert type(Newcomer.from_config(tiny_config(model_type="newcomer"))) is Newcomer


def test_a_config_of_another_class_is_refused():
    with pytest.raises(ValueError, match="model_type='qwen3' is not what MinimalLlama"):
        MinimalLlama(tiny_config(model_type="qwen3"))
    with pytest.raises(
        ValueError, match="'qwen3' is not what GatedLlama .* from Qwen3"
    ):
        GatedLlama.from_config(tiny_config(model_type="qwen3"))
    with pytest.raises(ValueError, match="model_type='gpt2' is none of llama, mistral"):
        MinimalLlama.from_config(tiny_config(model_type="gpt2"))


@pytest.mark.parametrize("family", [MinimalLlama, Qwen2, Qwen3])
def test_a_window_is_refused_where_none_is_built(family):
    with pytest.raises(
        ValueError, match=f"sliding_window=7 .* not by {family.__name__}"
    ):
        family(tiny_config(sliding_window=7))


def test_from_name_and_meta_build_the_real_thing():
    with torch.device("meta"):
        model = MinimalLlama.from_config(LlamaConfig.from_name("qwen3-0.6b"))
    assert type(model) is Qwen3 and is_tied(model)
    tokens = torch.empty(1, 5, dtype=torch.long, device="meta")
    assert model(tokens).shape == (1, 5, 151936)


def test_the_rotation_is_made_once_for_all_layers(any_model):
    calls = []
    any_model.rope.register_forward_hook(lambda *_: calls.append(1))
    any_model(random_tokens(2, 5))
    assert len(calls) == 1


def test_a_rotation_of_another_kind_reaches_every_layer():
    """A fused rope overrides `turn_both`; attention calls nothing else."""
    calls = []

    class Counting(Rotation):
        def turn_both(self, q, k):
            calls.append(q.shape[1])
            return super().turn_both(q, k)

    model = make_model("llama")
    plain = model.rope.forward
    model.rope.forward = lambda positions: Counting(*plain(positions))
    model(random_tokens(2, 5))
    assert calls == [5, 5]


def test_a_model_made_on_meta_is_drawn_whole():
    """Norms and biases too: memory that nothing wrote may hold anything."""
    for name in ("llama", "qwen2", "qwen3"):
        family, settings = MODELS[name]
        with torch.device("meta"):
            model = family(tiny_config(**settings))
        model.to_empty(device="cpu")
        for weight in model.parameters():
            torch.nn.init.constant_(weight, torch.nan)
        model.init_weights()
        model.tie_weights()
        assert all(weight.isfinite().all() for weight in model.parameters())
        assert torch.equal(model.norm.weight, torch.ones(32))
