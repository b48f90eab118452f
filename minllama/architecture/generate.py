"""From logits to text: choose a token, append it, ask again.

    prompt ── prefill ──> logits of its last token ── choose ──> token ─┐
                  ▲                                                     │
                  └──────────── one new token, the cache has the rest ──┘

Papers: top-p Holtzman et al. 2019, arXiv:1904.09751 · min-p Nguyen et al. 2024,
2407.01082 · repetition penalty Keskar et al. 2019, 1909.05858, section 4.1.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minllama.architecture.cache import Caches, StaticCaches
from minllama.architecture.model import MinimalLlama
from minllama.architecture.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from its logits.

    The steps are applied in this order: repetition_penalty, temperature, top_k, top_p,
    min_p; then one token is drawn from what is left.

    Args:
        temperature: logits are divided by it; 0 takes the largest (greedy).
        top_k: keep the k most likely tokens.
        top_p: keep the smallest set of most likely tokens whose probabilities reach p.
        min_p: keep tokens at least min_p times as likely as the most likely one.
        repetition_penalty: above 1 makes tokens that were seen less likely.
        seed: of the draws; None: a different text each time.

    Raises:
        ValueError: a number outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, self.temperature >= 0, "at least 0")
        k, penalty = self.top_k, self.repetition_penalty
        _require("top_k", k, k is None or k >= 1, "at least 1, or None for all")
        for name in ("top_p", "min_p"):
            p = getattr(self, name)
            _require(name, p, p is None or 0 < p <= 1, "above 0 and at most 1, or None")
        _require("repetition_penalty", penalty, penalty > 0, "above 0 (1: no penalty)")
        seed = self.seed
        _require("seed", seed, seed is None or -(2**63) <= seed < 2**63, "64 bits wide")

    def generator(self, device: torch.device) -> torch.Generator | None:
        """A source of random numbers that starts from the seed."""
        if self.seed is None:
            return None
        return torch.Generator(device).manual_seed(self.seed)


def _require(name: str, value, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r} must be {rule}.")


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of seen tokens, multiply negative ones. (B, V) -> same."""
    lower = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lower, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but the k largest become -inf. (B, V) -> (B, V)."""
    smallest = logits.topk(min(k, logits.size(-1))).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """All but the smallest set that holds probability p become -inf. (B, V) -> same.

    A token stays if the tokens before it, in order of likelihood, do not reach p yet;
    so the most likely one always stays.
    """
    probs, order = logits.softmax(-1).sort(descending=True)
    out = probs.cumsum(-1) - probs >= p  # in sorted order
    return logits.masked_fill(out.scatter(-1, order, out), -torch.inf)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Tokens less than min_p times as likely as the best: -inf. (B, V) -> (B, V)."""
    probs = logits.softmax(-1)
    return logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -torch.inf)


def filter_logits(logits: Tensor, how: Sampling) -> Tensor:
    """Temperature, top-k, top-p, min-p: what may still be drawn. (B, V) -> (B, V)."""
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / how.temperature  # no overflow
    if how.top_k is not None:
        logits = keep_top_k(logits, how.top_k)
    if how.top_p is not None:
        logits = keep_top_p(logits, how.top_p)
    if how.min_p is not None:
        logits = keep_min_p(logits, how.min_p)
    return logits


def choose(logits: Tensor, how: Sampling, generator: torch.Generator | None) -> Tensor:
    """One token per row. (B, V) -> (B,).

    The draw divides each probability by an exponential random number and takes the
    largest: token i wins with probability p_i (exponentials race, the fastest rate
    wins most often), without a cumulative sum and without leaving the GPU.
    """
    if how.temperature == 0:
        return logits.argmax(-1)
    probs = filter_logits(logits, how).softmax(-1)
    race = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / race).argmax(-1)


def decode(
    model: MinimalLlama,
    tokens: Tensor,
    caches: Caches,
    how: Sampling,
    lengths: Tensor | None = None,
) -> Iterator[Tensor]:
    """Endless new tokens, (B,) at a time, after the prompts (B, T).

    The caches hold all but the token yielded last. The caller stops; each step is run
    only when its token is asked for.

    Args:
        model: gives the logits.
        tokens: the prompts, or what is new of them since the caches' last use.
        caches: from `model.new_caches`; StaticCaches if rows differ in length.
        how: the choice.
        lengths: (B,) of prompts padded on the right to T; None: all are T long.
    """
    plain = type(model.embed_tokens.weight.data) is Tensor
    # Inference mode saves a sixth of a step on a CPU; sharded weights come and go in
    # place, which it forbids.
    mode = torch.inference_mode() if plain else torch.no_grad()
    return mode(_decode)(model, tokens, caches, how, lengths)


