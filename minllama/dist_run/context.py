"""Context parallel: one long text over many processes, its keys and values on a ring.

    T tokens in 2 W chunks; process r keeps chunks r and 2 W - 1 - r:

        chunk      0  1  2  3  4  5  6  7          W = 4
        process    0  1  2  3  3  2  1  0          zig-zag

Each process computes its own queries. Keys and values go round: while a process attends
to those it holds, it sends them to its neighbour and receives the next. After W steps
every query has met every key, and no process ever held more than two parts of them. A
causal query looks only back, so with chunks in plain order the last process would work
2 W - 1 times as long as the first; in zig-zag order all see 2 W + 1 pairs of chunks.

Parts of a softmax are merged by their log-sum-exp, as flash attention does with blocks.
The gradients of keys and values travel on the same ring, back to their owner.

Papers: Liu et al. 2023, Ring Attention, arXiv:2310.01889 · Milakov and Gimelshein 2018,
the softmax in parts, 1805.02867.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from minllama.architecture.data import IGNORE, Batch
from minllama.architecture.layout import Layout
from minllama.architecture.model import AttentionCore
from minllama.architecture.surgery import replace_modules
from minllama.architecture.train import Batches
from minllama.dist_run.data_parallel import group_of


def own_tokens(length: int, rank: int, world: int) -> Tensor:
    """Which of `length` tokens process `rank` keeps, in zig-zag order. -> (T / W,).

    Example:
        >>> [own_tokens(8, rank, 2).tolist() for rank in range(2)]
        [[0, 1, 6, 7], [2, 3, 4, 5]]

    Raises:
        ValueError: the tokens do not make two equal chunks for each process.
    """
    if length % (2 * world):
        raise ValueError(
            f"{length} tokens do not make 2 equal chunks for each of {world} processes;"
            f" choose seq_len as a multiple of {2 * world}."
        )
    chunks = torch.arange(length).view(2 * world, -1)
    return torch.cat([chunks[rank], chunks[2 * world - 1 - rank]])


@dataclass(frozen=True)
class Ring:
    """The processes that share a text, each with a neighbour on either side."""

    group: dist.ProcessGroup

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def world(self) -> int:
        return dist.get_world_size(self.group)

    def pass_on(self, x: Tensor) -> Callable[[], Tensor]:
        """Start to send x to the next and to receive from the one before.

        What it gives waits when called, and then has what came.
        """
        came = torch.empty_like(x)
        there = dist.get_global_rank(self.group, (self.rank + 1) % self.world)
        here = dist.get_global_rank(self.group, (self.rank - 1) % self.world)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, x, there, self.group),
                dist.P2POp(dist.irecv, came, here, self.group),
            ]
        )

        def wait() -> Tensor:
            for work in works:
                work.wait()
            assert x is not None  # it must live until it is sent
            return came

        return wait

    def pairs(self, owner: int, T: int) -> Iterator[tuple[slice, slice]]:
        """Rows of our queries and of the owner's keys that may see each other."""
        halves = slice(0, T // 2), slice(T // 2, T)
        last = 2 * self.world - 1
        for rows, query in zip(halves, (self.rank, last - self.rank)):
            for columns, key in zip(halves, (owner, last - owner)):
                if key <= query:
                    yield rows, columns


class RingAttention(torch.autograd.Function):
    """softmax(q k / sqrt d) v, where k and v of the other processes come by.

    Shapes inside: queries (B, K, G, T, d), G = H / K of them for each key head.
    """

    @staticmethod
    def forward(ctx, q, k, v, first, last, ring):
        wide = torch.promote_types(q.dtype, torch.float32)
        rows_of_q = _grouped(q, k.size(2)).to(wide)
        y = torch.zeros_like(rows_of_q)
        total = y.new_zeros(*y.shape[:-1], 1)  # sum of the weights so far
        top = torch.full_like(total, torch.finfo(wide).min)  # largest score so far
        for owner, (k_now, v_now) in _round(ring, torch.stack([k, v])):
            for rows, columns in ring.pairs(owner, q.size(1)):
                scores, seen = _scores(
                    rows_of_q, k_now, first, last, ring, owner, rows, columns
                )
                before, here = top[..., rows, :], scores.amax(-1, keepdim=True)
                new = torch.maximum(before, here)
                weights = (scores - new).exp() * seen
                shrink = (before - new).exp()
                value = v_now[:, columns].to(wide)
                part = torch.einsum("bkgts,bskd->bkgtd", weights, value)
                y[..., rows, :] = y[..., rows, :] * shrink + part
                total[..., rows, :] = total[..., rows, :] * shrink + weights.sum(
                    -1, keepdim=True
                )
                top[..., rows, :] = new
        y /= total
        ctx.save_for_backward(q, k, v, y, top + total.log(), first, last)
        ctx.ring = ring
        return _ungrouped(y).to(q.dtype)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, y, logsumexp, first, last = ctx.saved_tensors
        ring: Ring = ctx.ring
        rows_of_q = _grouped(q, k.size(2)).to(y.dtype)
        grad = _grouped(grad, k.size(2)).to(y.dtype)
        mean = (grad * y).sum(-1, keepdim=True)
        grad_q = torch.zeros_like(y)
        coming = None
        for owner, both in _round(ring, torch.stack([k, v])):
            k_now, v_now = both.to(y.dtype)
            grad_k, grad_v = torch.zeros_like(k_now), torch.zeros_like(v_now)
            for rows, columns in ring.pairs(owner, q.size(1)):
                scores, seen = _scores(
                    rows_of_q, k_now, first, last, ring, owner, rows, columns
                )
                weights = (scores - logsumexp[..., rows, :]).exp() * seen
                up = grad[..., rows, :]
                grad_v[:, columns] += torch.einsum("bkgts,bkgtd->bskd", weights, up)
                back = torch.einsum("bkgtd,bskd->bkgts", up, v_now[:, columns])
                back = weights * (back - mean[..., rows, :]) * q.size(-1) ** -0.5
                grad_q[..., rows, :] += torch.einsum(
                    "bkgts,bskd->bkgtd", back, k_now[:, columns]
                )
                grad_k[:, columns] += torch.einsum(
                    "bkgts,bkgtd->bskd", back, rows_of_q[..., rows, :]
                )
            mine = torch.stack([grad_k, grad_v])
            coming = ring.pass_on(mine if coming is None else mine + coming())
        assert coming is not None
        grad_k, grad_v = coming().to(k.dtype)  # after W steps they are ours
        return _ungrouped(grad_q).to(q.dtype), grad_k, grad_v, None, None, None


def _round(ring: Ring, held: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Whose keys and values we hold, and these, W times; the next ones are coming."""
    for step in range(ring.world):
        coming = ring.pass_on(held) if step + 1 < ring.world else None
        yield (ring.rank - step) % ring.world, held
        if coming is not None:
            held = coming()


def _grouped(x: Tensor, K: int) -> Tensor:
    """(B, T, H, d) -> (B, K, G, T, d)."""
    return x.unflatten(2, (K, -1)).permute(0, 2, 3, 1, 4)


def _ungrouped(x: Tensor) -> Tensor:
    """(B, K, G, T, d) -> (B, T, H, d)."""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _scores(q, k, first, last, ring, owner, rows, columns) -> tuple[Tensor, Tensor]:
    """Scores (B, K, G, t, s) of some rows and columns, and who sees whom."""
    key = own_tokens(k.size(1) * ring.world, owner, ring.world)[columns].to(q.device)
    first, last = first[:, rows, None], last[:, rows, None]
    seen = ((key >= first) & (key <= last))[:, None, None]  # (B, 1, 1, t, s)
    some = k[:, columns].to(q.dtype)
    scores = torch.einsum("bkgtd,bskd->bkgts", q[..., rows, :], some)
    scores *= q.size(-1) ** -0.5
    return scores.masked_fill(~seen, torch.finfo(q.dtype).min), seen


class RingCore(AttentionCore):
    """The slot `self_attn.core` for a text that is cut over the processes of a ring."""

    def __init__(self, ring: Ring) -> None:
        super().__init__()
        self.ring = ring

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        """As in `AttentionCore`; `layout` numbers the keys of the whole text.

        Raises:
            ValueError: a layout of this part alone, or keys of a cache.
        """
        if layout.is_triangle or k.size(1) != q.size(1):
            raise ValueError(
                f"{q.size(1)} queries on {k.size(1)} keys, with a layout of this part "
                "alone: in context parallel give layout=cut_layout(positions, mesh), "
                "and no caches."
            )
        assert layout.first is not None and layout.last is not None
        return RingAttention.apply(q, k, v, layout.first, layout.last, self.ring)


def context_parallel(
    model: nn.Module, mesh: DeviceMesh | dist.ProcessGroup | None = None
) -> nn.Module:
    """Let each process compute its part of every text, in place.

    Promise: loss and gradients, added up over the processes, are those of one process
    that sees the whole texts. It composes with `shard` or `replicate` over the same
    processes, which average the gradients.

    Raises:
        ValueError: a layer that mixes tokens by other means than a plain core.
    """
    ring = Ring(group_of(mesh))
    for index, layer in enumerate(getattr(model, "layers", [])):
        cores = [type(m) for m in layer.modules() if isinstance(m, AttentionCore)]
        if not cores or any(kind is not AttentionCore for kind in cores):
            found = cores[0].__name__ if cores else "no AttentionCore"
            raise ValueError(
                f"layers.{index} has {found}; the ring takes the place of a plain "
                "AttentionCore, so call context_parallel before what replaces it."
            )
    return replace_modules(
        model,
        lambda _, module: isinstance(module, AttentionCore),
        lambda _: RingCore(ring),
    )


def cut_batch(batch: Batch, mesh: DeviceMesh | dist.ProcessGroup | None) -> Batch:
    """The tokens of each row that this process keeps. (B, T) -> (B, T / W).

    Raises:
        ValueError: T is no multiple of 2 W.
    """
    ring = Ring(group_of(mesh))
    mine = own_tokens(batch.tokens.size(1), ring.rank, ring.world)
    mine = mine.to(batch.tokens.device)
    parts = (batch.tokens, batch.targets, batch.positions)
    return Batch(*(part[:, mine] for part in parts))


def cut_layout(
    positions: Tensor, mesh: DeviceMesh | dist.ProcessGroup | None
) -> Layout:
    """What `packed` says of the whole text, for our part of positions, (B, T / W)."""
    ring = Ring(group_of(mesh))
    last = own_tokens(positions.size(1) * ring.world, ring.rank, ring.world)
    last = last.to(positions.device).expand_as(positions)
    return Layout(positions=positions, first=last - positions, last=last)


def context_loss(
    mesh: DeviceMesh | dist.ProcessGroup | None,
) -> Callable[[nn.Module, Batch], Tensor]:
    """The `loss` for `train`: summed cross-entropy of a batch that is cut, in nats."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch.tokens, layout=cut_layout(batch.positions, mesh))
        return F.cross_entropy(
            logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
            batch.targets.flatten(),
            ignore_index=IGNORE,
            reduction="sum",
        )

    return loss


class CutBatches:
    """Batches of which this process keeps its part of every row."""

    def __init__(
        self, batches: Batches, mesh: DeviceMesh | dist.ProcessGroup | None = None
    ) -> None:
        self.batches, self.mesh = batches, mesh

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield next(self)

    def __next__(self) -> Batch:
        return cut_batch(next(self.batches), self.mesh)

    def state_dict(self) -> dict:
        return self.batches.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.batches.load_state_dict(state)
