"""An optimizer's state by the names of the parameters, not by their order.

A torch optimizer numbers its parameters as they were handed to it. Names outlive that:
parameters may be grouped in another order, frozen, or spread over other ranks.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from minllama.dist_checkpoint.contents import check_json, model_tensors

HOW = ("foreach", "fused", "capturable", "differentiable")  # not what is computed


def parameter_names(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[list[str]]:
    """The names of each group's parameters, in the optimizer's order.

    Raises:
        ValueError: a parameter is none of the model's.
    """
    names = {id(tensor): name for name, tensor in model_tensors(model).items()}
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if id(p) not in names:
                raise ValueError(
                    f"group {number} of the optimizer has a parameter {tuple(p.shape)} "
                    "that is none of the model's; make the optimizer after the model "
                    "was sharded, and after allocate(model)."
                )
        groups.append([names[id(p)] for p in group["params"]])
    return groups


def optimizer_contents(
    model: nn.Module, optimizer: torch.optim.Optimizer, kept: Iterable[str]
) -> tuple[dict[str, Tensor], dict]:
    """State tensors by name, and all else as JSON.

    Raises:
        ValueError: a state that is neither a number nor a tensor that is cut as its
            parameter, or an option that JSON does not know.
    """
    kept, left = set(kept), {"params", *HOW}
    tensors, numbers, groups = {}, {}, []
    for group, names in zip(optimizer.param_groups, parameter_names(model, optimizer)):
        for p, name in zip(group["params"], names):
            for key, value in (
                optimizer.state.get(p, {}).items() if name in kept else ()
            ):
                if isinstance(value, Tensor):
                    _check_cut(name, key, p, value)
                    tensors[f"{name}.{key}"] = value
                else:
                    numbers.setdefault(name, {})[key] = value
        options = {k: _as_number(v) for k, v in group.items() if k not in left}
        groups.append({"names": [n for n in names if n in kept], "options": options})
    kind = type(optimizer).__name__
    content = {"class": kind, "groups": groups, "numbers": numbers}
    return tensors, check_json("the optimizer's options", content)


def _check_cut(name: str, key: str, p: Tensor, value: Tensor) -> None:
    if isinstance(p, DTensor) and not isinstance(value, DTensor) and value.dim():
        raise ValueError(
            f"{name}: the optimizer's {key} {tuple(value.shape)} is no DTensor though "
            "its parameter is one, so nobody knows which part of it this process has. "
            "Save the model alone, or use an optimizer whose state is cut as its "
            "parameters."
        )


def _as_number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value  # a rate on the GPU


def merge_contents(parts: list[dict]) -> dict:
    """What the ranks' optimizers hold, as one: stages of a pipeline know other names.

    Of a name that several ranks have, the first rank's options count. Groups of equal
    options become one.
    """
    seen: set[str] = set()
    groups: list[dict] = []
    for group in (group for part in parts for group in part["groups"]):
        names = [name for name in group["names"] if name not in seen]
        seen.update(names)
        same = [g for g in groups if g["options"] == group["options"]]
        if same:
            same[0]["names"] += names
        else:
            groups.append({"names": names, "options": group["options"]})
    numbers = {name: n for part in parts for name, n in part["numbers"].items()}
    return {"class": parts[0]["class"], "groups": groups, "numbers": numbers}


def restore_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    content: dict,
    stored: dict,
    weights: dict,
) -> dict[str, Tensor]:
    """Put options and numbers back, and make room for the tensors.

    A state that had the dtype of its parameter gets that of the parameter here, as the
    optimizer would have made it; another one (float32 beside bfloat16) keeps its own.

    Args:
        model: that the optimizer belongs to.
        optimizer: whose groups may be ordered in another way than when it was saved.
        content: the JSON of `optimizer_contents`.
        stored: `<parameter>.<state>` -> shape and dtype of what will come.
        weights: `<parameter>` -> shape and dtype that it was saved with.

    Returns:
        The tensors to fill, by those names.

    Raises:
        ValueError: a parameter was not in any group, or parameters of two groups are
            in one; or it is the state of an optimizer of another kind.
    """
    kind = type(optimizer).__name__
    if content.get("class", kind) != kind:
        raise ValueError(
            f"the checkpoint holds the state of {content['class']}, not of {kind}; "
            "load the model alone (optimizer=None), or make that optimizer."
        )
    groups = parameter_names(model, optimizer)
    options = saved_options(model, optimizer, content)
    states: dict[str, list[str]] = {}
    for full in stored:
        states.setdefault(full.rpartition(".")[0], []).append(full)
    room = {}
    for group, names, new in zip(optimizer.param_groups, groups, options):
        for key, value in new.items():
            if isinstance(group.get(key), Tensor):  # a rate that a graph reads
                group[key].fill_(value)
            else:
                group[key] = value
        for p, name in zip(group["params"], names):
            old = optimizer.state.pop(p, {})
            state = dict(content["numbers"].get(name, {}))
            for full in states.get(name, ()):
                key = full.rpartition(".")[2]
                shape, dtype = stored[full][:2]
                if key != "step" and dtype == weights[name].dtype:  # steps are counted
                    dtype = p.dtype
                state[key] = _room(p, group, shape, dtype, old.get(key))
                room[full] = state[key]
            if state:
                optimizer.state[p] = state
    return room


def saved_options(
    model: nn.Module, optimizer: torch.optim.Optimizer, content: dict
) -> list[dict]:
    """For each group of the optimizer, the options that it had.

    Raises:
        ValueError: as `restore_optimizer`.
    """
    groups = parameter_names(model, optimizer)
    return [_options(content["groups"], names) for names in groups]


def _options(saved: list[dict], names: list[str]) -> dict:
    """The options that all of these parameters had. Betas are a tuple again."""
    owner = {
        name: index for index, group in enumerate(saved) for name in group["names"]
    }
    lost = [name for name in names if name not in owner]
    found = {owner[name] for name in names if name in owner}
    if lost or len(found) > 1:
        what = (
            f"{lost[0]} was in none" if lost else f"{names[0]} and others were in two"
        )
        raise ValueError(
            f"the optimizer's groups are not those of the checkpoint: {what}; make it "
            "as it was made then, over the same parameters, or load without it."
        )
    options = saved[found.pop()]["options"] if found else {}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


def _room(
    p: Tensor, group: dict, shape: tuple, dtype: torch.dtype, old: Tensor | None
) -> Tensor:
    """A tensor for a state to come; the old one if it fits, for memory's sake."""
    if old is not None and tuple(old.shape) == shape and old.dtype == dtype:
        return old
    if shape == tuple(p.shape):
        return torch.zeros_like(p, dtype=dtype, requires_grad=False)
    on_device = shape or group.get("capturable") or group.get("fused")  # a count: CPU
    return torch.zeros(shape, dtype=dtype, device=p.device if on_device else "cpu")
