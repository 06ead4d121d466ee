"""Writes tar shards in the plain WebDataset layout: for each sample its image, then its label as text.

In: encoded images and labels. Out: uncompressed tar files (ustar) that any tar program, `webdataset` and DALI's
`fn.readers.webdataset` open, and the offset of each image in them. The same samples give the same bytes: members carry
no time, owner or machine. A shard has its name only when it is whole and on disk.

    train-000000.tar:  train_000000417.jpg  train_000000417.cls  train_001102934.jpg  train_001102934.cls ...

The number in a member's name is the sample's row in the index.
"""

import os
import tarfile
from pathlib import Path, PurePosixPath
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 512
_END_BYTES = 2 * BLOCK_BYTES  # two blocks of zeros end a tar file


def shard_name(split: str, number: int) -> str:
    """File name of a shard; a range of them reads train-{000000..000599}.tar in WebDataset's notation."""
    return f"{split}-{number:06d}.tar"


def partial_name(name: str) -> str:
    """What a file is called while it is being made."""
    return f".{name}.partial"


def sample_key(split: str, row: int) -> str:
    """Name of a sample, the same for image and label: unique over all shards of both splits."""
    return f"{split}_{row:09d}"


def image_suffix(path: str) -> str:
    """What stands behind the dot of an image member: the source file's own suffix, `jpg` for every way to spell it."""
    suffix = PurePosixPath(path).suffix[1:].lower()
    return "jpg" if suffix in ("jpeg", "jpe") or not suffix.isalnum() else suffix


def sample_bytes(image_bytes_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """What samples with images of these sizes take in a shard: two headers, padded image, padded label."""
    padded_N: NDArray[np.int64] = -(-image_bytes_N // BLOCK_BYTES) * BLOCK_BYTES
    return padded_N + 3 * BLOCK_BYTES


class ShardWriter:
    """Writes one shard: `with ShardWriter(path) as shard: offset = shard.add(...)`; an error inside leaves no file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(partial_name(path.name))
        self._file = self._partial.open("wb", buffering=1 << 20)
        self.written_bytes = 0

    def add(self, key: str, suffix: str, image: NDArray[np.uint8], label: int) -> int:
        """Append one sample; returns the offset of the image's first byte. Raises OSError."""
        offset = self._member(f"{key}.{suffix}", image.data)
        self._member(f"{key}.cls", memoryview(str(label).encode()))
        return offset

    def _member(self, name: str, content: memoryview) -> int:
        about = tarfile.TarInfo(name)  # time, owner and group are 0 and nameless by default
        about.size = content.nbytes
        self._file.write(about.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
        self._file.write(content)
        padding = -content.nbytes % BLOCK_BYTES
        self._file.write(bytes(padding))
        offset = self.written_bytes + BLOCK_BYTES
        self.written_bytes = offset + content.nbytes + padding
        return offset

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._file.close()
            self._partial.unlink(missing_ok=True)
            return
        self._file.write(bytes(_END_BYTES))
        self.written_bytes += _END_BYTES
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self._path)
        sync_folder(self._path.parent)


def sync_folder(folder: Path) -> None:
    """Make names in a folder last: a rename is on disk only when the folder is."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
