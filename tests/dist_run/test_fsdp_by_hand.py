"""FSDP by hand: the losses of fully_shard, 1 / world of the model between steps."""

import copy
import math
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from minllama.architecture.data import PackedBatches
from minllama.architecture.generate import generate
from minllama.architecture.train import next_token_loss
from minllama.dist_run import fsdp_by_hand
from minllama.dist_run.data_parallel import replicate, set_exchange
from minllama.dist_run.fsdp_by_hand import (
    clip_shards,
    deal,
    own_rows,
    shard_by_hand,
    unsharded,
)
from minllama.dist_run.launch import launch
from tests.conftest import make_model
from tests.dist_run import test_data_parallel
from tests.dist_run.test_data_parallel import CASES as PLAIN
from tests.dist_run.test_data_parallel import (
    Pair,
    alone,
    build,
    documents,
    fit,
    gap,
)

SAME = {  # kind, dtype, batches a step, dtypes of weights and of sums
    "untied float32": ("llama", "float32", 1, None, None),
    "tied float32": ("llama-tied", "float32", 1, None, None),
    "untied float64, accumulated": ("gated", "float64", 2, None, None),
    "tied float64": ("llama-tied", "float64", 1, None, None),
    "bfloat16, sums float32": ("qwen3", "float32", 1, torch.bfloat16, torch.float32),
    "bfloat16": ("llama-tied", "float32", 1, torch.bfloat16, None),
}
CASES = {  # of PLAIN, and on how many processes
    "tied": (2, 4),
    "untied, accumulated": (2,),
    "frozen parts": (2, 4),
    "float32": (2,),
}


class Gentle(Pair):
    """Peers of PyTorch exchange gradients by another name."""

    def exchange(self, model, now):
        if hasattr(model, "gradient_exchange"):
            set_exchange(model, now)
        else:
            model.set_requires_gradient_sync(now)


def run(model, accumulate: int = 1) -> list[float]:
    where = {"rank": dist.get_rank(), "world": dist.get_world_size()}
    return fit(model, accumulate=accumulate, team=Gentle(), **where)


def peer(model, param_dtype, reduce_dtype):
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def same() -> dict:
    """The losses of each case: by hand, by hand without prefetch, by PyTorch."""
    found = {}
    for name, (kind, dtype, accumulate, *dtypes) in SAME.items():
        found[name] = [
            run(shard_by_hand(build(kind, dtype), None, *dtypes), accumulate),
            run(shard_by_hand(build(kind, dtype), None, *dtypes, False), accumulate),
            run(peer(build(kind, dtype), *dtypes), accumulate),
        ]
    return found


def curves(names: list[str]) -> list[list[float]]:
    found = []
    for kind, dtype, frozen, accumulate in (PLAIN[name] for name in names):
        found.append(run(shard_by_hand(build(kind, dtype, frozen)), accumulate))
    return found


def batch(rank: int = 0, world: int = 1):
    return next(PackedBatches(documents(), 4, 21, 1, rank, world))


def held(model) -> int:
    """Numbers that this process holds: shards, full parameters, what is on its way."""
    engine = model.gradient_exchange
    slots = [slot for unit in engine.units for slot in unit.slots]
    shards = [p for unit in engine.units for p in unit.shards]
    tensors = {
        *model.parameters(),
        *shards,
        *(s.buffer for s in slots if s.full is not None),
    }
    bytes_ = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors
    }
    bytes_.pop(0, None)
    flying = sum(u.flying[1].nbytes for u in engine.units if u.flying is not None)
    return sum(bytes_.values()) + flying


def memory() -> dict:
    """Bytes at rest and within, for a model of six blocks."""
    torch.manual_seed(0)
    model = make_model("qwen2", n_layers=6, tie_embeddings=True)
    names = [name for name, _ in model.named_parameters()]
    rows = sum(
        math.ceil(len(p) / dist.get_world_size()) * p[0].numel() * 4
        for p in model.parameters()
    )
    parts = {"block": model.layers[0], "embedding": model.embed_tokens}
    full = {n: sum(p.nbytes for p in part.parameters()) for n, part in parts.items()}
    shard_by_hand(model)
    adamw = torch.optim.AdamW(model.parameters())
    within: list[int] = []
    for layer in model.layers:
        layer.mlp.register_forward_hook(lambda *_: within.append(held(model)))
        layer.mlp.register_full_backward_hook(lambda *_: within.append(held(model)))
    rest = [held(model)]
    for _ in range(2):
        next_token_loss(model, batch()).backward()
        rest.append(held(model))
        adamw.step()
    with pytest.raises(IndexError):
        model(torch.full((1, 3), 10**6))
    model(torch.zeros(1, 3, dtype=torch.long))
    model.hidden_states(torch.zeros(1, 3, dtype=torch.long))
    for unit in model.gradient_exchange.units:
        unit.drop()  # the head, gathered ahead
    rest.append(held(model))
    state = sum(s["exp_avg"].nbytes for s in adamw.state.values())
    same_names = names == [name for name, _ in model.named_parameters()]
    return {"rows": rows, "rest": rest, "within": max(within), "state": state, **full,
            "names": same_names}  # fmt: skip


