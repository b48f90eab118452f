"""Predicted bytes and FLOPs against what model, autograd and allocator really do."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from minllama.architecture.accounting import (
    PARTS,
    Format,
    cache_bytes,
    count_parameters,
    decode_bytes,
    forward_flops,
    forward_flops_by_part,
    parameters_by_part,
    peak_flops,
    seen_keys,
    training_flops,
    weight_bytes,
)
from minllama.architecture.accounting_peak import (
    moments,
    optimizer_bytes,
    prefill_bytes,
    training_peak,
)
from minllama.architecture.accounting_training import (
    TrainingStep,
    saved_bytes,
    state_bytes,
)
from minllama.architecture.config import REGISTRY, LlamaConfig
from minllama.architecture.data import Batch
from minllama.architecture.families import FAMILIES
from minllama.architecture.model import FeedForward, MinimalLlama, RMSNorm
from minllama.architecture.optim import make_adamw, make_muon
from minllama.architecture.train import next_token_loss
from minllama.cli import main
from minllama.recipes.memory import MemoryOptions, report
from tests.conftest import tiny_config

LLAMA_1B = LlamaConfig.from_name("llama-3.2-1b")
KINDS = [("float32", False), ("bfloat16", False), ("float32", True)]  # dtype, autocast


def make(family="llama", dtype="float32", **changes) -> MinimalLlama:
    """On the CPU, where the allocator can be listened to."""
    window = {"sliding_window": 7} if family == "mistral" else {}
    wide = {"head_dim": 12} if family == "qwen3" else {}
    config = tiny_config(model_type=family, **{**window, **wide, **changes})
    return MinimalLlama.from_config(config).to(getattr(torch, dtype))


def make_batch(vocab_size: int, B: int, T: int) -> Batch:
    tokens = torch.randint(0, vocab_size, (B, T))
    return Batch(tokens, tokens.roll(-1, 1), torch.arange(T).expand(B, T).contiguous())


def plain_loss(model: nn.Module, batch: Batch) -> Tensor:
    """`next_token_loss` where every row is one text."""
    logits = model(batch.tokens).flatten(0, 1).float()
    return F.cross_entropy(logits, batch.targets.flatten(), reduction="sum")


class FusedNorm(torch.autograd.Function):
    """RMSNorm that keeps what CUDA's kernel keeps: x, w, 1 / rms.

    Eight rows at a time, so that its temporaries are too small to be seen.
    """

    @staticmethod
    def forward(ctx, x, w, eps):
        y, rstd = torch.empty_like(x), torch.empty(*x.shape[:-1], 1)
        for x8, y8, r8 in zip(*(t.flatten(0, -2).split(8) for t in (x, y, rstd))):
            r8.copy_((x8.float().square().mean(-1, keepdim=True) + eps).rsqrt())
            y8.copy_(x8.float() * r8 * w)
        ctx.save_for_backward(x, w, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w, rstd = ctx.saved_tensors
        dx, dw = torch.empty_like(x), torch.zeros(w.shape)
        rows = (t.flatten(0, -2).split(8) for t in (x, dx, rstd, dy))
        for x8, dx8, r8, dy8 in zip(*rows):
            unit, g = x8.float() * r8, dy8.float() * w
            dx8.copy_((g - unit * (g * unit).mean(-1, keepdim=True)) * r8)
            dw += (dy8.float() * unit).sum(0)
        return dx, dw.to(w.dtype), None


@pytest.fixture
def fused_norms(monkeypatch):
    """RMSNorm as on CUDA, where autocast runs it in float32."""

    def forward(self, x):
        x = x.float() if torch.is_autocast_enabled("cpu") else x
        return FusedNorm.apply(x, self.weight.to(x.dtype), self.eps)

    monkeypatch.setattr(RMSNorm, "forward", forward)


def allocator_peak(run) -> int:
    """Most bytes that `run` held at once beyond those that were there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [
        event
        for event in seen.profiler.kineto_results.events()  # type: ignore[union-attr]
        if event.name() == "[memory]"
    ]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


