"""One graph serves every step: nothing in the model depends on how far a text is."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from minllama.architecture.cache import Caches, StaticCaches
from minllama.architecture.layout import packed
from minllama.architecture.model import MinimalLlama
from tests.conftest import DEVICE, MODELS, CountingBackend, make_model, random_tokens


@pytest.fixture(params=MODELS)
def model(request) -> MinimalLlama:
    """Each kind of model once: whether it is tied makes no other graph."""
    return make_model(request.param).double()


def started(model: MinimalLlama, tokens: Tensor, lengths: list[int]) -> StaticCaches:
    """Caches that have seen rows of different length."""
    caches = model.new_caches(len(lengths), 32, StaticCaches)
    model(tokens, caches=caches)
    caches.lengths.copy_(torch.tensor(lengths))
    return caches


def packing(*lengths: int) -> Tensor:
    return torch.cat([torch.arange(n, device=DEVICE) for n in lengths])[None]


@torch.no_grad()
def test_a_decoding_step_is_one_graph_for_all_positions(model):
    backend = CountingBackend()
    tokens, lengths = random_tokens(3, 11), [5, 11, 8]
    caches, eager = (started(model, tokens, lengths) for _ in range(2))

    @torch.compile(fullgraph=True, dynamic=False, backend=backend)
    def step(token: Tensor, caches: Caches) -> Tensor:
        return model(token, caches=caches)

    for _ in range(9):
        token = random_tokens(3, 1)
        got, expected = step(token, caches), model(token, caches=eager)
        assert_close(got, expected, rtol=0, atol=1e-12)
    assert caches.lengths.tolist() == [14, 20, 17]
    other = started(model, tokens, [11, 2, 7])
    step(random_tokens(3, 1), other)
    assert backend.graphs == 1


@torch.no_grad()
def test_a_prefill_of_one_length_is_one_graph():
    model, backend = make_model("llama").double(), CountingBackend()
    prefill = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    for _ in range(3):
        tokens = random_tokens(2, 9)
        for rows in (Caches, StaticCaches):
            caches = model.new_caches(2, 16, rows)
            got = prefill(tokens, caches=caches, at=-1)
            assert_close(got[:, 0], model(tokens)[:, -1], rtol=0, atol=1e-12)
            assert (caches.length or caches.lengths[0]) == 9
    assert backend.graphs == 2  # one a kind


def test_training_is_one_graph_packed_or_not(model):
    backend = CountingBackend()
    train = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    tokens = random_tokens(2, 12)

    def gradients(model, layout=None) -> list[Tensor]:
        loss = model(tokens, layout=layout).square().mean()
        return torch.autograd.grad(loss, list(model.parameters()))

    assert_close(gradients(train), gradients(model))
    for lengths in ([5, 4, 3], [12], [1, 1, 10]):
        layout = packed(packing(*lengths))
        assert_close(gradients(train, layout), gradients(model, layout))
    assert backend.graphs == 2  # the triangle, and intervals of any kind


def test_autocast_training_is_one_graph():
    model, backend = make_model("qwen3"), CountingBackend()
    train = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    tokens, layout = random_tokens(2, 12), packed(packing(5, 7))
    for _ in range(2):
        with torch.autocast(DEVICE, torch.bfloat16):
            got = train(tokens, layout=layout)
            expected = model(tokens, layout=layout)
        assert_close(got, expected)
    assert backend.graphs == 1


@pytest.mark.parametrize("name", ["llama", "mistral"])
@torch.no_grad()
def test_lengths_may_vary_in_one_graph(name):
    """Marked dynamic, T is a symbol: no triangle decides by its value."""
    model, backend = make_model(name).double(), CountingBackend()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for T in (9, 12, 17):
        tokens = random_tokens(2, T)
        layout = packed(packing(4, T - 4))
        for given in (None, layout):
            got, expected = (m(tokens, layout=given) for m in (compiled, model))
            assert_close(got, expected, rtol=0, atol=1e-12)
    assert backend.graphs == 2  # the triangle, and intervals


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # its own
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@torch.no_grad()
def test_generated_code_decodes_as_eager_code_does():
    """Inductor, the real thing: ten steps, and none past the end."""
    model = make_model("llama", n_layers=1)
    tokens = random_tokens(2, 16)
    caches = model.new_caches(2, 16, StaticCaches)
    model(tokens[:, :6], caches=caches)

    @torch.compile(fullgraph=True, dynamic=False)
    def step(token: Tensor) -> Tensor:
        return model(token, caches=caches)

    expected = model(tokens)
    for i in range(6, 16):
        got = step(tokens[:, i : i + 1])
        assert_close(
            got[:, 0], expected[:, i], rtol=0, atol=1e-4
        )  # float32, other kernels
    if DEVICE == "cpu":  # a GPU asserts, which ends the process
        with pytest.raises(RuntimeError, match="index out of bounds"):
            step(tokens[:, :1])
