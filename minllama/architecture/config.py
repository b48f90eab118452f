"""The numbers that make a Llama: one frozen dataclass, and a registry of exact ones.

Every model of the family is the same program with other numbers. Two of them surprise:
`head_dim` need not be `dim / n_heads` (Qwen3), and the feed-forward width follows no
rule that one could compute (Llama 3.2 1B: 4 x dim; Llama 3.1 8B: 3.5 x dim), so the
registry states each number and computes none.

Sources: the `config.json` beside the weights of each model on Hugging Face; for
Qwen2.5 that of the base models, whose instructed twins differ in eps and max_seq_len.
"""

from dataclasses import dataclass, field, fields, replace

ROPE_TYPES = ("llama3",)  # what the hub can scale; more kinds come with long_context


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Shapes and constants of one model.

    Args:
        vocab_size: entries of the embedding, V.
        dim: width of the residual stream, D.
        n_layers: blocks, N.
        n_heads: query heads, H.
        n_kv_heads: key/value heads, K; each serves H / K query heads. None: H.
        head_dim: channels of a head, d; even. None: D / H.
        ffn_dim: inner width of the feed-forward, F. None: 8/3 D, rounded up to 32s.
        norm_eps: added to the mean square in RMSNorm.
        rope_theta: base of the rotary angles; the slowest pair needs about
            2 pi theta tokens for one turn.
        rope_scaling: None, or Llama 3.1's {"rope_type": "llama3", "factor", …}.
        max_seq_len: tokens that the model was made for.
        tie_embeddings: the head shares the weight of the embedding.
        sliding_window: each token sees that many newest tokens, itself included
            (Mistral 7B v0.1). None: all.
        bos_id: the token that begins a text, if there is one.
        eos_ids: the tokens at which generation stops.
        model_type: Hugging Face's word for the architecture. None: the class decides.

    Raises:
        ValueError: a number breaks a rule; the message names value, rule and remedy.
    """

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    ffn_dim: int = None  # type: ignore[assignment]
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = field(default=None, hash=False)
    max_seq_len: int = 2048
    tie_embeddings: bool = False
    sliding_window: int | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    model_type: str | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "max_seq_len"):
            _require_positive(name, getattr(self, name))
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(
                f"dim={self.dim} is no multiple of n_heads={self.n_heads}; "
                "state head_dim when heads are not dim / n_heads wide."
            )
        derived = {
            "n_kv_heads": self.n_heads,
            "head_dim": self.dim // self.n_heads,
            "ffn_dim": -(-self.dim * 8 // 3 // 32) * 32,
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
            _require_positive(name, getattr(self, name))
        ends = (self.eos_ids,) if isinstance(self.eos_ids, int) else self.eos_ids
        object.__setattr__(self, "eos_ids", tuple(ends or ()))
        self._check_rules()
        if self.rope_scaling is not None:  # a copy, so that no config changes another
            object.__setattr__(self, "rope_scaling", dict(self.rope_scaling))

    def _check_rules(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} is no multiple of n_kv_heads="
                f"{self.n_kv_heads}; each key/value head serves the same number of "
                "query heads."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd; rope turns pairs of channels, "
                "so it must be even."
            )
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 < value < float("inf")):
                raise ValueError(f"{name}={value!r} must be a number above 0.")
        if self.sliding_window is not None:
            _require_positive("sliding_window", self.sliding_window)
        ids = [i for i in (self.bos_id, *self.eos_ids) if i is not None]
        for token in ids:
            if not (isinstance(token, int) and 0 <= token < self.vocab_size):
                raise ValueError(
                    f"bos_id/eos_ids hold {token!r}, which is no token of "
                    f"vocab_size={self.vocab_size}."
                )
        check_rope_scaling(self.rope_scaling)

    @staticmethod
    def from_name(name: str) -> "LlamaConfig":
        """The registered config of that exact name.

        Example:
            >>> LlamaConfig.from_name("llama-3.2-1b").n_kv_heads
            8

        Raises:
            ValueError: no such name; the message lists those that exist.
        """
        if name not in REGISTRY:
            raise ValueError(
                f"no config is named {name!r}. Names: {', '.join(sorted(REGISTRY))}."
            )
        return replace(REGISTRY[name])

    def to_dict(self) -> dict:
        """Fields and values, as `LlamaConfig(**…)` takes them."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        scaling = self.rope_scaling
        return {**values, "rope_scaling": None if scaling is None else dict(scaling)}


def _require_positive(name: str, value) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")


def check_rope_scaling(scaling: dict | None) -> None:
    """Refuse a rope scaling that the hub cannot build.

    Raises:
        ValueError: unknown type (named), or a number missing or out of order.
    """
    if scaling is None:
        return
    if not isinstance(scaling, dict):
        raise ValueError(
            f"rope_scaling={scaling!r} must be None or a dict with a rope_type, as "
            "llama3_scaling(8.0) gives it."
        )
    kind = scaling.get("rope_type")
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"rope_scaling has rope_type={kind!r}; the hub knows "
            f"{', '.join(ROPE_TYPES)}. Load without it (rope_scaling=None) and scale "
            "with the chapter long_context."
        )
    for key in ("factor", "low_freq_factor", "high_freq_factor"):
        value = scaling.get(key)
        if not (isinstance(value, int | float) and 0 < value < float("inf")):
            raise ValueError(
                f"rope_scaling has {key}={value!r}; llama3 scaling needs "
                "a number above 0."
            )
    _require_positive(
        "rope_scaling's original_max_position_embeddings",
        scaling.get("original_max_position_embeddings"),
    )
    if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError(
            f"rope_scaling has high_freq_factor={scaling['high_freq_factor']} not "
            f"above low_freq_factor={scaling['low_freq_factor']}."
        )