def traffic() -> list[int]:
    """Gathers and scatters of a step, the step's units, and gathers begun ahead."""
    calls = {"all_gather": 0, "reduce_scatter": 0}

    def counting(name, call):
        def count(*args, **kwargs):
            calls[name] += 1
            return call(*args, **kwargs)

        return count

    kept = {name: getattr(fsdp_by_hand, name) for name in calls}
    model = shard_by_hand(build("llama", "float32"))
    ahead: list[bool] = []
    units = model.gradient_exchange.units
    model.layers[0].mlp.register_forward_hook(
        lambda *_: ahead.append(units[2].flying is not None)
    )
    model.layers[1].mlp.register_full_backward_hook(
        lambda *_: ahead.append(units[1].flying is not None)
    )
    for name, call in kept.items():
        setattr(fsdp_by_hand, name, counting(name, call))
    try:
        next_token_loss(model, batch()).backward()
        one = list(calls.values())
        set_exchange(model, False)
        next_token_loss(model, batch()).backward()
    finally:
        for name, call in kept.items():
            setattr(fsdp_by_hand, name, call)
    quiet = [after - before for after, before in zip(calls.values(), one)]
    return [*one, *quiet, len(units), *map(int, ahead)]


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def largest(model, reference) -> float:
    """Largest difference of this process's gradients to its rows of the reference's."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine, theirs = gradients(model), gradients(reference)
    assert mine.keys() == theirs.keys()
    pairs = [(mine[n], own_rows(theirs[n], rank, world)) for n in mine]
    return max(float((a - b).abs().max()) for a, b in pairs if a.numel())


def combined() -> dict[str, float]:
    """Gradients of one batch, the same in all processes, against one process."""
    found = {}
    reference = build("gated", "float64")
    next_token_loss(reference, batch()).backward()

    inside = build("gated", "float64")
    for index, layer in enumerate(inside.layers):
        inside.layers[index] = checkpoint_wrapper(layer)
    shard_by_hand(inside)
    next_token_loss(inside, batch()).backward()
    for layer, plain in zip(inside.layers, reference.layers):
        found["checkpointed"] = largest(layer._checkpoint_wrapped_module, plain)

    outside = shard_by_hand(build("gated", "float64"))
    for index, layer in enumerate(outside.layers):
        outside.layers[index] = checkpoint_wrapper(layer)
    next_token_loss(outside, batch()).backward()
    for layer, plain in zip(outside.layers, reference.layers):
        found["checkpoint outside"] = largest(layer._checkpoint_wrapped_module, plain)

    apart = shard_by_hand(build("gated", "float64"))  # the trunk and the head by hand
    with torch.inference_mode():
        apart(batch().tokens)
    apart.hidden_states(batch().tokens)  # prefetches a head that nobody asks for
    with torch.no_grad():
        for p in apart.parameters():
            p.mul_(1.0)  # a new version: what was prefetched is stale

    def loss(model, part):
        from minllama.architecture.layout import packed

        hidden = model.hidden_states(part.tokens, layout=packed(part.positions))
        logits = model.lm_head(hidden)
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), part.targets.flatten(), reduction="sum"
        )

    loss(apart, batch()).backward()
    found["trunk, then head"] = largest(apart, reference)
    for p in reference.parameters():
        p.grad = None
    reference.hidden_states(batch().tokens).sum().backward()
    apart.zero_grad()
    apart.hidden_states(batch().tokens).sum().backward()
    found["unused head"] = largest(apart, reference)
    return found


def from_meta() -> list[bool]:
    """Sharded before it had weights; each process fills in its rows."""
    source = build("llama-tied", "float32")
    with torch.device("meta"):
        model = type(source)(source.config)
    shard_by_hand(model).to_empty(device="cpu")
    model.tie_weights()
    rank, world = dist.get_rank(), dist.get_world_size()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(own_rows(source.get_parameter(name), rank, world))
    tokens = batch().tokens
    with torch.inference_mode():
        logits = torch.equal(model(tokens), source(tokens))
    with unsharded(model):
        state = copy.deepcopy(model.state_dict())
    whole = all(torch.equal(state[n], t) for n, t in source.state_dict().items())
    text = generate(model, tokens[:, :5], 7)
    return [logits, whole, torch.equal(text, generate(source, tokens[:, :5], 7))]


def clipped() -> list[float]:
    """The norm, and one gradient, beside those of one process."""
    model, reference = (
        shard_by_hand(build("llama", "float64")),
        build("llama", "float64"),
    )
    for one in (model, reference):
        next_token_loss(one, batch()).backward()
    norms = [
        clip_shards(model, 0.5),
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5),
    ]
    return [float(norms[0] / norms[1] - 1), largest(model, reference)]


def stale() -> bool:
    """What was gathered ahead of a change of the weights is not used."""
    model, reference = (
        shard_by_hand(build("llama", "float32")),
        build("llama", "float32"),
    )
    tokens = batch().tokens
    with torch.no_grad():
        model.hidden_states(tokens)
        for one in (model, reference):
            one.lm_head.weight.mul_(3.0)
        return torch.equal(model(tokens), reference(tokens))


def after_a_failure() -> float:
    """The gradients of the pass after one that failed."""
    model, reference = (
        shard_by_hand(build("llama", "float64")),
        build("llama", "float64"),
    )
    test_data_parallel.fail_once(model)
    for one in (model, reference):
        next_token_loss(one, batch()).backward()
    return largest(model, reference)


def refusals() -> list[str]:
    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

    mixed = build("llama", "float32")
    mixed.norm.to(torch.bfloat16)
    said = []
    for wrong in (
        lambda: shard_by_hand(Scalar()),
        lambda: shard_by_hand(mixed),
        lambda: shard_by_hand(replicate(build("llama", "float32"))),
        lambda: clip_shards(build("llama", "float32"), 1.0),
    ):
        with pytest.raises(ValueError) as error:
            wrong()
        said.append(str(error.value))
    return said


def two() -> dict:
    return {
        "same": same(),
        "curves": curves([name for name, worlds in CASES.items() if 2 in worlds]),
        "memory": memory(),
        "traffic": traffic(),
        "combined": combined(),
        "meta": from_meta(),
        "clipped": clipped(),
        "stale": stale(),
        "after a failure": after_a_failure(),
        "refused": refusals(),
    }


def four() -> dict:
    names = [name for name, worlds in CASES.items() if 4 in worlds]
    return {
        "curves": curves(names),
        "memory": memory(),
        "meta": from_meta(),
        "replicated": test_data_parallel.curves(["tied"]),
    }


@cache
def quartet() -> list[dict]:
    """One launch for two files: four processes take long to start."""
    return launch(four, 4)


@pytest.fixture(scope="module")
def pair() -> list[dict]:
    return launch(two, 2)


@pytest.mark.parametrize("name", SAME)
def test_losses_equal_those_of_fully_shard_to_the_last_bit(pair, name):
    for ranks in pair:
        by_hand, no_prefetch, by_torch = ranks["same"][name]
        assert len(by_hand) == 20 and len(set(by_hand)) == 20
        assert by_hand == by_torch
        assert by_hand == no_prefetch


def test_the_loss_of_two_and_of_four_is_the_loss_of_one(pair):
    for world, ranks in ((2, pair), (4, quartet())):
        names = [name for name, worlds in CASES.items() if world in worlds]
        for name, *there in zip(names, *(rank["curves"] for rank in ranks)):
            limit = 1e-6 if name == "float32" else 1e-10
            assert max(gap(losses, alone(name)) for losses in there) <= limit, name


def test_between_steps_a_process_holds_its_rows_and_nothing_else(pair):
    for found in (rank["memory"] for rank in [*pair, *quartet()]):
        assert found["names"]
        assert max(found["rest"]) <= found["rows"]
        assert found["state"] <= found["rows"]
        # one block at work, the next on its way, and its copy as it arrives; in the
        # backward pass the tied embedding too, until its gradient is complete
        beside = 3 * found["block"] + found["embedding"]
        assert found["rows"] < found["within"] <= 1.02 * (found["rows"] + beside)


def test_each_unit_is_gathered_twice_and_scattered_once_a_step(pair):
    for rank in pair:
        gathers, scatters, quiet_gathers, quiet_scatters, units, *ahead = rank[
            "traffic"
        ]
        assert (gathers, scatters) == (2 * units, units)
        assert (quiet_gathers, quiet_scatters) == (2 * units, 0)
        assert ahead == [1, 1, 1, 1]


def test_holds_with_checkpoints_and_where_trunk_and_head_are_called_apart(pair):
    for rank in pair:
        assert max(rank["combined"].values()) < 1e-11, rank["combined"]


def test_a_model_on_the_meta_device_is_sharded_filled_and_generates(pair):
    assert all(all(rank["meta"]) for rank in [*pair, *quartet()])


def test_gradients_are_clipped_by_the_norm_over_all_shards(pair):
    for rank in pair:
        assert max(map(abs, rank["clipped"])) < 1e-12


def test_weights_gathered_ahead_of_a_change_are_gathered_again(pair):
    assert all(rank["stale"] for rank in pair)


def test_a_backward_pass_that_failed_leaves_nothing_behind(pair):
    assert all(rank["after a failure"] < 1e-11 for rank in pair)


def test_what_cannot_be_sharded_is_refused(pair):
    words = ["shape ()", "torch.bfloat16", "already distributed", "not sharded"]
    for said, word in zip(pair[0]["refused"], words, strict=True):
        assert word in said


@pytest.mark.parametrize("rows, world", [(1, 2), (7, 2), (8, 4), (9, 4), (1025, 3)])
def test_dealt_rows_are_those_that_each_process_keeps(rows, world):
    full = torch.randn(rows, 3)
    hands = deal(full, world)
    kept = [own_rows(full, rank, world).flatten() for rank in range(world)]
    assert torch.equal(torch.cat(kept), full.flatten())
    for hand, mine in zip(hands, kept, strict=True):
        assert torch.equal(hand[: len(mine)], mine) and not hand[len(mine) :].any()
