"""Meta's .pth and llama2.c's .bin, compared with a plain model that thinks in pairs."""

import json
import pickle
import struct

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from minllama.architecture.config import llama3_scaling
from minllama.architecture.model import MinimalLlama
from minllama.architecture.weights import open_weights
from minllama.architecture.weights_llama2c import save_llama2c
from minllama.architecture.weights_meta import save_meta, to_halves, to_neighbours
from tests.conftest import make_model, random_tokens

PARAMS = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 96,
    "multiple_of": 16,
    "norm_eps": 1e-5,
}


def meta_weights(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=96
):
    """A random model under Meta's names."""
    kv_dim = dim // n_heads * n_kv_heads
    shapes = {
        "tok_embeddings": (vocab_size, dim), "norm": (dim,), "output": (vocab_size, dim)
    }  # fmt: skip
    for i in range(n_layers):
        shapes |= {
            f"layers.{i}.attention_norm": (dim,),
            f"layers.{i}.attention.wq": (dim, dim),
            f"layers.{i}.attention.wk": (kv_dim, dim),
            f"layers.{i}.attention.wv": (kv_dim, dim),
            f"layers.{i}.attention.wo": (dim, dim),
            f"layers.{i}.ffn_norm": (dim,),
            f"layers.{i}.feed_forward.w1": (ffn_dim, dim),
            f"layers.{i}.feed_forward.w2": (dim, ffn_dim),
            f"layers.{i}.feed_forward.w3": (ffn_dim, dim),
        }
    return {
        f"{name}.weight": torch.randn(shape) / (shape[-1] ** 0.5 if shape[1:] else 2)
        for name, shape in shapes.items()
    }


