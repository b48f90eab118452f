"""Data parallel by hand: the gradients of one process that sees all rows."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from minllama.architecture.data import PackedBatches
from minllama.architecture.train import Run, Team, next_token_loss, train
from minllama.dist_run.data_parallel import (
    fill_buckets,
    group_of,
    no_sync,
    replicate,
    set_exchange,
)
from minllama.dist_run.launch import launch
from tests.conftest import make_model

SMALL = 0.02  # MiB: several buckets even in a tiny model


class Pair(Team):
    """A team of all processes, for models that are distributed by hand."""

    def __init__(self) -> None:
        self.parts = dist.get_world_size()

    def sum(self, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    def exchange(self, model, now):
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = now
        else:
            set_exchange(model, now)

    def clip(self, parameters, max_norm):
        return torch.zeros(())  # not by hand


def build(kind: str, dtype: str, frozen: bool = False) -> nn.Module:
    """The same weights in each process."""
    torch.manual_seed(0)
    name, _, tied = kind.partition("-")
    model = make_model(name, tie_embeddings=bool(tied), vocab_size=61)
    model.to(getattr(torch, dtype))
    if frozen:  # whole blocks, and parts of others
        for name, weight in model.named_parameters():
            part = "k_proj" in name or "down_proj" in name or "embed" in name
            weight.requires_grad_(not part and not name.startswith("layers.1.mlp"))
    return model


def documents() -> list:
    """Of odd lengths: rows hold several, and padding."""
    own = torch.Generator().manual_seed(7)
    lengths = torch.randint(3, 30, (60,), generator=own).tolist()
    return [torch.randint(0, 61, (n,), generator=own).numpy() for n in lengths]


def fit(model, rank=0, world=1, accumulate=1, team=None, batches=None, **how) -> list:
    """Train for 20 steps as the hub does; the loss of each."""
    losses: list[float] = []

    def note(run: Run) -> None:
        losses.append(run.loss)

    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=3e-3)
    batches = batches or PackedBatches(documents(), 4, 21, 1, rank, world)
    how = {"max_norm": None, "accumulate": accumulate, "team": team, **how}
    train(model, adamw, batches, 20, hooks=(note,), **how)
    return losses


CASES = {  # kind, dtype, frozen, accumulate
    "tied": ("llama-tied", "float64", False, 1),
    "untied, accumulated": ("llama", "float64", False, 3),
    "subclass": ("gated", "float64", False, 1),
    "frozen parts": ("qwen2-tied", "float64", True, 1),
    "float32": ("qwen3", "float32", False, 1),
}


def curves(names: list[str], by_hand: bool = True) -> list[list[float]]:
    """In each process: the losses of each case."""
    found = []
    for kind, dtype, frozen, accumulate in (CASES[name] for name in names):
        model = build(kind, dtype, frozen)
        if dist.get_rank() > 0:  # rank 0 has the last word
            for weight in model.parameters():
                weight.data.mul_(0.5)
        if by_hand:
            replicate(model, bucket_mib=SMALL)
        else:
            model = _named(DistributedDataParallel(model, bucket_cap_mb=1))
        where = {"rank": dist.get_rank(), "world": dist.get_world_size()}
        found.append(fit(model, accumulate=accumulate, team=Pair(), **where))
    return found


def _named(wrapped):
    wrapped.config = wrapped.module.config
    return wrapped


def two() -> dict:
    """What two processes find, in one launch."""
    return {
        "curves": curves(list(CASES)),
        "torch": curves(["tied", "float32"], by_hand=False),
        "same gradients": same_gradients(),
        "unused": unused_parameters(),
        "order": overlap(),
        "after a failure": after_a_failure(),
        "refused": refusals(),
    }


def same_gradients() -> float:
    """Largest difference to DistributedDataParallel's gradients: three passes, one
    exchange."""
    ours = replicate(build("llama-tied", "float64"), bucket_mib=SMALL)
    peer = DistributedDataParallel(build("llama-tied", "float64"), bucket_cap_mb=1)
    rank = dist.get_rank()
    batches = PackedBatches(documents(), 4, 21, 1, rank, 2)
    first, second, third = (next(batches) for _ in range(3))
    for model, quiet in ((ours, no_sync(ours)), (peer, peer.no_sync())):
        with quiet:
            next_token_loss(model, first).backward()
            next_token_loss(model, second).backward()
        next_token_loss(model, third).backward()
    pairs = zip(ours.parameters(), peer.module.parameters())
    return max(float((p.grad - q.grad).abs().max()) for p, q in pairs)


class Choosy(nn.Module):
    """Rank 0 uses `a`, rank 1 uses `b`, both use `c`, nobody uses `d`."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcd":
            self.register_parameter(name, nn.Parameter(torch.ones(3)))

    def forward(self, x):
        return ((self.a if dist.get_rank() == 0 else self.b) * self.c * x).sum()


def unused_parameters() -> list:
    """Gradients where not all processes use all parameters; one bucket each."""
    model = replicate(Choosy(), bucket_mib=1e-6)
    model(2.0 + dist.get_rank()).backward()
    return [None if p.grad is None else p.grad[0].item() for p in model.parameters()]