def llama3_scaling(factor: float) -> dict:
    """Llama 3.1's scaling, made on 8,192 tokens: 8 for 3.1 and 3.3, 32 for 3.2."""
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _shape(
    dim: int, n_layers: int, n_heads: int, n_kv_heads: int, ffn_dim: int
) -> dict:
    return {
        "dim": dim,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "ffn_dim": ffn_dim,
    }


_LLAMA2 = LlamaConfig(
    vocab_size=32000, **_shape(4096, 32, 32, 32, 11008), max_seq_len=4096,
    bos_id=1, eos_ids=(2,), model_type="llama",
)  # fmt: skip
_LLAMA3 = LlamaConfig(
    vocab_size=128256, **_shape(4096, 32, 32, 8, 14336), max_seq_len=8192,
    rope_theta=500000.0, bos_id=128000, eos_ids=(128001, 128009), model_type="llama",
)  # fmt: skip
_LLAMA31 = replace(
    _LLAMA3, max_seq_len=131072, rope_scaling=llama3_scaling(8.0),
    eos_ids=(128001, 128008, 128009),
)  # fmt: skip
_LLAMA32 = replace(_LLAMA31, rope_scaling=llama3_scaling(32.0), tie_embeddings=True)
_MISTRAL = LlamaConfig(
    vocab_size=32000, **_shape(4096, 32, 32, 8, 14336), max_seq_len=32768,
    bos_id=1, eos_ids=(2,), model_type="mistral",
)  # fmt: skip
_QWEN25 = LlamaConfig(
    vocab_size=151936, **_shape(896, 24, 14, 2, 4864), norm_eps=1e-6,
    rope_theta=1e6, max_seq_len=32768, tie_embeddings=True,
    bos_id=151643, eos_ids=(151643, 151645), model_type="qwen2",
)  # fmt: skip
_QWEN25_LARGE = replace(
    _QWEN25, vocab_size=152064, tie_embeddings=False, max_seq_len=131072
)
_QWEN3 = replace(_QWEN25, head_dim=128, max_seq_len=40960, model_type="qwen3")


def _resized(base: LlamaConfig, *shape: int, **changes) -> LlamaConfig:
    sizes = _shape(*shape)
    width = {} if base.model_type == "qwen3" else {"head_dim": shape[0] // shape[2]}
    return replace(base, **sizes, **width, **changes)


REGISTRY: dict[str, LlamaConfig] = {
    "llama-2-7b": _LLAMA2,
    "llama-2-13b": _resized(_LLAMA2, 5120, 40, 40, 40, 13824),
    "llama-2-70b": _resized(_LLAMA2, 8192, 80, 64, 8, 28672),
    "llama-3-8b": _LLAMA3,
    "llama-3-70b": _resized(_LLAMA3, 8192, 80, 64, 8, 28672),
    "llama-3.1-8b": _LLAMA31,
    "llama-3.1-70b": _resized(_LLAMA31, 8192, 80, 64, 8, 28672),
    "llama-3.1-405b": _resized(_LLAMA31, 16384, 126, 128, 8, 53248),
    "llama-3.2-1b": _resized(_LLAMA32, 2048, 16, 32, 8, 8192),
    "llama-3.2-3b": _resized(_LLAMA32, 3072, 28, 24, 8, 8192),
    "llama-3.3-70b": _resized(_LLAMA31, 8192, 80, 64, 8, 28672),
    "mistral-7b-v0.1": replace(_MISTRAL, sliding_window=4096),
    "mistral-7b-v0.2": replace(_MISTRAL, rope_theta=1e6),
    "mistral-7b-v0.3": replace(_MISTRAL, rope_theta=1e6, vocab_size=32768),
    "qwen2.5-0.5b": _QWEN25,
    "qwen2.5-1.5b": _resized(_QWEN25, 1536, 28, 12, 2, 8960, max_seq_len=131072),
    "qwen2.5-3b": _resized(_QWEN25, 2048, 36, 16, 2, 11008),
    "qwen2.5-7b": _resized(_QWEN25_LARGE, 3584, 28, 28, 4, 18944),
    "qwen2.5-14b": _resized(_QWEN25_LARGE, 5120, 48, 40, 8, 13824, norm_eps=1e-5),
    "qwen2.5-32b": _resized(_QWEN25_LARGE, 5120, 64, 40, 8, 27648, norm_eps=1e-5),
    "qwen2.5-72b": _resized(_QWEN25_LARGE, 8192, 80, 64, 8, 29568, norm_eps=1e-5),
    "qwen3-0.6b": _resized(_QWEN3, 1024, 28, 16, 8, 3072),
    "qwen3-1.7b": _resized(_QWEN3, 2048, 28, 16, 8, 6144),
    "qwen3-4b": _resized(_QWEN3, 2560, 36, 32, 8, 9728),
    "qwen3-8b": _resized(_QWEN3, 4096, 36, 32, 8, 12288, tie_embeddings=False),
    "qwen3-14b": _resized(_QWEN3, 5120, 40, 40, 8, 17408, tie_embeddings=False),
    "qwen3-32b": _resized(_QWEN3, 5120, 64, 64, 8, 25600, tie_embeddings=False),
}
