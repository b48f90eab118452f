"""Save and load what is spread over many processes, and lose nothing."""

from minllama.dist_checkpoint.background import PendingSave
from minllama.dist_checkpoint.convert import consolidate, split
from minllama.dist_checkpoint.load import Loaded, allocate, load_checkpoint
from minllama.dist_checkpoint.manifest import latest_checkpoint
from minllama.dist_checkpoint.save import async_save, save_checkpoint
from minllama.dist_checkpoint.weights import load_weights

__all__ = [
    "Loaded",
    "PendingSave",
    "async_save",
    "consolidate",
    "latest_checkpoint",
    "load_checkpoint",
    "load_weights",
    "allocate",
    "save_checkpoint",
    "split",
]
