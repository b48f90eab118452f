"""Saving and loading what is sharded: seconds, bytes/s, and how long training waits.

    torchrun --nproc-per-node 4 benchmarks/bench_dist_checkpoint.py --device cuda \
        --model llama-3.1-8b --out DIR
    python benchmarks/bench_dist_checkpoint.py --smoke

The model is made on the meta device and cut by `fully_shard`; with --optimizer AdamW
has stepped once (8B: 16 GB of weights in bfloat16, 48 GB with the moments; the folder
needs four times that). The peer is torch.distributed.checkpoint's own save, async_save
and load of the same state, to the same disk, in turns. It keeps no hashes;
"load unverified" is ours without hashing. The disk's limit is a plain write and fsync
by each rank.

Prediction for 8B weights on 4 ranks, 4 GB each. SHA-256 runs at about 1.7 GB/s a core
beside the writing: 2.4 s, unless the disk is slower. The stall is the copy to pinned
memory: 0.1 s at 50 GB/s, and in the first save the pinning of those pages before.
"""

import argparse
import gc
import os
import shutil
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import record
from minllama.architecture.config import LlamaConfig
from minllama.architecture.model import MinimalLlama
from minllama.architecture.optim import make_adamw
from minllama.dist_checkpoint import (
    allocate,
    async_save,
    consolidate,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from minllama.dist_run.mesh import init_mesh

SMOKE = {"vocab_size": 512, "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2,
         "ffn_dim": 128}  # fmt: skip


def status(field: str) -> int:
    """Bytes that /proc says this process has (VmRSS) or had at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1]) * 1024


class Clock:
    """Seconds of a piece of work in the slowest rank, and the peak of its memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, work) -> dict:
        gc.collect()
        self._wait()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass  # no permission: the peak is that of the whole run
        before = status("VmRSS")
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.reset_peak_host_memory_stats()
        start = time.perf_counter()
        stall = work()
        self._wait()
        seconds = time.perf_counter() - start
        host = status("VmHWM") - before
        if self.device.type == "cuda":  # pinned pages are not in VmHWM
            host += torch.cuda.host_memory_stats().get("active_bytes.peak", 0)
        gpu = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        numbers = torch.tensor([seconds, stall or 0.0, host, gpu], device=self.device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        names = ("seconds", "stall", "host", "gpu")
        return dict(zip(names, numbers.tolist()))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()


def build(config: LlamaConfig, dtype: torch.dtype, mesh, device: str, adamw: bool):
    """A sharded model with random weights; its optimizer after one step, or None."""
    model = sharded(config, dtype, mesh)
    allocate(model, device)
    model.init_weights()
    if not adamw:
        return model, None
    optimizer = make_adamw(model, 1e-4)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def sharded(config: LlamaConfig, dtype: torch.dtype, mesh):
    with torch.device("meta"):
        model = MinimalLlama.from_config(config).to(dtype)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    return model


def disk_speed(folder: Path, rank: int, size: int) -> float:
    """Bytes/s of all ranks together, each writing a file in blocks, fsync included."""
    block, path = os.urandom(1 << 24), folder / f"speed-{rank}"
    count = max(1, size >> 24)
    dist.barrier()
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(count):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    dist.barrier()
    seconds = time.perf_counter() - start
    path.unlink()
    return dist.get_world_size() * count * len(block) / seconds


class Bench:
    """The cases, one method each; every rank runs all of them."""

    def __init__(self, options, folder: Path, mesh) -> None:
        self.options, self.folder, self.mesh = options, folder, mesh
        self.config = (
            LlamaConfig(**SMOKE)
            if options.smoke
            else LlamaConfig.from_name(options.model)
        )
        self.dtype = getattr(torch, options.dtype)
        self.device = torch.device(options.device)
        self.clock = Clock(self.device)
        self.model, self.optimizer = build(
            self.config, self.dtype, mesh, options.device, options.optimizer
        )
        self.rows: list[dict] = []

    def note(self, what: str, library: str, runs: list[dict], size: int) -> None:
        """A row: the median of the runs, the first one told apart."""
        seconds = statistics.median(run["seconds"] for run in runs)
        self.rows.append({
            "what": what, "library": library, "world": dist.get_world_size(),
            "gigabytes": f"{size / 1e9:.3f}", "seconds": f"{seconds:.3f}",
            "first_seconds": f"{runs[0]['seconds']:.3f}",
            "GB_per_s": f"{size / 1e9 / seconds:.2f}",
            "stall_seconds": f"{statistics.median(r['stall'] for r in runs):.3f}",
            "first_stall_seconds": f"{runs[0]['stall']:.3f}",
            "host_peak_GB_per_rank": f"{max(r['host'] for r in runs) / 1e9:.3f}",
            "gpu_peak_GB_per_rank": f"{max(r['gpu'] for r in runs) / 1e9:.2f}",
        })  # fmt: skip
        if dist.get_rank() == 0:
            print(record.table(self.rows[-1:]), flush=True)

    def run(self) -> list[dict]:
        ours, theirs = self.folder / "ours", self.folder / "dcp"
        runs: dict[str, list[dict]] = {}
        speeds = []
        for number in range(self.options.repeats):
            speeds.append(disk_speed(self.folder, dist.get_rank(), self.options.probe))
            for name, work in {
                "save": partial(self.save, ours, number),
                "dcp save": lambda: self.dcp_save(theirs),
                "async": partial(self.save_async, ours, number),
                "dcp async": lambda: self.dcp_async(theirs),
                "load": lambda: self.load(ours, True),
                "load unverified": lambda: self.load(ours, False),
                "dcp load": lambda: self.dcp_load(theirs),
            }.items():
                if name.startswith("dcp") and self.options.no_peer:
                    continue
                runs.setdefault(name, []).append(self.clock(work))
        size = total_bytes(ours)
        probe = {"seconds": size / statistics.median(speeds), "stall": 0.0}
        self.note(
            "write limit", "write and fsync", [{**probe, "host": 0, "gpu": 0}], size
        )
        for name, found in runs.items():
            library = "torch DCP" if name.startswith("dcp") else "minllama"
            self.note(name.removeprefix("dcp "), library, found, size)
        shutil_together(theirs)
        self.convert(ours)
        return self.rows

    def convert(self, ours: Path) -> None:
        """Rank 0 writes a folder for everybody; and that into new shards."""
        out = self.folder / "hf"
        del self.model, self.optimizer
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

        def consolidate_first() -> None:
            if dist.get_rank() == 0:
                consolidate(ours, out)

        runs = [self.clock(consolidate_first)]
        size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
        self.note("consolidate (rank 0)", "minllama", runs, size)
        model = sharded(self.config, self.dtype, self.mesh)

        def read() -> None:
            load_weights(model, out)

        self.note("load Hugging Face folder", "minllama", [self.clock(read)], size)

    def save(self, folder: Path, number: int) -> None:
        save_checkpoint(folder, self.model, self.optimizer, step=number, keep=1)

    def save_async(self, folder: Path, number: int) -> float:
        pending = async_save(folder, self.model, self.optimizer, step=number, keep=1)
        pending.result()
        return pending.stall

    def load(self, folder: Path, verify: bool) -> None:
        load_checkpoint(folder, self.model, self.optimizer, verify=verify)

    def _state(self) -> dict:
        if self.optimizer is None:
            return {"model": get_model_state_dict(self.model)}
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def dcp_save(self, folder: Path) -> None:
        shutil_together(folder)
        dcp.save(self._state(), checkpoint_id=folder)

    def dcp_async(self, folder: Path) -> float:
        shutil_together(folder)
        start = time.perf_counter()
        pending = dcp.async_save(self._state(), checkpoint_id=folder)
        stall = time.perf_counter() - start
        pending.result()
        return stall

    def dcp_load(self, folder: Path) -> None:
        dcp.load(self._state(), checkpoint_id=folder)


def shutil_together(folder: Path) -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()


def total_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--dtype", default="bfloat16", help="weights and moments")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--probe", type=int, default=1 << 30, help="bytes a rank")
    parser.add_argument("--optimizer", action="store_true", help="AdamW's state, too")
    parser.add_argument("--no-peer", action="store_true", help="leave DCP's own out")
    parser.add_argument("--folder", help="where to write; default: a temporary folder")
    parser.add_argument("--smoke", action="store_true", help="seconds, writes nothing")
    parser.add_argument("--out", default=str(record.RESULTS))
    options = parser.parse_args()
    if options.smoke:
        options.device, options.dtype, options.probe = "cpu", "float32", 1 << 24
        options.optimizer = True
    init(options.device)
    mesh = init_mesh(device=options.device)
    place = [None]
    if dist.get_rank() == 0:
        place[0] = tempfile.mkdtemp(prefix="bench-", dir=options.folder)
    dist.broadcast_object_list(place)
    try:
        rows = Bench(options, Path(place[0]), mesh).run()
        if dist.get_rank() == 0:
            model = "smoke" if options.smoke else options.model
            case = {
                "model": model, "dtype": options.dtype, "repeats": options.repeats,
                "holds": "weights and AdamW" if options.optimizer else "weights",
            }  # fmt: skip
            rows = [{**case, **row} for row in rows]
            print(record.table(rows))
            if not options.smoke:
                name = f"dist_checkpoint_{options.device}"
                print(record.write(name, rows, options.device, Path(options.out)).name)
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(place[0], ignore_errors=True)
    gc.collect()
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # a thread of gloo may hold Python objects: nothing is taken down


def init(device: str) -> None:
    """The process group: gloo beside NCCL, since DCP's async_save asks for both."""
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


if __name__ == "__main__":
    main()