def _decode(
    model: MinimalLlama,
    tokens: Tensor,
    caches: Caches,
    how: Sampling,
    lengths: Tensor | None,
) -> Iterator[Tensor]:
    generator = how.generator(tokens.device)
    seen = None
    if how.repetition_penalty != 1:
        seen = _seen_tokens(tokens, lengths, model.config.vocab_size)
    logits = model(tokens, caches=caches, at=-1 if lengths is None else lengths - 1)
    if lengths is not None:  # padding stands in the cache and is now written over
        assert isinstance(caches, StaticCaches)
        caches.lengths.copy_(lengths)
    while True:
        last = logits[:, -1]  # (B, V)
        if seen is not None:
            last = penalize(last, seen, how.repetition_penalty)
        new = choose(last, how, generator)  # (B,)
        if seen is not None:
            seen.scatter_(1, new[:, None], True)
        yield new
        with attention_for_growing_keys(tokens):
            logits = model(new[:, None], caches=caches)


def attention_for_growing_keys(tokens: Tensor) -> AbstractContextManager:
    """On a GPU, keep attention off cuDNN while each step sees one key more.

    cuDNN plans anew for every number of keys, 36 ms each on an H200: the first story of
    a session would come at 27 tokens/s. The others need no plan.
    """
    if not tokens.is_cuda:
        return nullcontext()
    others = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    return sdpa_kernel([*others, SDPBackend.MATH])


def _seen_tokens(tokens: Tensor, lengths: Tensor | None, vocab_size: int) -> Tensor:
    """True for the tokens that stand in a row's prompt. (B, T) -> (B, V)."""
    V, device = vocab_size, tokens.device
    seen = torch.zeros(len(tokens), V + 1, dtype=torch.bool, device=device)
    tokens = tokens.clamp(max=V)  # ids of a learned prompt have no logit
    if lengths is None:
        return seen.scatter_(1, tokens, True)[:, :V]
    at = torch.arange(tokens.size(1), device=tokens.device)
    first = tokens[:, :1]  # stands in every row, so padding may be counted as it
    tokens = torch.where(at < lengths[:, None], tokens, first)
    return seen.scatter_(1, tokens, True)[:, :V]


def generate(
    model: MinimalLlama,
    tokens: Tensor | Sequence,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_ids: Iterable[int] | None = None,
    seed: int | None = None,
) -> Tensor | list[Tensor]:
    """Continue each row. (B, T) -> (B, T + n), n at most max_new_tokens.

    Args:
        model: any MinimalLlama.
        tokens: prompts of equal length as a tensor (B, T), or a list of B prompts of
            any lengths (tensors or lists of ids); then a list of B tensors comes back,
            each cut behind its own stop.
        max_new_tokens: at most that many are appended.
        temperature: see `Sampling`; so are the next four, and seed.
        top_k: see `Sampling`.
        top_p: see `Sampling`.
        min_p: see `Sampling`.
        repetition_penalty: see `Sampling`.
        stop_ids: a row ends with the first of these, and repeats it while other rows
            go on. None: the model's own end of text; (): never.
        seed: see `Sampling`.

    Raises:
        ValueError: no tokens, ids outside the vocabulary, more tokens than max_seq_len,
            or a sampling number outside its range.
    """
    how = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    if not isinstance(tokens, Tensor):
        return _generate_ragged(model, tokens, max_new_tokens, how, stop_ids)
    check_prompt(model, tokens, max_new_tokens)
    tokens = tokens.long()
    stops = _stops(model, stop_ids)
    caches = model.new_caches(tokens.size(0), tokens.size(1) + max_new_tokens)
    steps = decode(model, tokens, caches, how)
    return torch.cat([tokens, *_until_stopped(steps, max_new_tokens, stops)], dim=1)


def _generate_ragged(
    model: MinimalLlama,
    prompts: Sequence,
    max_new_tokens: int,
    how: Sampling,
    stop_ids: Iterable[int] | None,
) -> list[Tensor]:
    """`generate` for prompts of unequal length, in one batch padded on the right."""
    device = model.embed_tokens.weight.device
    if isinstance(prompts, str) or any(isinstance(row, str) for row in prompts):
        raise ValueError(
            f"prompts={prompts!r} are text; encode them: tok.encode(text, bos=True)."
        )
    rows = [torch.as_tensor(row, device=device) for row in prompts]
    if not rows or any(row.dim() != 1 or not len(row) for row in rows):
        raise ValueError(
            f"prompts of shapes {[tuple(row.shape) for row in rows]}: give one or more "
            "rows of at least one token each (begin with the tokenizer's bos_id)."
        )
    lengths = torch.tensor([len(row) for row in rows], device=device)
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, T)
    check_prompt(model, tokens, max_new_tokens)
    rows, tokens = [row.long() for row in rows], tokens.long()
    stops = _stops(model, stop_ids)
    size = tokens.size(1) + max_new_tokens
    caches = model.new_caches(len(rows), size, kind=StaticCaches)
    steps = decode(model, tokens, caches, how, lengths)
    new = torch.cat([tokens[:, :0], *_until_stopped(steps, max_new_tokens, stops)], 1)
    return [torch.cat([row, _cut(out, stops)]) for row, out in zip(rows, new)]