# Parameters and stored bytes


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_add_up_to_the_real_model(family, tied):
    model = make(family, tie_embeddings=tied)
    parts = parameters_by_part(model.config)
    assert tuple(parts) == PARTS
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    attention = [p for n, p in model.named_parameters() if "proj" in n and "attn" in n]
    assert parts["attention"] == sum(p.numel() for p in attention)
    assert parts["head"] == (0 if tied else model.lm_head.weight.numel())
    norms = [m for m in model.modules() if isinstance(m, RMSNorm)]
    assert parts["norms"] == sum(m.weight.numel() for m in norms)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.1-8b", 8_030_261_248),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen3-0.6b", 596_049_920),
    ],
)
def test_registered_models_have_their_published_counts(name, count):
    assert count_parameters(REGISTRY[name]) == count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weight_bytes_are_those_of_the_real_model(family, dtype):
    model = make(family, dtype)
    real = sum(p.nbytes for p in model.parameters())
    assert sum(weight_bytes(model.config, Format(dtype=dtype)).values()) == real


@pytest.mark.parametrize(
    ("format", "bits"),
    [
        ({"dtype": "int4", "group_size": 128}, 4.125),
        ({"dtype": "int4", "group_size": 128, "zero_bits": 4}, 4.15625),
        ({"dtype": "int4", "group_size": 32, "zero_bits": 16}, 5.0),
        ({"dtype": "nf4"}, 4.25),
        ({"dtype": "int8"}, 8 + 16 / 2048),
        ({"dtype": "bfloat16"}, 16),
    ],
)
def test_bits_per_weight_count_scales_and_zero_points(format, bits):
    assert Format(**format).row_bytes(2048) * 8 / 2048 == bits


@pytest.mark.parametrize("length", [1, 7, 128, 129, 1025])
def test_a_short_last_group_has_a_scale_of_its_own(length):
    groups = len(torch.arange(length).split(128))
    expected = (length + 1) // 2 + 2 * groups
    assert Format(dtype="int4", group_size=128).row_bytes(length) == expected


