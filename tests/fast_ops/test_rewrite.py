"""`use_fast_ops`: same outputs, gradients and names; nothing foreign is touched."""

import copy
import logging
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from minllama.architecture.cache import Caches, StaticCaches
from minllama.architecture.data import IGNORE, Batch
from minllama.architecture.dropout import add_dropout
from minllama.architecture.kernels import HAS_TRITON, interpreting, launches
from minllama.architecture.layout import packed
from minllama.architecture.model import Block, FeedForward, MinimalLlama, RMSNorm
from minllama.architecture.rope import Rope, Rotation
from minllama.architecture.surgery import replace_modules
from minllama.architecture.train import next_token_loss
from minllama.fast_ops import fast_loss, fast_ops_report, rewrite, use_fast_ops
from minllama.fast_ops.flash_core import FlashCore
from tests.conftest import DEVICE, make_model, random_tokens, tiny_config, widen

pytestmark = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not interpreting()),
    reason="kernels need Triton, and without a GPU its interpreter",
)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32; peaked attention multiplies roundings


def make_batch() -> Batch:
    """A row of two documents, one longer than Mistral's window; a target is ignored."""
    positions = torch.tensor([[0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8]], device=DEVICE)
    targets = random_tokens(1, 11)
    targets[:, 3] = IGNORE
    return Batch(random_tokens(1, 11), targets, positions)


class LoRALinear(nn.Module):
    """base(x) + B A x."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(2, base.in_features, device=DEVICE) / 6)
        self.b = nn.Parameter(torch.randn(base.out_features, 2, device=DEVICE) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def add_lora(model: nn.Module) -> nn.Module:
    names = ("q_proj", "gate_proj", "down_proj", "lm_head")
    return replace_modules(
        model, lambda name, _: name.split(".")[-1] in names, LoRALinear
    )


def test_fast_ops_change_no_output_and_no_gradient(any_model):
    fast, batch = copy.deepcopy(any_model), make_batch()
    assert use_fast_ops(fast) is fast
    assert list(fast.state_dict()) == list(any_model.state_dict())
    layout = packed(batch.positions)
    launches.clear()
    assert_close(
        fast(batch.tokens, layout=layout),
        any_model(batch.tokens, layout=layout),
        **CLOSE,
    )
    kernels = {"_rms_norm_forward", "_rope", "_swiglu_forward"}
    assert kernels <= set(launches), "a reference ran"
    expected, got = next_token_loss(any_model, batch), fast_loss(fast, batch)
    assert_close(got, expected, rtol=1e-5, atol=1e-4)
    expected.backward()
    got.backward()
    for (name, x), y in zip(fast.named_parameters(), any_model.parameters()):
        assert x.grad is not None and y.grad is not None, name
        assert (x.grad - y.grad).abs().max() <= 1e-4 * y.grad.abs().max(), name


@pytest.mark.parametrize("kind", [Caches, StaticCaches])
@torch.no_grad()
def test_cached_logits_equal_uncached(kind):
    model = use_fast_ops(make_model("qwen3"))
    tokens = random_tokens(2, 11)
    expected = model(tokens)
    caches = model.new_caches(2, 11, kind)
    pieces = [model(part, caches=caches) for part in tokens.split([4, 1, 6], dim=1)]
    assert_close(torch.cat(pieces, dim=1), expected, **CLOSE)


@pytest.mark.parametrize("first", ["lora", "fast"])
def test_lora_may_come_before_or_after(first):
    model = make_model("llama")
    tokens = random_tokens(1, 7)
    if first == "lora":
        add_lora(model)
        expected = model(tokens)
        use_fast_ops(model)
    else:
        use_fast_ops(model)
        expected = add_lora(model)(tokens)  # a linear layer is called in both
        assert fast_ops_report(model)["left"] == []
    assert_close(model(tokens), expected, **CLOSE)
    loss = fast_loss(model, make_batch())  # through the adapted head
    loss.backward()
    assert model.lm_head.b.grad is not None


def test_frozen_norms_get_no_gradient():
    model = use_fast_ops(make_model("llama")).requires_grad_(False)
    add_lora(model)
    launches.clear()
    fast_loss(model, make_batch()).backward()
    assert "_sum_rows" not in launches and "_rms_norm_backward" in launches


class OnePlusNorm(RMSNorm):
    """Gemma's: the weight is what is beyond one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x * 0.1


