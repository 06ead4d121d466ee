"""What feeds the devices of a machine: its disk, its loader, the exchange between two processes.

In: a scratch folder, seconds. Out: rates, for `tools.measure_machine`.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import numpy as np

from ii_dist.config import ClusterError, ConfigError, DataFacts, RunConfig
from ii_dist.data import build_index, write_index
from tools._loader_speeds import Setting, source_speed

_DISK_BYTES = 256 << 20
_CHUNK_BYTES = 8 << 20
_JPEGS, _JPEG_SIZE, _JPEG_QUALITY = 64, (500, 375), 90
_LOADER_BATCH = 32
_LINK_ELEMENTS = 8 << 20  # float32: between the gradients of a small and a large network
_LINK_TIMEOUT_S = 60


def disk_mb_per_s(folder: Path) -> float:
    """1e6 bytes a second read from a file that the page cache was asked to drop. Raises ConfigError."""
    block = os.urandom(_CHUNK_BYTES)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".measure_machine-", buffering=0) as file:
            for _ in range(_DISK_BYTES // _CHUNK_BYTES):
                file.write(block)
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            start_s = time.perf_counter()
            while file.read(_CHUNK_BYTES):
                pass
            return _DISK_BYTES / 1e6 / (time.perf_counter() - start_s)
    except OSError as error:
        raise ConfigError(f"--folder {folder}: cannot be written or read ({error.strerror})") from None


def loader_images_per_core_s(folder: Path, seconds: float) -> tuple[float, str]:
    """Finished 224x224 random crops of 500x375 JPEGs that one core makes in a second of CPU time, and by which reader.

    DALI where it is installed, else the torch reader.
    """
    make_jpegs(folder)
    facts = DataFacts(_JPEGS, _JPEGS, 1)
    cfg = RunConfig.model_validate({"name": "probe", "data": {"root": str(folder)}})
    for reader in ("dali", "torch"):
        try:
            speed = source_speed(cfg, folder, facts, _LOADER_BATCH, Setting(reader, 1, 2), seconds)
            return 1000 / speed.cpu_ms_per_image, reader
        except ClusterError:
            continue
    return 0.0, ""


def make_jpegs(folder: Path) -> None:
    """Soft clouds with some grain: about as many bytes as photographs of this size."""
    from PIL import Image

    images = folder / "train" / "class"
    images.mkdir(parents=True)
    for number in range(_JPEGS):
        rng = np.random.Generator(np.random.PCG64(number))
        coarse = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize(_JPEG_SIZE, Image.Resampling.BICUBIC), dtype=np.float64)
        pixels = pixels + rng.normal(0, 12, pixels.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(images / f"{number}.jpg", quality=_JPEG_QUALITY)
    rows, classes = build_index(folder / "train")
    write_index(folder / "train.index", rows, classes, root="train")


# Two processes -------------------------------------------------------------------------------------------------------


def allreduce_rates() -> tuple[float, float]:
    """1e9 bytes a second through each of two gloo processes of this machine, and seconds of a tiny exchange."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tools._machine_parts", str(port)]
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env=os.environ | _ONE_THREAD)
        for rank in range(2)
    ]
    try:
        texts = [process.communicate(timeout=2 * _LINK_TIMEOUT_S)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    if any(process.returncode for process in ranks):
        raise ClusterError("two processes of this machine could not exchange gradients over gloo; see above")
    rate, latency_s = map(float, texts[0].split())
    return rate, latency_s


_ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def _exchange(port: int, rank: int) -> None:
    import torch
    import torch.distributed as dist

    address, timeout = f"tcp://127.0.0.1:{port}", timedelta(seconds=_LINK_TIMEOUT_S)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timeout)
    found = []
    for elements, turns in ((_LINK_ELEMENTS, 6), (1, 50)):
        values, times = torch.zeros(elements), []
        for _ in range(turns):
            dist.barrier()
            start_s = time.perf_counter()
            dist.all_reduce(values)
            times.append(time.perf_counter() - start_s)
        found.append(sorted(times)[len(times) // 2])
    if rank == 0:
        # A ring of two sends and receives each byte once.
        print(4e-9 * _LINK_ELEMENTS / found[0], found[1])
    dist.destroy_process_group()


if __name__ == "__main__":
    _exchange(int(sys.argv[1]), int(sys.argv[2]))