def meta_logits(state, tokens, params):
    """What Meta's model computes, in float64: neighbours are complex numbers."""
    state = {name.removesuffix(".weight"): w.double() for name, w in state.items()}
    n_heads, n_kv_heads = params["n_heads"], params.get("n_kv_heads", params["n_heads"])
    head_dim = params["dim"] // n_heads
    pair = torch.arange(0, head_dim, 2).double()
    speed = params.get("rope_theta", 10000.0) ** -(pair / head_dim)
    T = tokens.size(1)
    turns = torch.polar(torch.ones(()).double(), torch.arange(T)[:, None] * speed)

    def norm(x, weight):
        return (
            x / (x.square().mean(-1, keepdim=True) + params["norm_eps"]).sqrt() * weight
        )

    def turn(x):  # (B, T, H, d)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns[:, None]).flatten(-2)

    x = state["tok_embeddings"][tokens]
    for i in range(params["n_layers"]):
        part = {k.removeprefix(f"layers.{i}."): w for k, w in state.items()}
        h = norm(x, part["attention_norm"])
        q, k, v = (
            (h @ part[f"attention.w{c}"].T).unflatten(-1, (-1, head_dim)) for c in "qkv"
        )
        q, k = turn(q), turn(k)
        k, v = (y.repeat_interleave(n_heads // n_kv_heads, 2) for y in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / head_dim**0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        mixed = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(-2)
        x = x + mixed @ part["attention.wo"].T
        h = norm(x, part["ffn_norm"])
        gate = nn.functional.silu(h @ part["feed_forward.w1"].T)
        x = x + (gate * (h @ part["feed_forward.w3"].T)) @ part["feed_forward.w2"].T
    return norm(x, state["norm"]) @ state.get("output", state["tok_embeddings"]).T


ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
COLUMNS = ("wo", "w2")


def write_meta(folder, state, params, shards=1, embedding_cut=0):
    """Cut by hand as Meta's tensor parallelism does."""
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    for index in range(shards):
        shard = {}
        for name, weight in state.items():
            part = name.removesuffix(".weight").split(".")[-1]
            cut = 0 if part in ROWS else 1 if part in COLUMNS else None
            cut = embedding_cut if part == "tok_embeddings" else cut
            if cut is not None:
                weight = weight.chunk(shards, dim=cut)[index].clone()
            shard[name] = weight
        shard["rope.freqs"] = torch.ones(4)
        torch.save(shard, folder / f"consolidated.{index:02}.pth")
    return folder


def load64(path):
    return MinimalLlama.from_pretrained(path, dtype=torch.float64)


@torch.no_grad()
def test_rows_go_to_halves_and_back():
    weight = torch.arange(48.0).reshape(24, 2)  # 3 heads of 8
    halves = to_halves(weight, 8)
    assert halves[:8, 0].tolist() == [0, 4, 8, 12, 2, 6, 10, 14]
    assert torch.equal(to_neighbours(halves, 8), weight)
    assert sorted(halves[8:16, 0].tolist()) == weight[8:16, 0].tolist()  # heads stay


@pytest.mark.parametrize("embedding_cut", [0, 1], ids=["llama3", "llama2"])
@pytest.mark.parametrize("shards", [1, 2])
@torch.no_grad()
def test_logits_equal_those_of_metas_model(shards, embedding_cut, tmp_path):
    state, tokens = meta_weights(), random_tokens(2, 19, 96).cpu()
    model = load64(write_meta(tmp_path, state, PARAMS, shards, embedding_cut))
    expected = meta_logits(state, tokens, PARAMS)
    assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)  # rope is float32
    for layer in model.layers:  # the comparison sees heads that were not permuted
        q = layer.self_attn.q_proj.weight
        q.copy_(to_neighbours(q, model.config.head_dim))
    with pytest.raises(AssertionError):
        assert_close(model(tokens), expected, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_what_llama1_left_out_of_its_params_is_found(tmp_path):
    state = meta_weights(n_kv_heads=4)
    params = {k: v for k, v in PARAMS.items() if k != "n_kv_heads"}
    params["vocab_size"] = -1
    model = load64(write_meta(tmp_path, state, params, shards=4, embedding_cut=1))
    config = model.config
    assert (config.vocab_size, config.n_kv_heads, config.ffn_dim) == (96, 4, 48)
    assert (config.rope_theta, config.max_seq_len) == (10000.0, 4096)
    tokens = random_tokens(1, 9, 96).cpu()
    assert_close(
        model(tokens), meta_logits(state, tokens, params), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("written", [False, True])
@torch.no_grad()
def test_a_head_that_is_the_embedding_or_absent_is_tied(written, tmp_path):
    state = meta_weights()
    state["output.weight"] = state["tok_embeddings.weight"].clone()
    if not written:
        del state["output.weight"]
    model = load64(write_meta(tmp_path, state, PARAMS))
    assert model.config.tie_embeddings
    assert model.lm_head.weight is model.embed_tokens.weight
    tokens = random_tokens(1, 9, 96).cpu()
    assert_close(
        model(tokens), meta_logits(state, tokens, PARAMS), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("dim", "tied", "factor"), [(2048, True, 32), (2048, False, 8), (32, True, 8)]
)
def test_the_rope_factor_of_llama32_is_known_by_shape(dim, tied, factor, tmp_path):
    sizes = {"dim": dim, "n_layers": 1, "n_heads": 16, "n_kv_heads": 1, "vocab_size": 8}
    state = meta_weights(**sizes, ffn_dim=8)
    if tied:
        del state["output.weight"]
    params = {**PARAMS, **sizes, "rope_theta": 5e5, "use_scaled_rope": True}
    config = open_weights(write_meta(tmp_path, state, params)).config
    assert config.rope_scaling == llama3_scaling(factor)
    assert config.max_seq_len == 131072


def test_the_end_tokens_of_llama2_and_3_are_known_by_vocabulary(tmp_path):
    for size, bos_id, eos_ids in [
        (32000, 1, (2,)),
        (128256, 128000, (128001, 128008, 128009)),
    ]:
        state = meta_weights(vocab_size=size, dim=8, n_heads=1, n_kv_heads=1, ffn_dim=8)
        params = {**PARAMS, "vocab_size": size, "dim": 8, "n_heads": 1, "n_kv_heads": 1}
        config = open_weights(write_meta(tmp_path, state, params)).config
        assert (config.bos_id, config.eos_ids) == (bos_id, eos_ids)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("factor", [None, 8.0, 32.0])
@pytest.mark.parametrize("shards", [1, 2, 4])
@torch.no_grad()
def test_writing_metas_format_changes_nothing(shards, factor, tied, tmp_path):
    scaling = None if factor is None else llama3_scaling(factor)
    model = make_model(
        "llama", vocab_size=96, n_kv_heads=4, rope_scaling=scaling, tie_embeddings=tied,
        bos_id=3, eos_ids=(5, 7), max_seq_len=99, model_type="llama",
    )  # fmt: skip
    save_meta(model, tmp_path, shards)
    assert len(list(tmp_path.glob("consolidated.*.pth"))) == shards
    loaded = MinimalLlama.from_pretrained(tmp_path)
    assert loaded.config == model.config
    tokens = random_tokens(2, 17, 96)
    assert_close(loaded(tokens), model(tokens), rtol=1e-6, atol=1e-6)

    params = json.loads((tmp_path / "params.json").read_text())
    hidden = int(params["ffn_dim_multiplier"] * int(2 * 4 * params["dim"] / 3))
    many = params["multiple_of"]
    assert many * ((hidden + many - 1) // many) == 48  # Meta's formula for ffn_dim


@torch.no_grad()
def test_metas_model_computes_the_same_from_what_is_written(tmp_path):
    model = make_model("llama", vocab_size=96).cpu().double()
    save_meta(model, tmp_path)
    state = torch.load(tmp_path / "consolidated.00.pth", weights_only=True)
    params = json.loads((tmp_path / "params.json").read_text())
    tokens = random_tokens(2, 17, 96).cpu()
    assert_close(
        meta_logits(state, tokens, params), model(tokens), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "changes", "shards", "said"),
    [
        ("qwen3", {}, 1, "model_type='qwen3'; Meta's format holds Llama only"),
        ("llama", {"head_dim": 12}, 1, "head_dim=12 is not dim / n_heads = 32 / 4"),
        ("llama31", {}, 1, "Meta's code fixes all of it but the factor"),
        ("llama", {}, 2, "shards=2 does not divide vocab_size=97"),
        ("llama", {}, 4, "shards=4 does not divide n_kv_heads=2"),
        ("llama", {}, 0, "shards=0 does not divide n_kv_heads=2"),
    ],
)
def test_what_metas_code_could_not_run_is_not_written(
    name, changes, shards, said, tmp_path
):
    with pytest.raises(ValueError, match=said):
        save_meta(make_model(name, **changes), tmp_path, shards)
    assert not list(tmp_path.iterdir())


def test_two_formats_in_one_folder_are_refused(tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds config.json, which would win"):
        save_meta(model, tmp_path)


# Broken and hostile folders


def write_params(folder, **changes):
    params = {key: v for key, v in {**PARAMS, **changes}.items() if v != "absent"}
    (folder / "params.json").write_text(json.dumps(params))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dim": "absent", "n_heads": "absent"}, "params.json lacks dim, n_heads"),
        ({"n_heads": 5}, "params.json: dim=32 is no multiple of n_heads=5"),
        ({"n_layers": -2}, "params.json: n_layers=-2 must be a whole number"),
        ({"n_layers": 10**9}, "n_layers=1000000000 but the files hold 21 tensors"),
        ({"n_layers": "two"}, "params.json: n_layers='two' must be a whole"),
        ({"n_layers": 1}, r"9 extra:(?s:.)*layers.1.input_layernorm.weight \(32,\)"),
        ({"n_layers": 3}, r"9 missing:(?s:.)*layers.2.input_layernorm.weight"),
        ({"vocab_size": 97}, r"lm_head.weight \(96, 32\), where \(97, 32\) is needed"),
        ({"vocab_size": [1]}, r"params.json: vocab_size=\[1\] must be a whole"),
        ({"n_kv_heads": 4}, r"k_proj.weight \(16, 32\), where \(32, 32\) is needed"),
        ({"rope_theta": "big"}, "params.json: rope_theta='big' must be a number"),
        ({"use_scaled_rope": True, "rope_scaling_factor": -1}, "has factor=-1"),
        ({"quantization_args": {}}, "has quantization_args, which is not built here"),
        ({"vision_chunk_size": 560}, "has vision_chunk_size, which is not built"),
        ({"sliding_window": 4096}, "has sliding_window, which is not built here"),
    ],
)
def test_params_that_do_not_fit_are_refused(changes, said, tmp_path):
    write_meta(tmp_path, meta_weights(), PARAMS)
    write_params(tmp_path, **changes)
    with pytest.raises(ValueError, match=said):
        MinimalLlama.from_pretrained(tmp_path)


def test_a_missing_shard_is_refused(tmp_path):
    write_meta(tmp_path, meta_weights(), PARAMS, shards=2)
    (tmp_path / "consolidated.00.pth").unlink()
    with pytest.raises(
        ValueError, match="… it has: consolidated.01.pth. Download what"
    ):
        MinimalLlama.from_pretrained(tmp_path)
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(ValueError, match="… it has: none"):
        MinimalLlama.from_pretrained(tmp_path)


def test_the_last_shard_missing_shows_in_the_shapes(tmp_path):
    write_meta(tmp_path, meta_weights(), PARAMS, shards=2)
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(ValueError, match=r"q_proj.weight \(16, 32\), where \(32, 32\)"):
        MinimalLlama.from_pretrained(tmp_path)


def test_shards_of_different_models_are_refused(tmp_path):
    write_meta(tmp_path, meta_weights(), PARAMS, shards=2)
    path = tmp_path / "consolidated.01.pth"
    state = torch.load(path, weights_only=True)
    state["layers.1.attention.wq.weight"] = torch.zeros(8, 32)
    torch.save(state, path)
    with pytest.raises(
        ValueError, match=r"01.pth holds layers.1.attention.wq.weight \(8"
    ):
        MinimalLlama.from_pretrained(tmp_path)
    del state["layers.1.attention.wq.weight"]
    torch.save(state, path)
    with pytest.raises(ValueError, match="wq.weight is in one of the 2 files only"):
        MinimalLlama.from_pretrained(tmp_path)


def test_names_that_are_not_metas_are_listed_as_extra(tmp_path):
    state = meta_weights()
    state["layers.0.self_attn.q_proj.weight"] = torch.ones(32, 32)
    state["adapter"] = torch.ones(3)
    write_meta(tmp_path, state, PARAMS)
    with pytest.raises(
        ValueError, match=r"2 extra:\s+adapter \(no name of Meta's\) \(3,"
    ):
        MinimalLlama.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", ["tok_embeddings.weight", "output.weight"])
def test_a_state_dict_without_its_ends_is_refused(key, tmp_path):
    state = meta_weights()
    state.pop("tok_embeddings.weight")
    state |= {key: torch.ones(96)}
    write_meta(tmp_path, state, PARAMS)
    with pytest.raises(
        ValueError, match="the files hold no matrix tok_embeddings.weight"
    ):
        MinimalLlama.from_pretrained(tmp_path)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def pickled(folder, content, zipped=True):
    write_meta(folder, {}, PARAMS)
    path = folder / "consolidated.00.pth"
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_does_not_run(zipped, tmp_path):
    attack = {"tok_embeddings.weight": Attack(tmp_path / "ran")}
    pickled(tmp_path, attack, zipped)
    with pytest.raises(
        ValueError, match="00.pth is no whole PyTorch file of tensors only"
    ):
        MinimalLlama.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 10, 5000, -100])
