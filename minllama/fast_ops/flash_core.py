"""The slot `self_attn.core`, filled with flash attention and flash decoding.

    what is asked                              what runs
    a few tokens, no gradient                  flash_decode
    a triangle of T = S tokens, "fastest"      PyTorch's choice: cuDNN on Hopper
    any triangle or interval                   flash_attention
    wider values, another mask, float64, CPU   the hub's AttentionCore

"triton" leaves cuDNN out.
"""

from typing import Literal

import torch
from torch import Tensor

from minllama.architecture.kernels import DTYPES, HAS_TRITON, interpreting
from minllama.architecture.layout import Layout
from minllama.architecture.model import AttentionCore
from minllama.fast_ops.flash_attention import MAX_WIDTH, as_autocast, flash_attention
from minllama.fast_ops.flash_decode import MAX_ROWS, flash_decode

FEW = 16  # tokens at most that count as decoding


class FlashCore(AttentionCore):
    """softmax(q k / sqrt d) v in tiles. (B, T, H, d), (B, S, K, d) twice -> as q.

    Args:
        prefer: "fastest", or "triton" for the kernels of this book wherever they can.

    Raises:
        ValueError: `prefer` is neither.
    """

    def __init__(self, prefer: Literal["fastest", "triton"] = "fastest") -> None:
        super().__init__()
        if prefer not in ("fastest", "triton"):
            raise ValueError(f"prefer={prefer!r} is neither 'fastest' nor 'triton'.")
        self.prefer = prefer

    def extra_repr(self) -> str:
        return f"prefer={self.prefer!r}"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        q, k, v = as_autocast(q, k, v)
        if not _fits(q, k, v, layout):
            return super().forward(q, k, v, layout)
        T, S, group = q.size(1), k.size(1), q.size(2) // k.size(2)
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        if T <= FEW and T * group <= MAX_ROWS and not learns:
            return flash_decode(q, k, v, layout.first, layout.last)
        if self.prefer == "fastest" and layout.is_triangle and T == S and _has_cudnn(q):
            return super().forward(q, k, v, layout)
        return flash_attention(q, k, v, layout.first, layout.last)


def _fits(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> bool:
    """Whether the kernels know these; a layout of a kind of its own may hide more."""
    device = q.device.type
    return (
        (device == "cuda" and HAS_TRITON or device == "cpu" and interpreting())
        and q.dtype == k.dtype == v.dtype
        and q.dtype in DTYPES
        and q.size(-1) == v.size(-1) <= MAX_WIDTH
        and type(layout).mask is Layout.mask
        and type(layout).interval is Layout.interval
    )


def _has_cudnn(q: Tensor) -> bool:
    """Whether PyTorch takes cuDNN's kernel here.

    On an H200 it was faster, forward and backward: 11 % at d = 64, 19 % at d = 128.
    """
    return (
        q.device.type == "cuda"
        and q.dtype != torch.float32
        and q.size(-1) <= 128
        and torch.cuda.get_device_capability(q.device)[0] >= 9
    )
