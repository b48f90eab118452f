"""Triton where it exists, and what every file of kernels needs beside it.

    from minllama.architecture.kernels import launch, takes_kernel, tl, triton

On a machine without Triton (macOS, Windows) that import works and `@triton.jit` too;
only a launch fails, and says so. With TRITON_INTERPRET=1 kernels run in Python on CPU
tensors, a breakpoint inside included. Triton reads that variable where a kernel is
defined, so set it before the first import of one.

The interpreter computes bfloat16 wrongly, in silence: load to float32 at once, and
upcast what goes into `tl.dot` if UPCAST.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

GRID = 65535  # programs at most along a grid's second and third dimension
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Missing:
    """Stands where Triton is not: decorates and annotates, but does not launch."""

    __name__ = "kernel"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of Python itself: inspect and copy ask for these
            raise AttributeError(name)
        return self

    def __call__(self, *args, **kwargs) -> Any:
        return self

    def __getitem__(self, grid) -> Any:
        raise RuntimeError(
            "this kernel needs Triton, which is not installed here; use the reference, "
            "or `pip install triton` on Linux."
        )


try:
    import triton
    import triton.language as tl
    from triton import knobs

    HAS_TRITON, _INTERPRET = True, bool(knobs.runtime.interpret)
except ImportError:
    triton, tl = _Missing(), _Missing()  # type: ignore[assignment]
    HAS_TRITON = _INTERPRET = False


def interpreter_problem(triton_version: str, numpy_version: str) -> str | None:
    """What a reader must install before a loop runs in the interpreter, if anything."""
    old, new = (
        tuple(int(part) for part in version.split(".")[:2])
        for version in (triton_version, numpy_version)
    )
    if old >= (3, 7) or new < (2, 4):
        return None
    return (
        f"Triton {triton_version} cannot interpret loops beside NumPy {numpy_version} "
        "(only 0-dimensional arrays can be converted to Python scalars): "
        "pip install 'numpy<2.4', or a Triton from 3.7 on."
    )


if _INTERPRET and (problem := interpreter_problem(triton.__version__, np.__version__)):
    warnings.warn(problem, RuntimeWarning, stacklevel=2)

UPCAST = tl.constexpr(_INTERPRET)  # in kernels: `if UPCAST: a = a.to(tl.float32)`

launches: Counter[str] = Counter()  # by name of kernel: which ones ran, and how often
compiled: dict[str, Any] = {}  # the last one launched: its `n_regs`, `n_spills`


def interpreting() -> bool:
    """Whether kernels run in Python, on CPU tensors."""
    return _INTERPRET


def takes_kernel(
    op: str, *tensors: Tensor, dtypes: Sequence[torch.dtype] = DTYPES
) -> bool:
    """Whether these inputs of `op` go to a kernel (True) or to its reference (False).

    CUDA tensors take the kernel; CPU tensors only while `interpreting()`. float64 is
    for tests, and takes the reference everywhere.

    Raises:
        ValueError: a dtype or a device that `op` does not know, or two devices.
        RuntimeError: tensors on a GPU, and no Triton.
    """
    first = tensors[0]
    device = first.device.type
    if device not in ("cuda", "cpu"):
        raise ValueError(
            f"{op}: device={first.device} has no kernel; move the tensors to cuda or "
            f"cpu, or call {op}_reference."
        )
    for x in tensors:
        if x.device != first.device:
            raise ValueError(
                f"{op}: tensors on {first.device} and on {x.device}; move them to one."
            )
        if x.dtype not in dtypes and x.dtype != torch.float64:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(
                f"{op}: dtype={x.dtype} is none of {names} (or float64, which takes "
                "the reference); convert it first."
            )
    if any(x.dtype == torch.float64 for x in tensors):
        return False
    if device == "cpu":
        return _INTERPRET
    if not HAS_TRITON:
        raise RuntimeError(
            f"{op}: its kernel needs Triton, which is not installed; `pip install "
            f"triton`, or call {op}_reference."
        )
    return True


def launch(kernel: Any, grid: tuple[int, ...], *args, **meta) -> None:
    """`kernel[grid](*args, **meta)` on the device of its first tensor, and counted.

    An empty grid launches nothing.
    """
    if 0 in grid:
        return
    name = kernel_name(kernel)
    device = next(x.device for x in args if isinstance(x, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current one
            compiled[name] = kernel[grid](*args, **meta)
    else:
        compiled[name] = kernel[grid](*args, **meta)
    launches[name] += 1


def first_derivative_only(op: str) -> None:
    """Called in the backward pass of `op`, whose kernels have no derivative.

    Raises:
        RuntimeError: somebody wants one (`create_graph=True`, a Hessian).
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: its gradient has no derivative in turn (create_graph=True asks for "
            f"one); call {op}_reference where you need second derivatives."
        )


def kernel_name(kernel: Any) -> str:
    """Of the function that is the kernel."""
    return getattr(kernel, "__name__", None) or kernel.fn.__name__


def cdiv(n: int, size: int) -> int:
    """Blocks of `size` that hold n."""
    return -(-n // size)


def as_rows(x: Tensor) -> Tensor:
    """(..., D) -> (rows, D) with neighbours in memory side by side, copied if not."""
    x = x.reshape(x.numel() // max(x.size(-1), 1), x.size(-1))
    return x if x.stride(1) == 1 or x.size(1) == 1 else x.contiguous()


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


_LIBRARY = torch.library.Library("minllama", "FRAGMENT")


def operator(fake: Callable, mutates: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Register a function as `torch.ops.minllama.<its name>`, and give that operator.

    To `torch.compile` and to policies of activation checkpointing it is then one node;
    `fake` (same arguments) makes empty outputs of the right shape and dtype. It has no
    derivative: call it from an `autograd.Function`, which `torch.compile` traces. On a
    CPU forward and backward of an empty operator took 41 us so, 81 us with `custom_op`
    and `register_autograd`, 33 us with no operator at all.

    The schema comes from the annotations; `mutates` names inputs written in place.
    """

    def register(body: Callable) -> Any:
        name = body.__name__
        schema = torch.library.infer_schema(body, mutates_args=mutates)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        for device in ("CPU", "CUDA"):
            _LIBRARY.impl(name, body, device)
        torch.library.register_fake(f"minllama::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.minllama, name).default

    return register


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 3 while interpreting, so that loops go round."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count