class ReLUFeedForward(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x).relu() * self.up_proj(x))


class ForeignBlock(Block):
    norm_class = OnePlusNorm
    feed_forward_class = ReLUFeedForward


class ForeignLlama(MinimalLlama):
    block_class = ForeignBlock


def test_what_a_subclass_overrides_is_left():
    model = widen(ForeignLlama(tiny_config())).to(DEVICE)
    tokens = random_tokens(2, 9)
    expected = model(tokens)
    use_fast_ops(model)
    report = fast_ops_report(model)
    left = {name.split(".")[-1] for name in report["left"]}
    assert left == {"input_layernorm", "post_attention_layernorm", "mlp", "norm"}
    assert "rope" in report["fast"]
    assert_close(model(tokens), expected, **CLOSE)


def test_a_norm_that_is_replaced_later_is_called():
    model = use_fast_ops(make_model("llama"))
    plain = make_model("llama")
    plain.load_state_dict(model.state_dict())
    for m in (model, plain):
        norm = OnePlusNorm(32, 1e-5).to(DEVICE)
        m.layers[0].post_attention_layernorm = norm
    tokens = random_tokens(2, 9)
    assert_close(model(tokens), plain(tokens), **CLOSE)


def test_a_forward_put_on_the_module_itself_is_left():
    model = make_model("llama")
    mlp = model.layers[1].mlp
    mlp.forward = lambda x: 0 * x  # type: ignore[method-assign]
    use_fast_ops(model)
    assert type(mlp) is FeedForward
    assert fast_ops_report(model)["left"] == ["layers.1.mlp"]


def test_hooks_stay():
    model = add_dropout(make_model("llama"), 0.5).train()
    use_fast_ops(model)
    tokens = random_tokens(1, 9)
    assert not torch.equal(model(tokens), model(tokens))


def watch(module: nn.Module, how: str, seen: list) -> None:
    """Put something on a norm that sees what goes in and what comes out."""
    if how == "hook":
        module.register_forward_hook(lambda _, x, y: seen.append((x[0], y)))
        module.register_forward_hook(lambda _, x, y: 0.5 * y)
    elif how == "pre-hook":
        module.register_forward_pre_hook(lambda _, x: seen.append(x))
    elif how == "backward hook":
        module.register_full_backward_hook(lambda _, dx, dy: seen.append((*dx, *dy)))
    elif how == "backward pre-hook":
        module.register_full_backward_pre_hook(lambda _, dy: seen.append(dy))
    else:
        run = module.forward
        module.forward = lambda x: seen.append((x, y := run(x))) or y


@pytest.mark.parametrize(
    "how", ["hook", "pre-hook", "backward hook", "backward pre-hook", "forward"]
)
def test_who_watches_a_norm_sees_what_it_saw(how):
    """The addition before a norm is not done by one that somebody looks at."""
    model, tokens, runs = make_model("llama"), random_tokens(2, 9), []
    plain = copy.deepcopy(model)
    for one in (plain, use_fast_ops(model)):
        watch(one.layers[0].post_attention_layernorm, how, seen := [])
        logits = one(tokens)
        logits.square().mean().backward()
        runs.append((logits, *seen))
    for a, b in zip(*runs, strict=True):
        assert_close(a, b, **CLOSE)


def test_activation_checkpointing_gives_the_same_gradients():
    model, batch = use_fast_ops(make_model("llama")), make_batch()
    fast_loss(model, batch).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for layer in model.layers:
        run = layer.forward
        layer.forward = lambda *x, run=run: checkpoint(run, *x, use_reentrant=False)
    fast_loss(model, batch).backward()
    for p, grad in zip(model.parameters(), expected):
        assert torch.equal(p.grad, grad)


@pytest.mark.filterwarnings("ignore")  # of PyTorch about itself, where it traces
def test_a_compiled_block_is_one_graph():
    model, batch = use_fast_ops(make_model("llama")), make_batch()
    fast_loss(model, batch).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for layer in model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    fast_loss(model, batch).backward()
    for p, grad in zip(model.parameters(), expected):
        assert_close(p.grad, grad, rtol=1e-5, atol=1e-5)


