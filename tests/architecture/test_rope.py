"""Rope turns pairs by p * speed, keeps lengths, and tells distances only."""

import math

import pytest
import torch
import transformers
from torch.testing import assert_close
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minllama.architecture.config import LlamaConfig, llama3_scaling
from minllama.architecture.rope import Llama3Rope, Rope, Rotation, make_rope
from tests.conftest import DEVICE, SCALING, tiny_config

LLAMAS = ["llama-3.1-8b", "llama-3.2-1b"]


def positions(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, device=DEVICE)


def exact_speeds(head_dim: int, theta: float) -> torch.Tensor:
    """(d/2,) in float64."""
    return theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def test_each_pair_turns_as_a_complex_number():
    """(low + i high) e^(i p speed), in float64 with Python's own numbers."""
    d, theta, at = 10, 100.0, 17
    x = torch.randn(1, 1, 3, d, dtype=torch.float64, device=DEVICE)
    turned = Rope(d, theta)(positions([at])).turn(x)
    for i, speed in enumerate(exact_speeds(d, theta)):
        angle = complex(math.cos(at * speed), math.sin(at * speed))
        for head in range(3):
            low, high = x[0, 0, head, i].item(), x[0, 0, head, i + d // 2].item()
            expected = complex(low, high) * angle
            got = complex(turned[0, 0, head, i], turned[0, 0, head, i + d // 2])
            assert abs(got - expected) < 1e-6  # the angles are float32


def test_position_zero_turns_nothing():
    x = torch.randn(2, 1, 3, 8, device=DEVICE)
    assert torch.equal(Rope(8, 1e4)(positions([0])).turn(x), x)


def test_turning_keeps_the_length_of_each_pair():
    x = torch.randn(2, 9, 3, 8, device=DEVICE)
    turned = Rope(8, 1e4)(torch.arange(9, device=DEVICE)[None]).turn(x)

    def lengths(y):
        return y.unflatten(-1, (2, 4)).norm(dim=-2)

    assert_close(lengths(turned), lengths(x))


@pytest.mark.parametrize("shift", [1, 10, 1000])
@pytest.mark.parametrize(
    "rope", [Rope(16, 1e4), Llama3Rope(16, 1e4, SCALING)], ids=["plain", "llama3"]
)
def test_scores_depend_on_the_distance_only(rope, shift):
    q, k = torch.randn(2, 1, 30, 1, 16, dtype=torch.float64, device=DEVICE)
    at = torch.arange(30, device=DEVICE)[None]

    def scores(start):
        here = rope(at + start)
        return here.turn(q)[:, :, 0] @ here.turn(k)[:, :, 0].mT

    # an angle of p radians is off by p * 2^-24, twice, in each of d = 16 channels
    bound = 16 * (30 + shift) * 2**-23
    assert (scores(shift) - scores(0)).abs().max() < bound


def test_turning_queries_and_keys_at_once_is_turning_each():
    for T in (1, 2, 7):
        q = torch.randn(3, T, 4, 8, device=DEVICE)
        k = torch.randn(3, T, 2, 8, device=DEVICE)
        here = Rope(8, 1e4)(torch.arange(5, 5 + T, device=DEVICE)[None])
        got_q, got_k = here.turn_both(q, k)
        assert_close(got_q, here.turn(q), rtol=0, atol=0)
        assert_close(got_k, here.turn(k), rtol=0, atol=0)


def test_rows_may_stand_at_different_positions():
    x = torch.randn(2, 3, 4, 8, device=DEVICE)
    rope = Rope(8, 1e4)
    both = rope(positions([4, 5, 6], [0, 1, 2])).turn(x)
    assert torch.equal(both[:1], rope(positions([4, 5, 6])).turn(x[:1]))
    assert torch.equal(both[1:], rope(positions([0, 1, 2])).turn(x[1:]))


def test_angles_stay_float32_under_a_bfloat16_default():
    at, speed = 1001, 1e4 ** (-6 / 16)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        here = Rope(16, 1e4)(positions([at]))
    finally:
        torch.set_default_dtype(before)
    assert here.cos.dtype == here.sin.dtype == torch.float32
    assert abs(here.cos[0, 0, 0, 3].item() - math.cos(at * speed)) < at * 2**-23


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precisions_are_rounded_once_at_the_end(dtype):
    """As float64 arithmetic on the same numbers, then rounded to the last place."""
    x = torch.randn(2, 9, 3, 8, device=DEVICE).to(dtype)
    here = Rope(8, 1e4)(torch.arange(9, device=DEVICE)[None])
    got, exact = here.turn(x), here.turn(x.double())
    assert got.dtype == dtype and exact.dtype == torch.float64
    eps = torch.finfo(dtype).eps
    assert_close(got.double(), exact, rtol=eps, atol=4e-7)  # sums near 0 cancel


def test_float64_is_not_rounded_to_float32():
    x = torch.randn(1, 5, 2, 6, dtype=torch.float64, device=DEVICE)
    here = Rope(6, 1e4)(torch.arange(5, device=DEVICE)[None])
    low, high = x.chunk(2, dim=-1)
    cos, sin = here.cos.double()[..., :3], here.sin.double()[..., 3:]
    expected = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
    assert_close(here.turn(x), expected, rtol=0, atol=1e-15)


def test_the_gradient_of_a_turn_is_the_turn_back():
    x = torch.randn(1, 4, 2, 6, dtype=torch.float64, device=DEVICE, requires_grad=True)
    here = Rope(6, 1e4)(torch.arange(4, device=DEVICE)[None])
    torch.autograd.gradcheck(here.turn, x)
    dy = torch.randn_like(x)
    (dx,) = torch.autograd.grad(here.turn(x), x, dy)
    assert_close(dx, Rotation(here.cos, -here.sin).turn(dy), rtol=0, atol=1e-15)


def test_amplitude_multiplies_queries_and_keys():
    class Loud(Rope):
        amplitude = 1.5

    x = torch.randn(1, 4, 2, 6, device=DEVICE)
    at = torch.arange(4, device=DEVICE)[None]
    assert_close(Loud(6, 1e4)(at).turn(x), 1.5 * Rope(6, 1e4)(at).turn(x))


def test_rope_owns_no_tensor():
    rope = Llama3Rope(8, 1e4, SCALING)
    assert not rope.state_dict() and not list(rope.buffers())


def test_rope_on_the_meta_device_gives_shapes():
    here = Rope(8, 1e4)(torch.empty(2, 5, dtype=torch.long, device="meta"))
    assert here.cos.shape == here.sin.shape == (2, 5, 1, 8)


# ---- Llama 3.1's scaling


@pytest.mark.parametrize("name", LLAMAS)
def test_llama3_speeds_are_those_of_transformers(name):
    config = LlamaConfig.from_name(name)
    settings = transformers.LlamaConfig(
        hidden_size=config.dim, num_attention_heads=config.n_heads,
        head_dim=config.head_dim, max_position_embeddings=config.max_seq_len,
        rope_parameters={**config.rope_scaling, "rope_theta": config.rope_theta},
    )  # fmt: skip
    expected, amplitude = ROPE_INIT_FUNCTIONS["llama3"](settings, "cpu")
    rope = make_rope(config)
    assert_close(rope.speeds(torch.zeros(1, 1)), expected, rtol=2e-7, atol=0)
    assert rope.amplitude == amplitude


@pytest.mark.parametrize("name", LLAMAS)
def test_llama3_speeds_follow_metas_formula_in_float64(name):
    """`apply_scaling` of llama-models, pair by pair, in Python's own numbers."""
    config = LlamaConfig.from_name(name)
    factor = config.rope_scaling["factor"]
    expected = []
    for speed in exact_speeds(config.head_dim, config.rope_theta).tolist():
        wavelength = 2 * math.pi / speed
        if wavelength < 8192 / 4:
            expected.append(speed)
        elif wavelength > 8192 / 1:
            expected.append(speed / factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * speed / factor + smooth * speed)
    got = make_rope(config).speeds(torch.zeros(1, 1))
    assert_close(got.double(), torch.tensor(expected).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scaling", [SCALING, llama3_scaling(32.0)])
def test_llama3_leaves_fast_pairs_and_divides_slow_ones(scaling):
    plain = Rope(64, 1e4).speeds(torch.zeros(1, 1))
    scaled = Llama3Rope(64, 1e4, scaling).speeds(torch.zeros(1, 1))
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    fast, slow = turns > 4, turns < 1
    between = ~fast & ~slow
    assert fast.any() and slow.any() and between.any()
    assert torch.equal(scaled[fast], plain[fast])
    assert torch.equal(scaled[slow], plain[slow] / scaling["factor"])
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / scaling["factor"]).all()
    assert (scaled.diff() < 0).all()  # the order of the pairs is kept


def test_factor_one_scales_nothing():
    one = Llama3Rope(64, 1e4, {**SCALING, "factor": 1.0}).speeds(torch.zeros(1, 1))
    assert_close(one, Rope(64, 1e4).speeds(torch.zeros(1, 1)), rtol=2e-7, atol=0)


def test_the_config_decides_which_rope():
    assert type(make_rope(tiny_config())) is Rope
    scaled = make_rope(tiny_config(rope_scaling={**SCALING, "factor": 3.0}))
    assert type(scaled) is Llama3Rope and scaled.factor == 3.0
