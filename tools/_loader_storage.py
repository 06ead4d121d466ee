"""How fast encoded images come off the storage, and how fast one core decodes them.

In: an index. Out: `ReadSpeed`s, read with as many threads as the loader reads with; decoded images a CPU second.
"""

import errno
import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ii_dist.config.errors import DataError
from ii_dist.data import Index, Row, write_index
from ii_dist.data.order import epoch_indices

READ_THREADS = 4
_SEED = 0x646F63746F72  # "doctor": rows spread over the whole data set, the same on every call
_AT_ONCE = 256  # images between two looks at the clock
_MOST_BYTES = 4 << 30
_CACHED_ALLOWED = 0.05


@dataclass(frozen=True, slots=True)
class ReadSpeed:
    """Of all reading threads together, wall time."""

    images_per_s: float
    bytes_per_s: float


def spread_rows(index: Index, images: int) -> NDArray[np.int64]:
    """At most `images` rows, each once, from everywhere in the data set."""
    return epoch_indices(len(index), _SEED, 0, np.arange(min(images, len(index)), dtype=np.int64))


def write_sample(index: Index, rows: NDArray[np.int64], folder: Path) -> None:
    """`folder`/train.index: these rows only, of the same files, so that every pass stays in memory."""
    root = index.folder.resolve()
    shards: dict[str, int] = {}
    picked = []
    for row in map(int, rows):
        path, offset = index.place(row)
        name = index.name(row)
        alone = path == f"{index.folder}/{name}"
        shard = -1 if alone else shards.setdefault(os.path.relpath(path, index.folder), len(shards))
        picked.append(
            Row(
                path=name,
                label=int(index.label[row]),
                width=int(index.width[row]),
                height=int(index.height[row]),
                length=int(index.length[row]),
                sha256=index.sha256[row].tobytes(),
                shard=shard,
                offset=offset,
            )
        )
    write_index(folder / "train.index", picked, index.classes, root=str(root), shards=list(shards))


def read_cold(index: Index, seconds: float) -> ReadSpeed | str:
    """Read images that this machine's page cache does not hold; a text that says why where that cannot be had."""
    rows = spread_rows(index, len(index))
    chunks = [rows[first : first + _AT_ONCE] for first in range(0, len(rows), _AT_ONCE)]
    for row in chunks[0]:
        _drop(index, int(row))
    checked = chunks[0][:32]
    try:
        cached = sum(_is_cached(index, int(row)) for row in checked)
    except OSError as error:
        return f"this file system does not say what it holds in memory ({error.strerror})"
    if cached > _CACHED_ALLOWED * len(checked):
        return f"the system keeps {cached} of {len(checked)} images in memory when asked to drop them"
    return _read(index, chunks, seconds, lambda row: _drop(index, row))


def read_warm(index: Index, rows: NDArray[np.int64], seconds: float) -> ReadSpeed:
    """Read the same images again and again out of the page cache."""
    chunks = [rows[first : first + _AT_ONCE] for first in range(0, len(rows), _AT_ONCE)]
    _read(index, chunks, seconds)  # into the cache
    return _read(index, chunks * 1000, seconds)


def decoded_per_cpu_s(index: Index, rows: NDArray[np.int64], seconds: float) -> float:
    """Whole images that one core decodes in a second (PIL, whose wheel brings libjpeg-turbo); CPU time."""
    from PIL import Image

    contents = [index.read_bytes(int(row)) for row in rows[:_AT_ONCE]]
    start_s, end_s, done = time.thread_time(), time.monotonic() + seconds, 0
    while time.monotonic() < end_s:
        try:
            with Image.open(io.BytesIO(contents[done % len(contents)].data)) as image:
                image.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            path = index.place(int(rows[done % len(contents)]))[0]
            raise DataError(f"{path}: cannot be decoded ({str(error).splitlines()[0]}); scan the data set") from None
        done += 1
    return done / (time.thread_time() - start_s)


def _read(
    index: Index, chunks: Sequence[NDArray[np.int64]], seconds: float, before: Callable[[int], None] | None = None
) -> ReadSpeed:
    """Read chunk after chunk, until `seconds` of reading are over; `before` each image, outside the time."""
    took_s, images, read_bytes = 0.0, 0, 0
    end_s = time.monotonic() + 2 * seconds
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for chunk in chunks:
            if took_s >= seconds or time.monotonic() > end_s or read_bytes > _MOST_BYTES:
                break
            if before:
                list(pool.map(before, map(int, chunk)))
            start_s = time.monotonic()
            read_bytes += sum(map(len, pool.map(index.read_bytes, map(int, chunk))))
            took_s += time.monotonic() - start_s
            images += len(chunk)
    return ReadSpeed(images / took_s, read_bytes / took_s)


@contextmanager
def _opened(index: Index, row: int) -> Iterator[tuple[int, int]]:
    """File descriptor and offset of an image."""
    path, offset = index.place(row)
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{path}: named by {index.path}, cannot be read ({error.strerror})") from None
    try:
        yield file, offset
    finally:
        os.close(file)


def _drop(index: Index, row: int) -> None:
    """Ask the system to forget an image's pages; pages not yet written to disk stay."""
    with _opened(index, row) as (file, offset):
        os.posix_fadvise(file, offset, int(index.length[row]), os.POSIX_FADV_DONTNEED)


def _is_cached(index: Index, row: int) -> bool:
    """Whether the image's middle is in the page cache. Raises OSError where the file system cannot tell."""
    with _opened(index, row) as (file, offset):
        try:
            # Answers at once: the byte if it is in memory, else "try again".
            os.preadv(file, [bytearray(1)], offset + int(index.length[row]) // 2, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return False
            raise
    return True
