"""The slot `self_attn.core`: a model does not notice which attention fills it."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from minllama.architecture.cache import Caches, StaticCaches
from minllama.architecture.kernels import interpreting, launches
from minllama.architecture.layout import Layout, packed
from minllama.architecture.model import AttentionCore, MinimalLlama
from minllama.architecture.surgery import replace_modules
from minllama.fast_ops.flash_core import FlashCore
from tests.conftest import (
    DEVICE,
    CountingBackend,
    make_model,
    random_tokens,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32, two blocks and a head deep


def with_flash(model: MinimalLlama) -> MinimalLlama:
    def is_core(name: str, module: nn.Module) -> bool:
        return type(module) is AttentionCore

    return replace_modules(model, is_core, lambda _: FlashCore("triton"))


def documents() -> Layout:
    positions = torch.cat([torch.arange(n) for n in (4, 9, 1)])
    return packed(positions[None].to(DEVICE))


def gradients(model: MinimalLlama, tokens: Tensor, layout: Layout | None):
    logits = model(tokens, layout=layout)
    logits.square().mean().backward()
    grads = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    return logits.detach(), grads


@pytest.mark.parametrize("kind", ["triangle", "documents"])
def test_logits_and_gradients_are_those_of_the_hub(any_model, kind: str):
    tokens = random_tokens(1, 14)
    layout = documents() if kind == "documents" else None
    logits, grads = gradients(any_model, tokens, layout)
    before = launches.copy()
    fast_logits, fast_grads = gradients(with_flash(any_model), tokens, layout)
    if interpreting() or DEVICE == "cuda":
        after = launches - before
        assert after["_flash_forward"] == after["_flash_backward_keys"] == 2
    assert_close(fast_logits, logits, **CLOSE)
    for name, grad in fast_grads.items():
        assert_close(grad, grads[name], **CLOSE)


@pytest.mark.parametrize("kind", [Caches, StaticCaches])
@torch.no_grad()
def test_cached_logits_are_those_of_the_hub(any_model, kind: type[Caches]):
    """A prompt in two parts, the first too long for decoding; then single tokens."""
    tokens, parts = random_tokens(2, 19), (17, 1, 1)
    true = any_model(tokens)
    model = with_flash(any_model)
    before, caches = launches.copy(), model.new_caches(2, 30, kind=kind)
    pieces = [model(part, caches=caches) for part in tokens.split(parts, dim=1)]
    if interpreting() or DEVICE == "cuda":
        after = launches - before
        assert after["_flash_forward"] == 2 and after["_decode_split"] == 4
    assert_close(torch.cat(pieces, dim=1), true, **CLOSE)


@torch.no_grad()
def test_rows_of_different_length_decode_together():
    model = make_model("llama")
    tokens = random_tokens(2, 9)
    alone = [model(row[None])[:, -1] for row in (tokens[0], tokens[1, :6])]
    model = with_flash(model)
    caches = model.new_caches(2, 16, kind=StaticCaches)
    model(tokens[:, :8], caches=caches)
    caches.lengths.copy_(torch.tensor([8, 5]))
    last = torch.stack([tokens[0, 8], tokens[1, 5]])[:, None]
    assert_close(model(last, caches=caches)[:, 0], torch.cat(alone), **CLOSE)


@pytest.mark.filterwarnings("ignore")  # of PyTorch about itself, where it traces
@torch.no_grad()
def test_one_compiled_step_serves_all_lengths():
    model = with_flash(make_model("llama", n_layers=1))
    caches = model.new_caches(2, 16, kind=StaticCaches)
    tokens = random_tokens(2, 5)
    true = model(tokens)
    model(tokens[:, :2], caches=caches)  # caches are allocated here
    backend = CountingBackend()
    step = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    steps = [step(token, caches=caches) for token in tokens[:, 2:].split(1, dim=1)]
    assert backend.graphs == 1
    assert_close(torch.cat(steps, dim=1), true[:, 2:], **CLOSE)


def heads(T: int, S: int, d: int = 16, values: int = 16, **kind) -> list[Tensor]:
    shapes = ((1, T, 4, d), (1, S, 2, d), (1, S, 2, values))
    return [torch.randn(shape, device=DEVICE, **kind) for shape in shapes]


class Prefixed(Layout):
    """A mask that is no interval: of another chapter, say."""

    def mask(self, S: int) -> Tensor:
        seen = super().mask(S).clone()
        seen[..., 0] = True
        return seen


def triangle(T: int, kind: type[Layout] = Layout) -> Layout:
    return kind(positions=torch.arange(T, device=DEVICE)[None])


def test_what_the_kernels_do_not_know_goes_to_the_hub():
    before = launches.copy()
    layout, core, plain = triangle(9), FlashCore("triton"), AttentionCore()
    wider = heads(9, 9, values=24)
    double = heads(9, 9, dtype=torch.float64)
    last = torch.arange(9, device=DEVICE)[None]
    prefixed = Prefixed(positions=last, first=last, last=last)
    for inputs, seen in (
        (wider, layout), (double, layout), (heads(9, 9), prefixed),
        ([x.to("meta") for x in heads(9, 9)], layout),
    ):  # fmt: skip
        y, true = core(*inputs, seen), plain(*inputs, seen)
        assert y.shape == true.shape and y.dtype == true.dtype
        if y.device.type != "meta":
            assert_close(y, true, rtol=0, atol=0)
    assert launches == before


def test_autocast_is_followed():
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = FlashCore("triton")(*heads(20, 20), triangle(20))
    assert y.dtype == torch.bfloat16


def test_a_wish_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="prefer='cudnn'"):
        FlashCore("cudnn")  # type: ignore[arg-type]
    assert "prefer='triton'" in repr(FlashCore("triton"))


def test_names_and_weights_stay_as_they_were():
    model = make_model("llama")
    names = list(model.state_dict())
    assert list(with_flash(model).state_dict()) == names


@pytest.mark.skipif(DEVICE != "cuda", reason="which one is faster is a GPU's question")
def test_the_fastest_gives_the_same_in_bfloat16():
    inputs = heads(300, 300, d=64, values=64, dtype=torch.bfloat16)
    ours = FlashCore("triton")(*inputs, triangle(300))
    fastest = FlashCore()(*inputs, triangle(300))
    assert_close(ours, fastest, rtol=2**-6, atol=2**-6)
