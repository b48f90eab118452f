"""Context parallel: the loss and the gradients of one process that sees whole texts."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn

from minllama.architecture.data import PackedBatches
from minllama.architecture.layout import packed
from minllama.architecture.model import AttentionCore
from minllama.architecture.train import next_token_loss
from minllama.dist_run.context import (
    CutBatches,
    Ring,
    RingCore,
    context_loss,
    context_parallel,
    cut_batch,
    cut_layout,
    own_tokens,
)
from minllama.dist_run.data_parallel import replicate
from minllama.dist_run.launch import launch
from tests.dist_run.test_data_parallel import Pair, build, documents, fit, gap

KINDS = ["llama-tied", "llama31", "mistral", "qwen2", "qwen3-tied", "gated"]
LENGTH = 24


def batch(packing: str):
    """Two rows of documents, or of one text each."""
    found = next(PackedBatches(documents(), 2, LENGTH, 1))
    if packing == "one text":
        found.positions.copy_(torch.arange(LENGTH).expand(2, -1))
    return found


def gradients(kind: str, packing: str) -> float:
    """Largest relative difference of the loss, and of a gradient, to one process."""
    reference, model = build(kind, "float64"), context_parallel(build(kind, "float64"))
    loss = next_token_loss(reference, batch(packing))
    loss.backward()
    mine = context_loss(None)(model, cut_batch(batch(packing), None))
    mine.backward()
    total = mine.detach().clone()
    dist.all_reduce(total)
    worst = float((total / loss - 1).abs())
    for p, q in zip(reference.parameters(), model.parameters()):
        dist.all_reduce(q.grad)
        worst = max(worst, float((p.grad - q.grad).abs().max() / p.grad.abs().max()))
    return worst


def core_bfloat16() -> float:
    """One call of the core against the plain one, in bfloat16."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, LENGTH, heads, 8) for heads in (4, 2, 2))
    layout = packed(batch("documents").positions)
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = own_tokens(LENGTH, rank, world)
    plain = AttentionCore()(q, k, v, layout)[:, mine]
    parts = [x[:, mine].bfloat16() for x in (q, k, v)]
    y = RingCore(Ring(dist.group.WORLD))(
        *parts, cut_layout(layout.positions[:, mine], None)
    )
    assert y.dtype == torch.bfloat16
    return float((y - plain).abs().max())


def trained() -> list[float]:
    """Losses of `train`, with gradients averaged by `replicate`."""
    model = replicate(context_parallel(build("llama", "float64")))
    batches = CutBatches(PackedBatches(documents(), 4, LENGTH, 1))
    return fit(model, team=Pair(), batches=batches, loss=context_loss(None))


def refusals() -> list[str]:
    from minllama.architecture.surgery import replace_modules

    class Other(AttentionCore):
        pass

    tokens = batch("documents").tokens
    model = context_parallel(build("llama", "float32"))
    replaced = replace_modules(
        build("llama", "float32"),
        lambda name, _: name == "layers.1.self_attn.core",
        lambda _: Other(),
    )
    headless = build("llama", "float32")
    headless.layers[0] = nn.Identity()
    said = []
    for wrong in (
        lambda: model(tokens),
        lambda: model(tokens, caches=model.new_caches(2, 40)),
        lambda: context_parallel(replaced),
        lambda: context_parallel(headless),
        lambda: context_parallel(nn.Linear(2, 2)),
    ):
        with pytest.raises(ValueError) as error:
            wrong()
        said.append(str(error.value))
    return said


def work(kinds: list[str], extras: bool) -> dict:
    ring = Ring(dist.group.WORLD)
    names = [(kind, packing) for kind in kinds for packing in ("documents", "one text")]
    found = {
        "gaps": {
            f"{kind}, {packing}": gradients(kind, packing) for kind, packing in names
        },
        "pairs": sum(len(list(ring.pairs(o, 8))) for o in range(ring.world)),
        "bfloat16": core_bfloat16(),
    }
    if extras:
        found |= {"curve": trained(), "refused": refusals()}
    return found


@pytest.fixture(scope="module")
def pair() -> list[dict]:
    return launch(work, 2, KINDS, True)


def four() -> dict:
    from tests.dist_run import test_pipeline

    names = ["gpipe", "1f1b, tied", "interleaved"]
    piped = test_pipeline.work(names, 3)
    return {**work(KINDS[:3], False), "pipeline": piped}


@cache
def quartet() -> list[dict]:
    """One launch for two files: four processes take long to start."""
    return launch(four, 4)


def test_loss_and_gradients_are_those_of_one_process(pair):
    for rank in [*pair, *quartet()]:
        assert max(rank["gaps"].values()) <= 1e-10, rank["gaps"]


def test_all_processes_work_alike(pair):
    assert [rank["pairs"] for rank in pair] == [5, 5]
    assert [rank["pairs"] for rank in quartet()] == [9, 9, 9, 9]


def test_training_on_cut_texts_is_training_on_whole_ones(pair):
    here = fit(
        build("llama", "float64"), batches=PackedBatches(documents(), 4, LENGTH, 1)
    )
    for rank in pair:
        assert len(rank["curve"]) == 20 and gap(rank["curve"], here) <= 1e-10


def test_bfloat16_is_as_exact_as_its_inputs(pair):
    assert all(rank["bfloat16"] < 2**-6 for rank in [*pair, *quartet()])


def test_what_does_not_fit_a_ring_is_refused(pair):
    words = ["24 queries on 24 keys", "cut_layout", "layers.1 has Other",
             "layers.0 has no AttentionCore", "no module matched"]  # fmt: skip
    for said, word in zip(pair[0]["refused"], words, strict=True):
        assert word in said
    with pytest.raises(
        ValueError, match="12 tokens do not make 2 equal .* 4 processes"
    ):
        own_tokens(12, 0, 4)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_each_token_is_kept_once(world):
    kept = torch.cat([own_tokens(12 * world, rank, world) for rank in range(world)])
    assert torch.equal(kept.sort().values, torch.arange(12 * world))
