"""Faster operators: Triton kernels at the memory limit, each beside its plain twin.

    from minllama.fast_ops import use_fast_ops, fast_loss
    model = use_fast_ops(model)                        # same outputs, fused
    train(model, …, loss=fast_loss)                    # and no logits

On a CPU each operator computes its reference; on a GPU, and on a CPU while
TRITON_INTERPRET=1, its kernel. Operators are traced by `torch.compile(fullgraph=True)`,
have first derivatives only, and repeat bit for bit on the same machine.

A new operator is a file of five parts, and swiglu.py is the template:

1. docstring: the formula forward and backward, and the bytes per element, hence the
   speed to expect;
2. `<op>_reference`: the definition in plain PyTorch;
3. kernels `_<op>_forward`, `_<op>_backward`: load, `.to(tl.float32)`, compute, store;
   offsets that may pass 2^31 in int64;
4. `@operator(fake=…)` around each launch, and an `autograd.Function` that joins them;
5. `<op>`: check shapes, ask `takes_kernel`, apply the function or the reference.

Then a case in tests/fast_ops/test_ops.py, in `bench.py`, and in the benchmark.
"""

from minllama.fast_ops.cross_entropy import cross_entropy, cross_entropy_reference
from minllama.fast_ops.flash_attention import (
    flash_attention,
    flash_attention_reference,
)
from minllama.fast_ops.flash_core import FlashCore
from minllama.fast_ops.flash_decode import flash_decode, flash_decode_reference
from minllama.fast_ops.linear_cross_entropy import (
    fast_loss,
    head_loss,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from minllama.fast_ops.rewrite import fast_ops_report, use_fast_ops
from minllama.fast_ops.rms_norm import (
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)
from minllama.fast_ops.rope import rope, rope_reference
from minllama.fast_ops.softmax import softmax, softmax_reference
from minllama.fast_ops.swiglu import swiglu, swiglu_reference

__all__ = [
    "FlashCore",
    "add_rms_norm",
    "add_rms_norm_reference",
    "cross_entropy",
    "cross_entropy_reference",
    "fast_loss",
    "fast_ops_report",
    "head_loss",
    "flash_attention",
    "flash_attention_reference",
    "flash_decode",
    "flash_decode_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "rms_norm",
    "rms_norm_reference",
    "rope",
    "rope_reference",
    "softmax",
    "softmax_reference",
    "swiglu",
    "swiglu_reference",
    "use_fast_ops",
]