def test_a_truncated_pth_is_refused(keep, tmp_path):
    path = pickled(tmp_path, meta_weights())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ValueError, match="00.pth is no whole PyTorch file .*Download it"
    ):
        MinimalLlama.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.ones(3)], "00.pth holds a list; save model.state_dict"),
        ({"model": {"a": torch.ones(3)}}, "00.pth holds a dict at 'model'"),
        ({7: torch.ones(3)}, "00.pth holds a Tensor at 7"),
        ({"a": torch.ones(3).to_sparse()}, "00.pth holds a Tensor at 'a'"),
        (
            {"a": torch.ones(3, dtype=torch.int8)},
            "holds a as torch.int8; weights are F16",
        ),
    ],
)
def test_a_pickle_that_is_no_state_dict_is_refused(content, said, tmp_path):
    pickled(tmp_path, content)
    with pytest.raises(ValueError, match=said):
        MinimalLlama.from_pretrained(tmp_path)


def test_a_bare_state_dict_without_params_is_refused(tmp_path):
    torch.save(meta_weights(), tmp_path / "tiny.pt")
    with pytest.raises(
        ValueError, match=r"params.json \(it has tiny.pt\). Give a shipped"
    ):
        MinimalLlama.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tiny.pt is a file; name the folder"):
        MinimalLlama.from_pretrained(tmp_path / "tiny.pt")


