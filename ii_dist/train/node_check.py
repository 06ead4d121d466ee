"""The check of the nodes before training, on one rank: how fast, how far off, how full, which versions.

In: a config, this process's world, a file. Out: the file: one row a rank. `launch.preflight` says what stands out.
Every measurement takes seconds, so that all of them fit into a minute on any machine.
"""

import contextlib
import json
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from ii_dist.checkpoint.disk import replace_file
from ii_dist.config import RunConfig, RunFolder
from ii_dist.data.content import NotAnImage, decode
from ii_dist.data.index import Index, UnreadableFile
from ii_dist.runtime import Heartbeat, World
from ii_dist.runtime.group import all_gather_bytes, close_group, open_group, pick_device

MEASURE_S = 2.0
"""Of each measurement, about; a first round before it is not counted."""
_GROUP_S = 50.0
_FILES = 256
_EXCHANGES = 3
_ROW_BYTES = 4096
_PACKAGES = ("torch", "nvidia-dali-cuda130", "deepspeed", "numpy", "pillow")

Row = dict[str, object]


def check_nodes(cfg: RunConfig, world: World, out: Path) -> int:
    """Measure on all ranks together; rank 0 writes the rows. Collective. Returns the exit code."""
    heart = Heartbeat(world.beat_file)
    device = pick_device(world, cfg.engine.device)
    open_group(world, device, timeout_s=_GROUP_S)
    try:
        heart.sign("start", 0)
        row: Row = {"rank": world.rank, "host": socket.gethostname(), "clock_s": _clock_s(device)}
        row["multiply_gflops"] = _multiply_gflops(device)
        heart.sign("start", 1)
        row["link_mb_per_s"], row["allreduce_mb_per_s"] = _link_mb_per_s(world, device), _allreduce_mb_per_s(device)
        heart.sign("start", 2)
        row["read_mb_per_s"], row["decode_images_per_s"] = _files(cfg, world)
        row["free_bytes"], row["versions"] = _free_bytes(cfg), _versions(device)
        heart.sign("start", 3)
        packed = json.dumps(row).encode()
        assert len(packed) <= _ROW_BYTES, "a row of the check of the nodes does not fit"
        rows = [json.loads(other) for other in all_gather_bytes(packed.ljust(_ROW_BYTES))]
        if world.rank == 0:
            replace_file(out, (json.dumps({"ranks": rows}, indent=1) + "\n").encode())
    finally:
        close_group()
        heart.close()
    return 0


def _clock_s(device: torch.device) -> float:
    """This node's clock minus rank 0's, seconds; exact to the time of one broadcast."""
    if not dist.is_initialized():
        return 0.0
    nearest = float("inf")
    for _ in range(5):
        sent_s = torch.tensor([time.time()], dtype=torch.float64, device=device)
        dist.barrier()
        here_s = time.time()
        dist.broadcast(sent_s, src=0)
        late_s = here_s - float(sent_s)
        nearest = late_s if abs(late_s) < abs(nearest) else nearest
    return nearest


def _per_second(act: Callable[[], object], device: torch.device, measure_s: float = MEASURE_S) -> float:
    """How often a second `act` is done. The number of rounds is fixed before: ranks in a collective agree on it."""
    act()
    _wait(device)
    begin_s = time.perf_counter()
    act()
    _wait(device)
    one_s = torch.tensor([time.perf_counter() - begin_s], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(one_s, op=dist.ReduceOp.MAX)
    rounds = max(1, min(1000, int(measure_s / max(1e-6, float(one_s)))))
    begin_s = time.perf_counter()
    for _ in range(rounds):
        act()
    _wait(device)
    return rounds / (time.perf_counter() - begin_s)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _multiply_gflops(device: torch.device) -> float:
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    left = torch.randn(side, side, dtype=dtype, device=device)
    return _per_second(lambda: left @ left, device) * 2 * side**3 / 1e9


def _allreduce_mb_per_s(device: torch.device) -> float | None:
    if not dist.is_initialized():
        return None
    numbers = torch.zeros(1 << (24 if device.type == "cuda" else 20), device=device)
    return _per_second(lambda: dist.all_reduce(numbers), device, MEASURE_S / 2) * numbers.nbytes / 1e6


def _link_mb_per_s(world: World, device: torch.device) -> float | None:
    """To and from other nodes at once, the better of two rounds with different partners.

    A node whose own link is slow is slow in both rounds, its partners (from four nodes on) only in one.
    """
    nodes, ranks = world.num_nodes, world.local_world_size
    if nodes < 2:
        return None
    out = torch.zeros(1 << (24 if device.type == "cuda" else 20), device=device)
    into = torch.empty_like(out)
    best = 0.0
    for shift in (1, 2 % nodes or 1):
        to = (world.node_rank + shift) % nodes * ranks + world.local_rank
        source = (world.node_rank - shift) % nodes * ranks + world.local_rank
        begin_s = 0.0
        for number in range(_EXCHANGES + 1):
            if number == 1:  # the first one opens connections
                _wait(device)
                begin_s = time.perf_counter()
            acts = [dist.P2POp(dist.isend, out, to), dist.P2POp(dist.irecv, into, source)]
            for work in dist.batch_isend_irecv(acts):
                work.wait()
        _wait(device)
        best = max(best, _EXCHANGES * out.nbytes / 1e6 / (time.perf_counter() - begin_s))
    return best


def _files(cfg: RunConfig, world: World) -> tuple[float | None, float | None]:
    """MB/s of reading, and images a second of decoding, over files that no other rank reads now."""
    if cfg.data.source == "synthetic":
        return None, None
    index = Index.open(Path(cfg.data.root) / "train.index")
    total = index.header.images
    rows = [(world.rank + world.world_size * i) * 7919 % total for i in range(min(_FILES, total))]
    contents, begin_s = [], time.perf_counter()
    for row in rows:
        if time.perf_counter() - begin_s > MEASURE_S:
            break
        try:
            contents.append(index.read_bytes(row))
        except UnreadableFile:
            continue
    if not contents:
        return 0.0, 0.0
    read_mb_per_s = sum(content.nbytes for content in contents) / 1e6 / (time.perf_counter() - begin_s)
    decoded, begin_s = -1, 0.0
    while decoded < 1 or time.perf_counter() - begin_s < MEASURE_S / 2:
        with contextlib.suppress(NotAnImage):
            decode(contents[decoded % len(contents)])
        decoded += 1
        if decoded == 0:  # the first one imports the decoder
            begin_s = time.perf_counter()
    return read_mb_per_s, decoded / (time.perf_counter() - begin_s)


def _free_bytes(cfg: RunConfig) -> dict[str, int]:
    """Where the run writes, and where temporary files go."""
    places = (str(RunFolder(Path(cfg.runs_folder) / cfg.name).root.parent), tempfile.gettempdir())
    return {place: shutil.disk_usage(place).free for place in dict.fromkeys(places) if Path(place).is_dir()}


def _versions(device: torch.device) -> dict[str, str]:
    found = {"python": platform.python_version(), "kernel": platform.release()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["gpu driver"] = _first_line(Path("/proc/driver/nvidia/version"))
        nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        found["nccl"] = ".".join(map(str, nccl))
    return found


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[0][:200]
    except (OSError, IndexError):
        return "unknown"
