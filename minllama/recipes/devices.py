"""Where a recipe runs."""

import torch


def best_device() -> str:
    """The fastest device that torch can see: cuda, then mps, then cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(name: str | None) -> str:
    """That device if torch can use it; None: the fastest.

    Raises:
        ValueError: torch knows no such device here.
    """
    if name is None:
        return best_device()
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={name!r} cannot be used here ({str(error).splitlines()[0]}); this "
            f"machine's fastest is {best_device()!r}."
        ) from None
    return name
