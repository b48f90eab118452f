"""Loading: any number of processes reads what any other number wrote.

Look first (the manifest: names, shapes, configuration), verify second (hashes, the
files shared out among the ranks), and only then change anything.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from minllama.architecture.model import MinimalLlama
from minllama.architecture.train import Run
from minllama.dist_checkpoint.contents import (
    has_both_ends,
    model_tensors,
    reseed,
    restore_rng,
    unwrap,
)
from minllama.dist_checkpoint.fit import LISTED, check_model
from minllama.dist_checkpoint.folders import MANIFEST
from minllama.dist_checkpoint.manifest import (
    check_files,
    latest_checkpoint,
    read_manifest,
    tensors_of,
)
from minllama.dist_checkpoint.optimizer_state import (
    restore_optimizer,
    saved_options,
)
from minllama.dist_checkpoint.pieces import Tensors, fill
from minllama.dist_checkpoint.ranks import Ranks


@dataclass
class Loaded:
    """What a checkpoint said, and what it did not.

    Args:
        path: the checkpoint's own folder.
        step: done when it was saved.
        tokens: learned from until then.
        extra: what was handed to `save_checkpoint`.
        batches: the state of the batches, if they were saved.
        left_alone: names of the model that the checkpoint lacks (strict=False).
        unused: names of the checkpoint that the model lacks (strict=False).
    """

    path: Path
    step: int
    tokens: int
    extra: dict
    batches: dict | None
    left_alone: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def load_checkpoint(
    folder: str | Path,
    model: nn.Module | Run,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    batches=None,
    strict: bool = True,
    rng: bool = True,
    verify: bool = True,
) -> Loaded:
    """Put a checkpoint into a model, sharded in any way; call it in every process.

    Random numbers go on bit for bit on as many processes as saved. On another number
    rank 0 goes on with its own, the others are seeded from it and their rank.

    Numbers are converted to the dtype of the model. In a pipeline each process reads
    what its stages hold, and all of them together must hold the whole.

    Args:
        folder: of a run (its newest complete checkpoint is taken) or of one checkpoint.
        model: built with the same config, also on the meta device; or a `Run`, which
            brings the rest and gets `step` and `tokens`.
        optimizer: made over the model after it was sharded. None: left out.
        batches: get `load_state_dict` of what was saved.
        strict: False: names that one side lacks are left alone, and reported.
        rng: restore the random numbers, if they were saved.
        verify: compare every file that is read with its hash. Costs one more reading.

    Raises:
        ValueError: no complete checkpoint, a file that is damaged, or a model,
            optimizer or config that it does not fit. Nothing was changed.
    """
    run = model if isinstance(model, Run) else None
    if run is not None:
        model, optimizer, batches = run.model, run.optimizer, run.batches
    assert isinstance(model, nn.Module)
    ranks = Ranks()
    path = ranks.first(lambda: find_checkpoint(folder))
    manifest = ranks.together(lambda: read_manifest(path))
    tensors = tensors_of(path, manifest)
    loaded = Loaded(
        path, manifest["step"], manifest["tokens"], manifest["extra"],
        manifest.get("batches"),
    )  # fmt: skip

    def check() -> None:
        stored = tensors.under("model.")
        loaded.left_alone, loaded.unused = check_model(
            path, stored, model, strict, held
        )
        _check_parts(path, manifest, model, optimizer, batches)

    names = ranks.gather(lambda: list(model_tensors(model)))
    held = set().union(*names)
    ranks.together(check)
    if verify:
        parts = {"model"} | ({"optimizer"} if optimizer else set())
        verify_files(path, manifest, parts | ({"rng"} if rng else set()), ranks)

    def put() -> None:
        _fill_model(model, tensors, loaded.left_alone)
        if optimizer is not None:
            _fill_optimizer(model, optimizer, manifest["optimizer"], tensors)
        if batches is not None and loaded.batches is not None:
            batches.load_state_dict(loaded.batches)
        if run is not None:
            run.step, run.tokens = loaded.step, loaded.tokens
        if rng:
            device = next(iter(model_tensors(model).values())).device
            _restore_rng(tensors, manifest["world"], ranks, device)

    ranks.together(put)  # all have read before anyone saves anew
    return loaded


def find_checkpoint(folder: str | Path) -> Path:
    """The folder itself if it is a checkpoint, else the newest complete one in it.

    Raises:
        ValueError: there is none.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        return folder
    newest = latest_checkpoint(folder)
    if newest is None:
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        raise ValueError(
            f"{folder} holds no complete checkpoint (it has "
            f"{', '.join(there[:LISTED]) or 'nothing'}); give the folder that "
            "save_checkpoint wrote to, or start anew."
        )
    return newest