def test_autocast_computes_in_bfloat16():
    """Weights in float32, products in bfloat16: gradients are float32."""
    model, batch = use_fast_ops(make_model("llama")), make_batch()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = fast_loss(model, batch)
        expected = next_token_loss(model, batch)
    assert_close(loss, expected, rtol=2e-2, atol=0)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_twice_is_once(caplog):
    model = make_model("mistral")
    with caplog.at_level(logging.INFO, "minllama.fast_ops.rewrite"):
        use_fast_ops(model)
    assert "2 FastMistralBlock" in caplog.text and "left: none" in caplog.text
    kinds = [type(module) for module in model.modules()]
    assert [type(module) for module in use_fast_ops(model).modules()] == kinds


def test_copies_and_checkpoints_come_back(tmp_path):
    model = use_fast_ops(make_model("qwen2"))
    tokens = random_tokens(1, 5)
    assert torch.equal(copy.deepcopy(model)(tokens), model(tokens))
    model.save_pretrained(tmp_path)
    again = MinimalLlama.from_pretrained(tmp_path, device=DEVICE)
    assert_close(again(tokens), model(tokens), **CLOSE)


@pytest.mark.parametrize("family", ["llama", "mistral", "gated"])
def test_a_pickled_model_comes_back(family):
    """In another process, too, where nothing was rewritten yet."""
    model, tokens = use_fast_ops(make_model(family)), random_tokens(1, 5)
    kinds = [type(module).__name__ for module in model.modules()]
    stored = pickle.dumps(model)
    rewrite._fast_class.cache_clear()
    again = pickle.loads(stored)
    assert [type(module).__name__ for module in again.modules()] == kinds
    assert torch.equal(again(tokens), model(tokens))
    assert fast_ops_report(again) == fast_ops_report(model)
    assert type(pickle.loads(pickle.dumps(again.layers[0]))) is type(again.layers[0])


def test_a_model_without_anything_to_fuse_is_refused():
    with pytest.raises(ValueError, match="Names in this model: 0, 1"):
        use_fast_ops(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def test_an_unknown_preference_is_refused():
    with pytest.raises(ValueError, match="prefer='slow'"):
        use_fast_ops(make_model("llama"), prefer="slow")  # type: ignore[arg-type]


def test_once_more_changes_the_preference():
    model = use_fast_ops(use_fast_ops(make_model("llama")), prefer="triton")
    assert {m.prefer for m in model.modules() if isinstance(m, FlashCore)} == {"triton"}


class Capped(MinimalLlama):
    """Logits within -5 .. 5."""

    def forward(self, tokens, *args, **kwargs):
        return 5 * torch.tanh(super().forward(tokens, *args, **kwargs) / 5)


def test_the_loss_is_that_of_the_models_own_forward():
    model = use_fast_ops(Capped(tiny_config()).to(DEVICE))
    batch = make_batch()
    assert_close(fast_loss(model, batch), next_token_loss(model, batch))


@pytest.mark.parametrize("how", ["forward", "backward hook", "backward pre-hook"])
def test_who_watches_the_head_is_asked(how):
    model, batch = use_fast_ops(make_model("llama")), make_batch()
    head = model.lm_head
    if how == "forward":
        head.forward = lambda x: 3 * torch.tanh(x @ head.weight.T)
        assert_close(fast_loss(model, batch), next_token_loss(model, batch))
        return
    seen = []
    register = {
        "backward hook": head.register_full_backward_hook,
        "backward pre-hook": head.register_full_backward_pre_hook,
    }[how]
    register(lambda *args: seen.append(how))
    fast_loss(model, batch).backward()
    assert seen == [how]


def test_a_rope_that_learns_goes_on_learning():
    class Learned(Rope):
        def __init__(self, *args):
            super().__init__(*args)
            self.stretch = nn.Parameter(torch.ones(()))

        def forward(self, positions):
            cos, sin = super().forward(positions)
            return Rotation(cos * self.stretch, sin * self.stretch)

    model = make_model("llama")
    d = model.config.head_dim
    replace_modules(model, lambda _, m: type(m) is Rope, lambda _: Learned(d, 100.0))
    model = use_fast_ops(model.to(DEVICE))
    fast_loss(model, make_batch()).backward()
    learned = [m for m in model.modules() if isinstance(m, Learned)]
    assert learned and all(m.stretch.grad.abs() > 0 for m in learned)