# llama2.c

ORDERS = (  # every other group comes for each layer
    "tok_embeddings | attention_norm attention.wq attention.wk attention.wv "
    "attention.wo ffn_norm feed_forward.w1 feed_forward.w2 feed_forward.w3 "
    "| norm tables output",
    "| attention_norm ffn_norm | norm tok_embeddings | attention.wq attention.wk "
    "attention.wv attention.wo feed_forward.w1 feed_forward.w2 feed_forward.w3 "
    "| output",
)
HEADER = (32, 48, 2, 4, 2, 96, 24)


def write_llama2c(path, state, version):
    """The files as llama2.c's export.py describes them, written number by number."""
    tied = "output.weight" not in state
    header = HEADER
    if version == 0:
        vocab_size = 96 if tied else -96
        start = struct.pack("<7i", *header[:5], vocab_size, header[6])
    else:
        start = struct.pack("<Ii7iB", 0x616B3432, version, *header, tied).ljust(
            256, b"\0"
        )
    state = {
        "output.weight": torch.empty(0),
        **state,
        "tables.weight": torch.ones(24, 8),
    }
    floats = []
    for place, group in enumerate(ORDERS[version].split("|")):
        for name in group.split():
            copies = [f"layers.{i}.{name}" for i in range(2)] if place % 2 else [name]
            floats += [state[f"{copy}.weight"].flatten() for copy in copies]
    path.write_bytes(start + torch.cat(floats).numpy().tobytes())
    return path


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("version", [0, 1])
@torch.no_grad()
def test_logits_equal_those_of_llama2c(version, tied, tmp_path):
    state, tokens = meta_weights(), random_tokens(2, 19, 96).cpu()
    if tied:
        del state["output.weight"]
    model = load64(write_llama2c(tmp_path / "stories.bin", state, version))
    expected = meta_logits(state, tokens, PARAMS)
    assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
    assert model.config.tie_embeddings == tied and model.config.max_seq_len == 24


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_writing_llama2cs_format_changes_nothing(tied, tmp_path):
    model = make_model("llama", tie_embeddings=tied).cpu()
    save_llama2c(model, tmp_path / "a.bin")
    loaded = MinimalLlama.from_pretrained(tmp_path / "a.bin")
    tokens = random_tokens(2, 17).cpu()
    assert_close(loaded(tokens), model(tokens), rtol=0, atol=0)
    assert loaded.config.to_dict() == {
        **model.config.to_dict(), "bos_id": 1, "eos_ids": (1, 2), "model_type": "llama"
    }  # fmt: skip


