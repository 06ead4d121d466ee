"""What Python itself costs in the loader, for a batch of 256 images.

In: the images of `benchmarks.loader`. Out: milliseconds of CPU time a batch.

    training thread    all of `next(source)` in the thread that trains, with the images of the benchmark; waiting for
                       other threads is no CPU time
    preparing          order, crop windows and reading of the files, in one thread: on a GPU this and the training
                       thread's share are all the Python there is
    producing          on the CPU: all of the loader's Python threads together (DALI's own threads run no Python).
                       Images are shrunk to 16x16 pixels here, still normalized in as many pieces as 224x224 ones, so
                       that the calls remain and native work, which lets other threads run, nearly vanishes. System
                       calls and torch's dispatch remain too: an upper bound of the time that the interpreter lock is
                       held
"""

import statistics
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from unittest import mock

from benchmarks.loader_variants import CLASSES, IMAGES, SEED, SIDE, our_source, plan_of_batches

if TYPE_CHECKING:
    from ii_dist.data import Batch

BATCH, TINY_SIDE = 256, 16
BATCHES = 6  # a turn


def measure_python(root: Path, turns: int) -> dict[str, float]:
    """Medians over the turns, milliseconds a batch of 256."""
    found = {
        "training thread": list(_training_thread_ms(root, turns)),
        "preparing": list(_preparing_ms(root, turns)),
        "producing": list(_producing_ms(root, turns)),
    }
    return {name: statistics.median(values) for name, values in found.items()}


def _training_thread_ms(root: Path, turns: int) -> Iterator[float]:
    source = our_source(root, "dali", True, BATCH)
    batches = iter(source)
    next(batches)
    for _ in range(turns):
        before_s = time.thread_time()
        _drop(batches)
        yield 1e3 * (time.thread_time() - before_s) / BATCHES
    source.close()


def _preparing_ms(root: Path, turns: int) -> Iterator[float]:
    from ii_dist.config import DataConfig
    from ii_dist.data import Index
    from ii_dist.data.positions import TrainSchedule
    from ii_dist.data.source import Request

    index = Index.open(root / "train.index")
    schedule = TrainSchedule(plan_of_batches(BATCH), 0, SEED)
    request = Request(DataConfig(image_size=SIDE), schedule, True, SEED, "cpu", True, 1, index)
    for number in range(turns + 1):
        before_s = time.thread_time()
        rows = schedule.rows(number)
        request.windows(rows)
        for row in rows.index_N:
            index.read_bytes(int(row))
        if number:  # the first one reads the files from disk
            yield 1e3 * (time.thread_time() - before_s)


def _producing_ms(root: Path, turns: int) -> Iterator[float]:
    from ii_dist.data import image_ops, resample

    with TemporaryDirectory() as folder:
        tiny = Path(folder)
        make_tiny_images(tiny)
        with mock.patch.object(resample, "SERIAL_VALUES", image_ops.SERIAL_VALUES * TINY_SIDE**2 // SIDE**2):
            source = our_source(tiny, "dali", True, BATCH, TINY_SIDE)
            batches = iter(source)
            _drop(batches)
        for _ in range(turns):
            before = _python_threads_s()
            _drop(batches)
            yield 1e3 * sum(_python_threads_s()[name] - before[name] for name in before) / BATCHES
        source.close()


def make_tiny_images(root: Path) -> None:
    """As many images as the benchmark's, so small that their pixels cost nothing."""
    from PIL import Image

    from ii_dist.data import build_index, write_index

    folder = root / "train" / "class_0"
    folder.mkdir(parents=True)
    for number in range(IMAGES):
        Image.new("RGB", (TINY_SIDE, TINY_SIDE), (number % 256, 0, 0)).save(folder / f"{number:04d}.jpg")
    rows, _ = build_index(root / "train")
    write_index(root / "train.index", rows, [f"class_{label}" for label in range(CLASSES)], root="train")


def _drop(batches: "Iterator[Batch]") -> None:
    for _ in islice(batches, BATCHES):
        pass


def _python_threads_s() -> dict[int, float]:
    """CPU seconds of each thread that Python started, but this one."""
    return {
        thread.ident: time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        for thread in threading.enumerate()
        if thread is not threading.current_thread() and thread.ident is not None
    }