def verify_files(path: Path, manifest: dict, parts: set[str], ranks: Ranks) -> None:
    """Hash the files of these parts, each in one of the ranks.

    Raises:
        ValueError: one is missing or damaged; in every rank.
    """
    names = [
        name
        for name in manifest["files"]
        if name.split("-")[0] in parts or name.endswith(".json")
    ]
    mine = names[ranks.rank :: ranks.world]
    ranks.together(lambda: check_files(path, manifest, mine))


def _check_parts(
    path: Path,
    manifest: dict,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    batches,
) -> None:
    if batches is not None and "batches" not in manifest:
        raise ValueError(f"{path} holds no place in the batches; load it without them.")
    if optimizer is None:
        return
    if "optimizer" not in manifest:
        raise ValueError(f"{path} holds no optimizer; load it without one.")
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(
            "the model is on the meta device, so its parameters will be replaced; call "
            "allocate(model), make the optimizer, and load then."
        )
    saved_options(model, optimizer, manifest["optimizer"])


def _fill_model(model: nn.Module, tensors: Tensors, left_alone: list[str]) -> None:
    allocate(model, drawn=left_alone)
    with torch.no_grad():
        wanted = {
            name: tensor
            for name, tensor in model_tensors(model).items()
            if f"model.{name}" in tensors.stored
        }
        fill(wanted, lambda name, box: tensors.read(f"model.{name}", box))


def allocate(
    model: nn.Module,
    device: torch.device | str | None = None,
    drawn: Iterable[str] = (),
) -> nn.Module:
    """Give what is on the meta device memory, each process only for its part.

    What is there already stays. Then is the time to make the optimizer.

    Args:
        model: sharded or not.
        device: None: that of its mesh, else the CPU.
        drawn: names that nothing will fill; they get random weights.

    Raises:
        ValueError: weights to be drawn in a model that has others already.
    """
    bare, tensors = unwrap(model), model_tensors(model)
    absent = [name for name, tensor in tensors.items() if tensor.is_meta]
    if not absent:
        return model
    lost = [name for name in drawn if name in absent]
    if lost and (len(absent) < len(tensors) or not isinstance(bare, MinimalLlama)):
        raise ValueError(
            f"{', '.join(lost[:LISTED])}: on the meta device, and nothing fills them; "
            "give them values first."
        )
    if device is None:
        meshes = [t.device_mesh for t in tensors.values() if isinstance(t, DTensor)]
        device = meshes[0].device_type if meshes else "cpu"
    if torch.device(device) == torch.device("cuda"):
        device = f"cuda:{torch.cuda.current_device()}"
    bare._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    if isinstance(bare, MinimalLlama):
        if has_both_ends(bare):
            bare.tie_weights()
        if lost:
            bare.init_weights()
    return model


def _fill_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, content: dict, tensors: Tensors
) -> None:
    stored = tensors.under("optimizer.")
    weights = tensors.under("model.")
    room = restore_optimizer(model, optimizer, content, stored, weights)
    with torch.no_grad():
        fill(room, lambda name, box: tensors.read(f"optimizer.{name}", box))


def _restore_rng(
    tensors: Tensors, world: int, ranks: Ranks, device: torch.device
) -> None:
    saved: dict[str, Tensor] = {}
    for name, stored in tensors.under("rng.").items():
        if int(name[:5]) in (0, ranks.rank):
            saved[name] = tensors.read(f"rng.{name}", (slice(0, stored.shape[0]),))
    if not saved:
        return
    if world == ranks.world or ranks.rank == 0:
        restore_rng(saved, ranks.rank, device)
    else:
        reseed(saved["00000.cpu"], ranks.rank)