def overlap() -> list[bool]:
    """As the backward pass reaches the first block: is the last one's bucket away?"""
    model = replicate(build("llama", "float32"), bucket_mib=SMALL)
    away: list[bool] = []
    buckets = model.gradient_exchange.buckets
    model.layers[0].register_full_backward_pre_hook(
        lambda *_: away.extend([buckets[0].work is not None, len(buckets) > 3])
    )
    batch = next(PackedBatches(documents(), 4, 21))
    next_token_loss(model, batch).backward()
    return [*away, all(bucket.work is None for bucket in buckets)]


def fail_once(model) -> None:
    """A backward pass that ends in the middle, in every process, and is given up."""

    def fail(*_):
        raise ArithmeticError("on purpose")

    handle = model.layers[0].mlp.register_full_backward_hook(fail)
    batch = next(PackedBatches(documents(), 4, 21))
    with pytest.raises(ArithmeticError):
        next_token_loss(model, batch).backward()
    handle.remove()
    model.zero_grad()


def after_a_failure() -> bool:
    """The gradients of the pass after one that failed, against those of a new model."""
    found = []
    for fails in (True, False):
        model = replicate(build("llama", "float64"), bucket_mib=SMALL)
        if fails:
            fail_once(model)
        rank = dist.get_rank()
        next_token_loss(
            model, next(PackedBatches(documents(), 4, 21, 1, rank, 2))
        ).backward()
        found.append([p.grad for p in model.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*found))


def refusals() -> list[str]:
    """The words of each refusal."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    sharded = fully_shard(build("llama", "float32"), mesh=mesh)
    twice = replicate(build("llama", "float32"), mesh)
    said = []
    for wrong in (
        lambda: replicate(sharded, mesh),
        lambda: replicate(twice, mesh),
        lambda: replicate(build("llama", "float32").requires_grad_(False)),
        lambda: replicate(build("llama", "float32"), bucket_mib=0),
        lambda: set_exchange(build("llama", "float32"), True),
    ):
        with pytest.raises(ValueError) as error:
            wrong()
        said.append(str(error.value))
    said.append(_second_gradient())
    return said


def _second_gradient() -> str:
    """Reentrant checkpoints run a backward pass within the backward pass."""
    from torch.utils.checkpoint import checkpoint

    layer = replicate(nn.Linear(3, 3), bucket_mib=1e-6)
    x = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError) as error:
        layer(checkpoint(layer, x, use_reentrant=True)).sum().backward()
    for bucket in layer.gradient_exchange.buckets:
        if bucket.work is not None:
            bucket.work.wait()
    return str(error.value)


@pytest.fixture(scope="module")
def pair() -> list[dict]:
    return launch(two, 2)


def gap(there: list[float], here: list[float]) -> float:
    """Largest relative difference."""
    a, b = (torch.tensor(x, dtype=torch.float64) for x in (there, here))
    return float((a / b - 1).abs().max())


def alone(name: str) -> list[float]:
    kind, dtype, frozen, accumulate = CASES[name]
    return fit(build(kind, dtype, frozen), accumulate=accumulate)


@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_two_is_the_loss_of_one(pair, name):
    limit = 1e-6 if name == "float32" else 1e-10
    here = alone(name)
    for ranks in pair:
        there = ranks["curves"][list(CASES).index(name)]
        assert len(there) == 20 and gap(there, here) <= limit


def test_the_loss_of_four_is_the_loss_of_one():
    from tests.dist_run.test_fsdp_by_hand import quartet

    for rank in quartet():
        assert gap(rank["replicated"][0], alone("tied")) <= 1e-10


def test_equals_distributed_data_parallel(pair):
    for ranks in pair:
        assert gap(ranks["torch"][0], ranks["curves"][0]) <= 1e-12
        assert gap(ranks["torch"][1], ranks["curves"][-1]) <= 1e-6
        assert ranks["same gradients"] <= 1e-12


def test_a_parameter_that_one_process_uses_is_averaged_and_an_unused_one_has_none(pair):
    for ranks in pair:
        assert ranks["unused"] == [1.0, 1.5, 2.5, None]


def test_buckets_leave_while_the_backward_pass_still_runs(pair):
    for ranks in pair:
        assert ranks["order"] == [True, True, True]


def test_a_backward_pass_that_failed_leaves_nothing_behind(pair):
    assert all(rank["after a failure"] for rank in pair)


def test_what_cannot_be_replicated_is_refused(pair):
    words = [
        "is a DTensor",
        "already distributed by hand",
        "has requires_grad=True",
        "bucket_mib=0",
        "exchanges no gradients",
        "got a second gradient in one",
    ]
    for said, word in zip(pair[0]["refused"], words, strict=True):
        assert word in said


def test_buckets_hold_the_last_parameters_first_and_one_dtype():
    sizes = [
        (4, torch.float32),
        (4, torch.float32),
        (4, torch.bfloat16),
        (9, torch.float32),
    ]
    parameters = [nn.Parameter(torch.zeros(n, dtype=dtype)) for n, dtype in sizes]
    found = [[p.numel() for p in b.parameters] for b in fill_buckets(parameters, 32)]
    assert found == [[9], [4], [4, 4]]


def test_without_a_group_the_remedy_is_named():
    with pytest.raises(ValueError, match=r"init_mesh\(\)"):
        group_of(None)
