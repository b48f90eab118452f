"""Direct preference optimization: learn from pairs of answers which is the better one.

    reward(y) = beta (log p(y | x) - log p_ref(y | x))         of a whole answer y
    loss      = -log sigmoid(reward(chosen) - reward(rejected))

The reward is implicit: how much likelier an answer became than it was. The reference
is the model before training. With adapters that is the same model with its adapters
switched off, so no second one is held in memory.

The loss looks at the difference of the rewards only, so it may fall while both answers
become less likely. IPO asks for a fixed difference instead of an ever larger one.

Papers: DPO Rafailov et al. 2023, arXiv:2305.18290, section 4 · IPO Azar et al. 2023,
2310.12036, equation 17, with log-ratios per token, as TRL does (its source says: after
asking the authors).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minllama.architecture.data import IGNORE, Batch, PackedBatches, make_batch
from minllama.peft.adapter import adapters, disabled


@dataclass(frozen=True)
class PairBatch(Batch):
    """2 B rows: the chosen answers, each after its prompt, then the rejected ones."""

    def counted(self) -> Tensor:
        """How many pairs, as a 0-d tensor: the loop divides the summed loss by it."""
        return torch.tensor(self.tokens.size(0) // 2, device=self.tokens.device)


class PairBatches(PackedBatches):
    """Endless batches of pairs, shuffled and resumed as any `PackedBatches`.

    A document is here a pair (chosen, rejected), each marked, of `encode_preferences`;
    batch_size counts pairs. Rows are as long as the longest answer of the batch.
    """

    def arrange(self, documents: list) -> Iterable[list]:
        return [[pair] for pair in documents]

    def lay_out(self, rows: list[list]) -> PairBatch:
        return make_pairs([pair for row in rows for pair in row])


def make_pairs(pairs: list[tuple[np.ndarray, np.ndarray]]) -> PairBatch:
    """Pairs of marked documents to tensors, padded on the right."""
    rows = [[chosen] for chosen, _ in pairs] + [[rejected] for _, rejected in pairs]
    batch = make_batch(rows, max(len(row[0]) for row in rows) - 1)
    return PairBatch(batch.tokens, batch.targets, batch.positions)


@dataclass(frozen=True)
class Answers:
    """Log-probability of each answer given its prompt, in nats, and its length."""

    chosen: Tensor  # (B,)
    rejected: Tensor  # (B,)
    chosen_tokens: Tensor  # (B,)
    rejected_tokens: Tensor  # (B,)

    def over(self, reference: "Answers") -> "Answers":
        """The log-ratios of policy and reference."""
        chosen, rejected = (
            self.chosen - reference.chosen,
            self.rejected - reference.rejected,
        )
        return Answers(chosen, rejected, self.chosen_tokens, self.rejected_tokens)


def answer_log_probs(model: nn.Module, batch: PairBatch) -> Answers:
    """Sum of log p over the tokens of each answer, in float32 or wider."""
    logits = model(batch.tokens)  # (2B, T, V)
    nats = F.cross_entropy(
        logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
        batch.targets.flatten(),
        ignore_index=IGNORE,
        reduction="none",
    )
    sums = -nats.view_as(batch.targets).sum(1)  # (2B,)
    counts = (batch.targets != IGNORE).sum(1)  # (2B,)
    return Answers(*sums.chunk(2), *counts.chunk(2))


def dpo_loss(
    ratios: Answers, beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    """-log sigmoid(beta (chosen - rejected)), from log-ratios. (B,) -> (B,)

    With label_smoothing e, a share e of the pairs is taken to be the wrong way round:
    "conservative DPO" of the authors' own code, eric-mitchell/direct-preference-
    optimization. At e = 0 it is the paper's loss.
    """
    margin = beta * (ratios.chosen - ratios.rejected)
    right, wrong = F.logsigmoid(margin), F.logsigmoid(-margin)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def ipo_loss(ratios: Answers, beta: float = 0.1) -> Tensor:
    """(h - 1 / (2 beta))^2, h the difference of log-ratios per token. (B,) -> (B,)"""
    chosen = ratios.chosen / ratios.chosen_tokens
    rejected = ratios.rejected / ratios.rejected_tokens
    return (chosen - rejected - 1 / (2 * beta)).square()


class PreferenceLoss:
    """The loss of a model with adapters on pairs, for `train(loss=…)`.

    After each call `accuracy` is the share of pairs whose chosen answer has the higher
    implicit reward, and `margin` the mean difference of the rewards: 0-d tensors.

    Args:
        each: log-ratios -> loss of each pair, (B,): `dpo_loss` or `ipo_loss`, with
            its settings (functools.partial).
        beta: of the rewards that are told; what `each` uses is its own affair.

    Example:
        add_lora(model)
        train(model, optimizer, PairBatches(…), steps=100, loss=PreferenceLoss())
    """

    def __init__(
        self, each: Callable[[Answers], Tensor] = dpo_loss, beta: float = 0.1
    ) -> None:
        self.each, self.beta = each, beta
        self.accuracy = self.margin = torch.tensor(float("nan"))

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The summed loss of the pairs, 0-d.

        Raises:
            ValueError: no adapter, or parameters that train outside of one: then there
                is no reference in the model; or a batch of something else.
        """
        if not isinstance(batch, PairBatch):
            raise ValueError(f"{type(batch).__name__} holds no pairs; use PairBatches.")
        check_reference(model)
        ratios = answer_log_probs(model, batch).over(reference_log_probs(model, batch))
        margin = self.beta * (ratios.chosen - ratios.rejected).detach()
        self.accuracy, self.margin = (margin > 0).float().mean(), margin.mean()
        return self.each(ratios).sum()


