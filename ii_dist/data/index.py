"""The index: one file a split, the only thing that says what the data set is.

In: the path of an index. Out: `Index`, which maps the columns without copying them. `ii_dist.data.scan` makes the rows
(path or place in a shard, bytes, label, width, height, sha256), `ii_dist.data.index_write` the file, in the safetensors
layout (any safetensors reader opens it), and `ii_dist.config.index_header` reads its header. Columns, N rows:

    path_offsets int64 N+1, path_bytes uint8    path of row i: bytes path_offsets[i] .. path_offsets[i+1], UTF-8
    shard int32 N, offset int64 N               -1, 0: a file of its own; else place in metadata's shards[shard]
    length int64 N                              bytes of the encoded image
    label, width, height int32 N                class; pixels as stored (no EXIF turn)
    sha256 uint8 N x 32                         of the encoded image
"""

import logging
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ii_dist.config.errors import DataError
from ii_dist.config.index_header import IndexHeader, read_index_header
from ii_dist.data.shard_reader import PACK_AGAIN, ShardReader
from ii_dist.data.substitute import allowed

_log = logging.getLogger(__name__)

# name -> (safetensors type, numpy type, shape after N). Wide types first: each column starts at a multiple of its size.
COLUMNS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "path_offsets": ("I64", "<i8", ()),
    "offset": ("I64", "<i8", ()),
    "length": ("I64", "<i8", ()),
    "shard": ("I32", "<i4", ()),
    "label": ("I32", "<i4", ()),
    "width": ("I32", "<i4", ()),
    "height": ("I32", "<i4", ()),
    "sha256": ("U8", "u1", (32,)),
    "path_bytes": ("U8", "u1", ()),
}
MAX_SIDE, MAX_IMAGE_BYTES = 1 << 20, 1 << 30
_CHECK_ALL_UP_TO = 2000
_AGAIN = "make the index again with: python -m tools.index_dataset"


class UnreadableFile(DataError):
    """A file that the system cannot open or read. number: its errno; reason: the same in words; what: with the path."""

    def __init__(self, path: str, index: Path, number: int, remedy: str) -> None:
        self.number, self.reason = number, f"cannot be read ({os.strerror(number)})"
        self.what = f"{path}: named by {index}, {self.reason}"
        super().__init__(f"{self.what}; {remedy}")


@dataclass(frozen=True, slots=True)
class Row:
    """One image as the index describes it. `path` is relative to the images' folder, with '/' between parts."""

    path: str
    label: int
    width: int
    height: int
    length: int
    sha256: bytes
    shard: int = -1
    offset: int = 0