def _until_stopped(
    steps: Iterator[Tensor], most: int, stops: Tensor
) -> Iterator[Tensor]:
    """(B, 1) at a time, until every row has stopped; a stopped row repeats its stop."""
    last = None
    for _ in range(most):
        new = next(steps)  # (B,)
        if last is not None:
            new = torch.where(torch.isin(last, stops), last, new)
        yield new[:, None]
        if stops.numel():  # else there is nothing to look at, and no wait for a GPU
            if bool(torch.isin(new, stops).all()):
                return
            last = new


def _stops(model: MinimalLlama, stop_ids: Iterable[int] | None) -> Tensor:
    ids = (stop_ids,) if isinstance(stop_ids, int) else stop_ids
    ids = model.config.eos_ids if ids is None else tuple(int(i) for i in ids)
    return torch.tensor(ids, dtype=torch.long, device=model.embed_tokens.weight.device)


def _cut(row: Tensor, stops: Tensor) -> Tensor:
    """The row up to its first stop, that one included. (n,) -> (m,)."""
    at = torch.isin(row, stops).nonzero()
    return row[: int(at[0]) + 1] if len(at) else row


def check_prompt(model: MinimalLlama, tokens: Tensor, max_new_tokens: int) -> None:
    """Refuse, before any work, what cannot be generated.

    Raises:
        ValueError: as `generate`.
    """
    if tokens.dim() != 2 or not tokens.numel():
        raise ValueError(
            f"tokens of shape {tuple(tokens.shape)} must be (B, T) with at least one "
            "token a row; begin an empty prompt with the tokenizer's bos_id."
        )
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens of dtype {tokens.dtype} must be whole-number ids.")
    config, worst = model.config, int(tokens.max())
    # a learned prompt has ids beyond the vocabulary, and rows of the embedding for them
    rows = max(config.vocab_size, getattr(model.embed_tokens, "num_embeddings", 0))
    if worst >= rows or int(tokens.min()) < 0:
        bad = worst if worst >= rows else int(tokens.min())
        raise ValueError(
            f"token {bad} is outside vocab_size={config.vocab_size}; tokenizer and "
            "model do not belong together."
        )
    _require("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1")
    total = tokens.size(1) + max_new_tokens
    if total > config.max_seq_len:
        raise ValueError(
            f"{tokens.size(1)} prompt tokens + max_new_tokens={max_new_tokens} = "
            f"{total} exceed max_seq_len={config.max_seq_len}; shorten one of them, or "
            "stretch the context with the chapter long_context."
        )


def stream(
    model: MinimalLlama,
    tok: Tokenizer,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_ids: Iterable[int] | None = None,
    stop_strings: Sequence[str] = (),
    seed: int | None = None,
) -> Iterator[str]:
    """The continuation of a text, piece by piece as it comes.

    A piece never ends within a character. Neither the stop token nor a stop string is
    part of the text; text that may yet become a stop string is held back.

    Args:
        model: any MinimalLlama.
        tok: the tokenizer it was trained with.
        prompt: plain text; special tokens in it stay plain.
        max_new_tokens: as `generate`; so are all that follow but stop_strings.
        temperature: see `Sampling`.
        top_k: see `Sampling`.
        top_p: see `Sampling`.
        min_p: see `Sampling`.
        repetition_penalty: see `Sampling`.
        stop_ids: see `generate`.
        stop_strings: the text ends before the first of these.
        seed: see `Sampling`.

    Raises:
        ValueError: as `generate`, at the call and not at the first piece.
    """
    how = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    ids = tok.encode(prompt, bos=tok.bos_id is not None)
    tokens = torch.tensor(
        [ids], dtype=torch.long, device=model.embed_tokens.weight.device
    )
    check_prompt(model, tokens, max_new_tokens)
    stop_strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings
    if "" in stop_strings:
        raise ValueError("stop_strings holds '', which every text contains; remove it.")
    stops = _stops(model, stop_ids).tolist()
    caches = model.new_caches(1, len(ids) + max_new_tokens)
    new = decode(model, tokens, caches, how)
    picked = (int(next(new)) for _ in range(max_new_tokens))
    return hold_back(read_out(tok, picked, stops), stop_strings)


def read_out(tok: Tokenizer, ids: Iterable[int], stops: Sequence[int]) -> Iterator[str]:
    """Ids to pieces of text, until a stop; characters stay whole."""
    decoder = tok.stream_decoder()
    for token in ids:
        if token in stops:
            break
        if token >= tok.vocab_size:  # a row of padding in the embedding: no text
            continue
        if piece := decoder.feed(token):
            yield piece
    if piece := decoder.flush():
        yield piece


def hold_back(pieces: Iterable[str], stop_strings: Sequence[str]) -> Iterator[str]:
    """Pass pieces on, but end before the first stop string, even one cut into pieces.

    Example:
        >>> list(hold_back(["a", "b-", "-c", "d"], ["--"]))
        ['a', 'b']
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [at for stop in stop_strings if (at := held.find(stop)) >= 0]
        if found:
            if text := held[: min(found)]:
                yield text
            return
        keep = max((_overlap(held, stop) for stop in stop_strings), default=0)
        if text := held[: len(held) - keep]:
            yield text
        held = held[len(held) - keep :]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """The most characters at the end of `text` that begin `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in sizes if text.endswith(stop[:n])), 0)