def test_embedding_head_and_vectors_stay_16_bit_unless_said():
    config = tiny_config(model_type="qwen2")
    plain, small = (weight_bytes(config, Format(dtype=d)) for d in ("bfloat16", "int4"))
    for part in ("embedding", "norms", "head"):
        assert small[part] == plain[part]
    whole = weight_bytes(config, Format(dtype="int4"), Format(dtype="int4"))
    assert whole["head"] == config.vocab_size * (config.dim // 2 + 2)
    biases = sum(p.nbytes for n, p in make("qwen2", "bfloat16").named_parameters()
                 if n.endswith("bias"))  # fmt: skip
    rows, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    matrices = (rows + 2 * kv) * (config.dim // 2 + 2) + config.dim * (rows // 2 + 2)
    assert small["attention"] == config.n_layers * matrices + biases


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cache_bytes_are_those_of_the_real_cache(family, dtype):
    model = make(family, dtype)
    caches = model.new_caches(3, 25)
    with torch.no_grad():
        model(torch.zeros(3, 7, dtype=torch.long), caches=caches)
    real = sum(layer.k.nbytes + layer.v.nbytes for layer in caches.layers)
    assert cache_bytes(model.config, 3, 25, Format(dtype=dtype)) == real


def test_a_step_reads_matrices_and_cache_but_one_row_of_an_untied_table():
    for tied in (True, False):
        config = tiny_config(tie_embeddings=tied)
        weights = weight_bytes(config, Format())
        table = config.vocab_size * config.dim * 2
        expected = 1000 + sum(weights.values()) - (0 if tied else table - 3 * 64)
        assert decode_bytes(config, weights, batch_size=3, cache=1000) == expected


# FLOPs


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_seen_keys_are_those_of_a_naive_count(window):
    config = tiny_config(sliding_window=window, model_type="mistral")
    for new in (1, 2, 7):
        for context in range(new, 12):
            naive = sum(min(s + 1, window or 99) for s in range(context - new, context))
            assert seen_keys(config, new, context) == naive


def counted(run) -> tuple[int, int]:
    """FLOPs that PyTorch counts: of the model's matrices, of attention's products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    flops = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in flops.items() if "bmm" in str(op))
    return sum(flops.values()) - attention, attention


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_flops_agree_with_the_flop_counter(family):
    """Matrices exactly. Of attention it counts all T x T pairs, masked or not."""
    T = 33
    model = make(family)
    products, attention = counted(lambda: model(torch.zeros(2, T, dtype=torch.long)))
    parts = forward_flops_by_part(model.config, T)
    ours = parts.pop("scores and values")
    assert products == 2 * sum(parts.values())
    assert attention * seen_keys(model.config, T, T) == 2 * ours * T * T > 0


def test_flops_of_a_decoding_step_agree_with_the_flop_counter():
    model = make("qwen3")
    caches = model.new_caches(2, 20)
    with torch.no_grad():
        model(torch.zeros(2, 19, dtype=torch.long), caches=caches)
        step = counted(lambda: model(torch.zeros(2, 1, dtype=torch.long), caches))
    parts = forward_flops_by_part(model.config, 1, 20)
    assert step[1] == 2 * parts.pop("scores and values") > 0
    assert step[0] == 2 * sum(parts.values())


def test_training_flops_are_three_times_those_of_the_forward_pass():
    model, T = make(), 33
    batch = make_batch(97, 2, T)
    forward = counted(lambda: plain_loss(model, batch))
    step = counted(lambda: plain_loss(model, batch).backward())
    assert step == (3 * forward[0], 3 * forward[1])
    assert training_flops(model.config, T) == 3 * forward_flops(model.config, T)
    assert forward_flops(model.config, T) * T == sum(
        forward_flops_by_part(model.config, T).values()
    )


def test_the_peak_rate_of_a_cpu_is_unknown():
    assert peak_flops("cpu") is None


# What autograd keeps


def kept_by_autograd(model, batch, loss, autocast=False) -> int:
    """Bytes of all storages saved for the backward pass, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor  # alive: no address twice
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        loss(model, batch)
    storages = {at: t.untyped_storage() for at, t in saved.items()}
    return sum(s.nbytes() for at, s in storages.items() if at not in parameters)


UNSEEN = 8  # bytes a token of the batch's positions, which autograd has no need of
LOOSE = 4  # bytes: the number of targets, a float32


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("dtype", "autocast"), KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_bytes_are_what_autograd_keeps(family, dtype, autocast, packed):
    model, batch = make(family, dtype, n_layers=3), make_batch(97, 3, 41)
    loss = next_token_loss if packed else plain_loss
    kept = kept_by_autograd(model, batch, loss, autocast)
    step = TrainingStep(
        batch_size=3, seq_len=41, dtype=dtype, autocast=autocast, packed=packed,
        device="cpu",
    )  # fmt: skip
    casts = 3 * 4 * 12 if autocast and family == "qwen3" else 0  # weights of q, k norms
    assert saved_bytes(model.config, step) == kept + UNSEEN * 3 * 41 - LOOSE - casts


@pytest.mark.parametrize(("dtype", "autocast"), KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.usefixtures("fused_norms")
def test_saved_bytes_are_exact_with_norms_as_on_cuda(family, dtype, autocast):
    model, batch = make(family, dtype), make_batch(97, 1, 7)
    kept = kept_by_autograd(model, batch, next_token_loss, autocast)
    step = TrainingStep(batch_size=1, seq_len=7, dtype=dtype, autocast=autocast)
    assert saved_bytes(model.config, step) == kept + UNSEEN * 7 - LOOSE


def test_one_tensor_more_in_a_block_is_noticed(monkeypatch):
    def wasteful(self, x):
        gate = F.silu(self.gate_proj(x)).exp().log()  # exp keeps its result
        return self.down_proj(gate * self.up_proj(x))

    monkeypatch.setattr(FeedForward, "forward", wasteful)
    model, batch = make(), make_batch(97, 3, 41)
    step = TrainingStep(batch_size=3, seq_len=41, dtype="float32", device="cpu")
    kept = kept_by_autograd(model, batch, next_token_loss) + UNSEEN * 3 * 41 - LOOSE
    wasted = kept - saved_bytes(model.config, step)
    # log keeps exp's result, exp the same; silu's is not kept as the product's factor
    assert wasted == model.config.n_layers * 3 * 41 * model.config.ffn_dim * 4


# The fullest moment

SHAPES = {  # where each moment is the fullest
    "many words": {"vocab_size": 4001, "T": 64, "B": 2},
    "few words": {"vocab_size": 31, "T": 64, "B": 2},
    "few tokens": {"vocab_size": 4001, "T": 3, "B": 1},
}


def run_step(model, batch, autocast, accumulate=1):
    for _ in range(accumulate):
        micro = Batch(*(part.clone() for part in vars(batch).values()))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = next_token_loss(model, micro)
        loss.backward()
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("how", ["", "checkpointing", "accumulate"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("dtype", "autocast"), KINDS)
@pytest.mark.usefixtures("fused_norms")
def test_the_peak_is_that_of_the_allocator(dtype, autocast, tied, shape, how):
    B, T, V = (SHAPES[shape][key] for key in ("B", "T", "vocab_size"))
    model = make(
        dtype=dtype, vocab_size=V, tie_embeddings=tied,
        dim=64, n_heads=8, n_kv_heads=2, ffn_dim=256,
    )  # fmt: skip
    if how == "checkpointing":
        for layer in model.layers:
            layer.forward = again_later(layer.forward)
    batch = make_batch(V, B, T)
    accumulate = 2 if how == "accumulate" else 1
    run_step(model, batch, autocast)  # the first call allocates what stays
    measured = allocator_peak(lambda: run_step(model, batch, autocast, accumulate))
    step = TrainingStep(
        batch_size=B, seq_len=T, dtype=dtype, autocast=autocast,
        checkpointing=how == "checkpointing", accumulate=how == "accumulate",
    )  # fmt: skip
    expected = max(sum(held.values()) for held in moments(model.config, step).values())
    # A CPU packs the inputs of a bfloat16 product into scratch of its own. It shows
    # only where gradients that are there already leave little else at the peak.
    scratch = how == "accumulate" and (dtype == "bfloat16" or autocast)
    rel = 0.08 if scratch and shape != "many words" else 0.002
    assert measured == pytest.approx(expected, rel=rel)


def again_later(forward):
    def run(x, layout, cache=None):
        return checkpoint(
            forward, x, layout, cache, use_reentrant=False, preserve_rng_state=False
        )

    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [{"ffn_dim": 128}, {"n_kv_heads": 4, "ffn_dim": 24}])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimizer_takes_what_was_said(name, shape, dtype):
    model = make(dtype=dtype, **shape)
    optimizer = {"adamw": make_adamw, "muon": make_muon}[name](model, lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    step = TrainingStep(
        batch_size=1, seq_len=1, dtype=dtype, optimizer=name, device="cpu"
    )
    states = [t for state in optimizer.state.values() for t in state.values()]
    real = sum(t.nbytes for t in states if isinstance(t, Tensor) and t.dim())
    assert state_bytes(model.config, step) == real
    measured = allocator_peak(optimizer.step)
    assert measured == pytest.approx(optimizer_bytes(model.config, step), rel=0.002)


@pytest.mark.parametrize("ffn_dim", [384, 48])  # the feed-forward is widest, or rope
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.usefixtures("fused_norms")
def test_reading_a_prompt_takes_what_was_said(family, ffn_dim):
    model = make(family, dim=128, ffn_dim=ffn_dim, n_layers=3, head_dim=32)
    tokens, caches = torch.zeros(2, 129, dtype=torch.long), model.new_caches(2, 129)

    @torch.no_grad()
    def read():
        caches.length = 0
        model(tokens, caches=caches, at=-1)

    read()
    expected = prefill_bytes(model.config, 2, 129, size=4)
    assert allocator_peak(read) == pytest.approx(expected, rel=0.001)


def test_with_128256_words_the_loss_is_the_fullest_moment():
    step = TrainingStep(batch_size=4, seq_len=4096)
    name, parts = training_peak(LLAMA_1B, step)
    assert name == "backward of cross-entropy"
    assert parts["log p and two gradients"] == 12 * 128256 * 4 * 4096
    assert parts["weights"] == parts["optimizer"] / 2 == 2 * 1_235_814_400


def test_checkpointing_and_one_text_a_row_take_less():
    step = TrainingStep(batch_size=1, seq_len=4096)
    whole = saved_bytes(LLAMA_1B, step)
    assert saved_bytes(LLAMA_1B, replace(step, packed=False)) < whole
    assert saved_bytes(LLAMA_1B, replace(step, checkpointing=True)) < whole / 3


# What is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "int4"}, "dtype='int4' cannot train"),
        ({"state_dtype": "int8"}, "state_dtype='int8' cannot train"),
        ({"optimizer": "sgd"}, "optimizer='sgd'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"autocast": True}, "autocast=True with dtype='bfloat16'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seq_len": 0}, "seq_len=0"),
    ],
)
def test_a_step_that_cannot_be_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        TrainingStep(**{"batch_size": 1, "seq_len": 8, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "int3"}, "dtype='int3'"),
        ({"dtype": "int4", "group_size": 0}, "group_size=0"),
        ({"dtype": "int4", "zero_bits": -1}, "zero_bits=-1"),
        ({"dtype": "bfloat16", "group_size": 64}, "has no groups, but group_size=64"),
    ],
)
def test_a_format_that_cannot_be_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Format(**changes)


# The command


def test_memory_tells_each_part_the_total_and_where_it_fits(capsys):
    words = ["memory", "llama-3.1-8b", "--dtype", "int4", "--seq-len", "4096"]
    assert main([*words, "--bandwidth", "4608"]) == 0
    out = capsys.readouterr().out
    for word in (*PARTS, "cache", "prompt", "total", "4.125 bits", "tokens/s", "TFLOP"):
        assert word in out
    assert "24 GB, RTX 4090  yes" in out


def test_memory_of_training_names_the_fullest_moment(capsys):
    words = "memory llama-3.1-8b --training --seq-len 2048 --checkpointing --tensors"
    assert main(words.split()) == 0
    out = capsys.readouterr().out
    assert "The fullest moment is the" in out and "silu(gate)" in out
    assert "48 GB, L40S      no" in out and "141 GB, H200     yes" in out


def test_memory_reads_the_config_of_a_shipped_model():
    table = report(MemoryOptions(name="stories-mini"))
    assert table.startswith("stories-mini · ") and "MiB" in table


def test_more_rows_need_more_memory_and_8_bits_less():
    def total(**changes) -> float:
        table = report(MemoryOptions(name="llama-3.2-1b", seq_len=8192, **changes))
        [line] = [line for line in table.splitlines() if "total" in line][:1]
        return float(line.split()[0])

    assert total(dtype="int8") < total() < total(batch_size=2)
    assert total(cache_dtype="int8") < total() < total(dtype="float32")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("memory lama", "'lama' is no folder and no known model"),
        ("memory llama-3.2-1b --batch-size 0", "batch_size=0 must be above 0"),
        ("memory llama-3.2-1b --training --dtype nf4", "dtype='nf4' cannot train"),
    ],
)
def test_memory_refuses_in_one_line(capsys, words, told):
    assert main(words.split()) == 2
    assert told in capsys.readouterr().err