@torch.no_grad()
def reference_log_probs(model: nn.Module, batch: PairBatch) -> Answers:
    """`answer_log_probs` of the model without its adapters, and without dropout."""
    training = model.training
    model.eval()
    try:
        with disabled(model):
            return answer_log_probs(model, batch)
    finally:
        model.train(training)


def check_reference(model: nn.Module) -> None:
    """Refuse a model that would be its own reference.

    Raises:
        ValueError: no adapter, or something trains that no adapter holds.
    """
    there = adapters(model).values()
    if not there:
        raise ValueError(
            "the model has no adapter, so switching it off gives no reference; call "
            "add_lora or another add_… first."
        )
    held = {id(p) for adapter in there for p in adapter.trained()}
    free = [
        n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held
    ]
    if free:
        raise ValueError(
            f"{free[0]} trains, but belongs to no adapter, so the reference would move "
            "with it; freeze it, or name its module in modules_to_save."
        )


@dataclass(frozen=True)
class PreferenceScore:
    """How a model with adapters ranks held-out pairs, against itself without them."""

    loss: float  # mean over the pairs
    accuracy: float  # share of pairs whose chosen answer has the higher reward
    margin: float  # mean difference of the rewards


@torch.no_grad()
def score_preferences(
    model: nn.Module, pairs: list, loss: PreferenceLoss, batch_size: int = 16
) -> PreferenceScore:
    """Score pairs of `encode_preferences`.

    Raises:
        ValueError: no pair.
    """
    if not pairs:
        raise ValueError("no pair to score; give at least one.")
    training, device = model.training, next(model.parameters()).device
    model.eval()
    total = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(pairs), batch_size):
        batch = make_pairs(pairs[start : start + batch_size])
        found = loss(model, batch.to(device)).item()  # type: ignore[arg-type]
        size = int(batch.counted())
        told = torch.stack([loss.accuracy, loss.margin]).double().cpu()
        total += torch.cat([torch.tensor([found]), told * size])
    model.train(training)
    return PreferenceScore(*(total / len(pairs)).tolist())