class Index:
    """A mapped index. Column arrays are read-only views of the file: they cost no memory until they are touched."""

    def __init__(self, path: Path, header: IndexHeader, content: mmap.mmap) -> None:
        columns = _map_columns(path, header, content)
        self.path, self.header = path, header
        self.folder = path.parent / header.root
        self._folder_text = str(self.folder)
        self.shards = ShardReader(self._folder_text, header.shards, header.shard_bytes)
        self.label: NDArray[np.int32] = columns["label"]  # type: ignore[assignment]  # the layout fixes these types
        self.width: NDArray[np.int32] = columns["width"]  # type: ignore[assignment]
        self.height: NDArray[np.int32] = columns["height"]  # type: ignore[assignment]
        self.length: NDArray[np.int64] = columns["length"]  # type: ignore[assignment]
        self.sha256: NDArray[np.uint8] = columns["sha256"]  # type: ignore[assignment]
        self._shard, self._offset = columns["shard"], columns["offset"]
        self._path_offsets, self._path_bytes = columns["path_offsets"], columns["path_bytes"]

    @classmethod
    def open(cls, path: str | Path) -> "Index":
        """Map an index. Raises DataError for a file that is missing, damaged, empty, or has labels out of range."""
        path = Path(path)
        header = read_index_header(path)
        if header.images < 1:
            raise DataError(f"{path}: the index is empty; {_AGAIN}")
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        index = cls(path, header, content)
        index._check_values()
        # Checking has touched a fifth of the file: those pages stay in the system's cache, but need not stay ours.
        content.madvise(mmap.MADV_DONTNEED)
        return index

    def _check_values(self) -> None:
        """What would end a run late or oddly is refused here: 24 bytes a row are looked at, no path and no hash."""
        classes, shards = len(self.classes), len(self.header.shards)
        bounds: tuple[tuple[str, NDArray[Any], int, int, str], ...] = (
            ("label", self.label, 0, classes - 1, f"is not among its {classes} classes"),
            ("shard", self._shard, -1, shards - 1, "is one that it does not name"),
            ("width", self.width, 1, MAX_SIDE, "is not that of an image"),
            ("height", self.height, 1, MAX_SIDE, "is not that of an image"),
            ("length", self.length, 1, MAX_IMAGE_BYTES, "is not that of an image"),
        )
        for name, column, low, high, reason in bounds:
            if int(column.min()) < low or int(column.max()) > high:
                again = PACK_AGAIN if name == "shard" else _AGAIN
                wrong = np.flatnonzero((column < low) | (column > high))
                row, others = int(wrong[0]), f" (and {len(wrong) - 1:,} others)" if len(wrong) > 1 else ""
                raise DataError(f"{self.path}: {name} {column[row]} of {self.name(row)}{others} {reason}; {again}")

    def __len__(self) -> int:
        return self.header.images

    @property
    def classes(self) -> tuple[str, ...]:
        return self.header.classes

    @property
    def digest(self) -> str:
        """Hex sha256 that stands for the whole content; computed when the index was written, so it costs nothing."""
        return self.header.sha256

    def name(self, row: int) -> str:
        """The row's path as it stands in the index."""
        first, last = self._path_offsets[row : row + 2]
        return bytes(self._path_bytes[int(first) : int(last)]).decode()

    def place(self, row: int) -> tuple[str, int]:
        """Path of the file that holds the row's image, and the offset of its first byte."""
        shard = int(self._shard[row])
        path = f"{self._folder_text}/{self.name(row)}" if shard < 0 else self.shards.path(shard)
        return path, int(self._offset[row])

    def read_bytes(self, row: int) -> NDArray[np.uint8]:
        """The encoded image. Raises UnreadableFile where the system does not give it, DataError where it is of another
        length: a changed file is another data set."""
        length, shard = int(self.length[row]), int(self._shard[row])
        if shard >= 0:
            return self._read_from_shard(shard, int(self._offset[row]), length)
        path, _ = self.place(row)
        # One byte more than indexed: a file that grew is noticed without asking for its size.
        buffer = np.empty(length + 1, dtype=np.uint8)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                found = os.preadv(file, [buffer.data], 0)
            finally:
                os.close(file)
        except OSError as error:
            raise UnreadableFile(path, self.path, error.errno or 0, _AGAIN) from None
        if found != length:
            raise DataError(f"{path}: has not the {length} bytes that {self.path} says; {_AGAIN}")
        return buffer[:length]

    def _read_from_shard(self, shard: int, offset: int, length: int) -> NDArray[np.uint8]:
        buffer = np.empty(length, dtype=np.uint8)
        path = self.shards.path(shard)
        try:
            found = self.shards.read(shard, offset, buffer.data)
        except OSError as error:
            raise UnreadableFile(path, self.path, error.errno or 0, PACK_AGAIN) from None
        if found != length:
            raise DataError(f"{path}: ends before the {length:,} bytes at {offset:,} of {self.path}; {PACK_AGAIN}")
        return buffer

    def is_alone(self, row: int) -> bool:
        """Whether the row's image is a file of its own."""
        return int(self._shard[row]) < 0

    def told(self, row: int) -> str:
        """What a person calls the row's image: its path, or its shard and the path that it was packed from."""
        path, _ = self.place(row)
        return path if self.is_alone(row) else f"{path} ({self.name(row)})"


def check_files(index: Index, part: int = 0, parts: int = 1, max_bad_share: float = 0.0) -> None:
    """Look whether what is indexed exists: all files of a few, an even sample of many, every shard and its size.

    part, parts: look at one of so many equal shares, so that all ranks together look once. Raises DataError where a
    shard is not as indexed, or where more files are missing than `max_bad_share` allows; fewer give way to other images
    when their turn comes.
    """
    for shard in range(part, len(index.header.shards), parts):
        index.shards.check(shard)
    stride = -(-len(index) // _CHECK_ALL_UP_TO)
    rows = range(part * stride, len(index), parts * stride)
    missing = [row for row in rows if index.is_alone(row) and not Path(index.place(row)[0]).is_file()]
    if not missing:
        return
    what = (
        f"{index.place(missing[0])[0]}: named by {index.path}, does not exist "
        f"({len(missing)} of {len(rows)} files looked for are missing)"
    )
    if len(missing) > allowed(len(rows), max_bad_share):
        raise DataError(f"{what}; {_AGAIN}")
    _log.warning("%s; data.max_bad_share allows it", what)


def _map_columns(path: Path, header: IndexHeader, content: mmap.mmap) -> dict[str, NDArray[np.generic]]:
    """Read-only arrays over the mapped file. Raises DataError where a column is not as the layout says."""
    columns: dict[str, NDArray[np.generic]] = {}
    for name, (type_name, numpy_type, tail) in COLUMNS.items():
        found = header.columns.get(name)
        length = header.images + (name == "path_offsets")
        if found is None or found.dtype != type_name or (name != "path_bytes" and found.shape != (length, *tail)):
            raise DataError(f"{path}: damaged index, column {name} is not as its version says; {_AGAIN}")
        count = int(np.prod(found.shape))
        if found.end - found.start != count * np.dtype(numpy_type).itemsize:
            raise DataError(f"{path}: damaged index, column {name} has not its {count} values; {_AGAIN}")
        columns[name] = np.frombuffer(content, numpy_type, count, found.start).reshape(found.shape)
    return columns