def test_a_model_that_llama2c_cannot_run_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="rope_theta=500000.0, rope_scaling=None"):
        save_llama2c(make_model("llama", rope_theta=5e5), tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: b[:-4], "a.bin has .* bytes where its header promises"),
        (lambda b: b + b"\0" * 4, "a.bin has .* bytes where its header promises"),
        (lambda b: b[:20], "a.bin has 20 bytes, less than a header"),
        (lambda b: b"", "a.bin has 0 bytes, less than a header"),
        (
            lambda b: b"24ka" + struct.pack("<i", 1),
            "a.bin has 8 bytes, less than a header",
        ),
        (lambda b: b"24ka" + struct.pack("<i", 2) + b[8:], "version 2 .* quantized"),
        (
            lambda b: struct.pack("<i", -5) + b[4:],
            "a.bin: dim=-5 must be a whole number",
        ),
        (
            lambda b: b[:8] + struct.pack("<i", 10**9) + b[12:],
            r"where its header promises .*n_layers=1000000000",
        ),
        (
            lambda b: b"PK\3\4" + b[4:],
            "a.bin is a pickle of PyTorch, no file of llama2.c",
        ),
    ],
)
def test_a_broken_bin_is_refused(change, said, tmp_path):
    path = write_llama2c(tmp_path / "a.bin", meta_weights(), 0)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=said):
        MinimalLlama.from_pretrained(path)
