"""Tensor files that are read and written in pieces, so that a program's memory does not grow with them.

In: where tensors lie in files. Out: their bytes, a piece at a time; and a safetensors file that appears under its name
only when all of it is on the disk. No torch at import.
"""

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ii_dist.checkpoint.disk import create_file, describe, open_regular, sync_folder
from ii_dist.checkpoint.shards import TensorSpec, encode_header, file_order, read_header, spec_of
from ii_dist.config.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

PIECE_BYTES = 1 << 20
"""Most bytes that are handled at once; a multiple of every element's size."""

_FLUSH_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor in a file: its first byte is byte `start`."""

    spec: TensorSpec
    file: Path
    start: int


def placed_tensors(file: Path) -> list[Placed]:
    """The tensors of a safetensors file, in file order. Raises CheckpointError."""
    start, specs = read_header(file)
    found = []
    for spec in specs:
        found.append(Placed(spec, file, start))
        start += spec.bytes
    return found


def pieces(total_bytes: int) -> Iterator[tuple[int, int]]:
    """(first byte, bytes) of each piece of something."""
    for at in range(0, total_bytes, PIECE_BYTES):
        yield at, min(PIECE_BYTES, total_bytes - at)


class TensorReader:
    """Reads bytes of placed tensors; each file is opened once."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def read(self, tensor: Placed, at: int, count: int) -> bytearray:
        """`count` bytes from byte `at` of the tensor. Raises CheckpointError."""
        if tensor.file not in self._files:
            self._files[tensor.file] = open_regular(tensor.file)
        data = bytearray(count)
        read_into(self._files[tensor.file], memoryview(data), tensor.start + at, tensor.file)
        return data

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()


def read_into(file: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill `buffer` from byte `offset` of an open file. Raises CheckpointError when the file ends before."""
    try:
        while buffer:
            count = os.preadv(file, [buffer], offset)
            if not count:
                raise CheckpointError(f"{path}: ends at byte {offset}")
            buffer, offset = buffer[count:], offset + count
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


class TensorDraft:
    """A safetensors file on its way. Pieces may come in any order and from several threads, each byte once."""

    def __init__(self, file: int, specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> None:
        self._file = file
        self._lock = threading.Lock()
        ordered = file_order(specs)
        header = encode_header(ordered, {"format": "pt", **metadata})
        self._starts: dict[str, int] = {}
        self.bytes = len(header)
        for spec in ordered:
            self._starts[spec.name] = self.bytes
            self.bytes += spec.bytes
        # Room for all of it at once: a full disk shows here, not after an hour.
        os.posix_fallocate(file, 0, self.bytes)
        self._written_bytes = self._flushed_bytes = 0
        self._flusher = ThreadPoolExecutor(1, "flush")
        self._flushing: Future[None] | None = None
        self._put(memoryview(header), 0)

    def write(self, name: str, at: int, data: bytes | bytearray | memoryview) -> None:
        """Put `data` at byte `at` of a tensor. Raises OSError."""
        self._put(memoryview(data), self._starts[name] + at)

    def finish(self) -> None:
        assert self._written_bytes == self.bytes, "a tensor was not written whole"
        if self._flushing is not None:
            self._flushing.result()  # the system reports a failed write-back once
        os.fsync(self._file)

    def close(self) -> None:
        self._flusher.shutdown()

    def _put(self, data: memoryview, offset: int) -> None:
        size = len(data)
        while data:
            count = os.pwrite(self._file, data, offset)
            data, offset = data[count:], offset + count
        with self._lock:
            self._written_bytes += size
            self._begin_flush()

    def _begin_flush(self) -> None:
        """Let the disk work while more pieces are made; not in small portions."""
        if self._written_bytes - self._flushed_bytes < _FLUSH_BYTES:
            return
        if self._flushing is None or self._flushing.done():
            if self._flushing is not None:
                self._flushing.result()
            self._flushed_bytes = self._written_bytes
            self._flushing = self._flusher.submit(os.fdatasync, self._file)


@contextmanager
def draft_tensors(out: Path, specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> Iterator[TensorDraft]:
    """A draft that becomes `out` when the block ends well; else `out` is as it was. Raises CheckpointError."""
    draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        file = create_file(draft)
        try:
            tensors = TensorDraft(file, specs, metadata)
            with closing(tensors):
                yield tensors
                tensors.finish()
        finally:
            os.close(file)
        draft.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise CheckpointError(describe(error, out)) from None
    finally:
        draft.unlink(missing_ok=True)


def encode_tensors(tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> bytes:
    """A whole safetensors file of CPU tensors, the same bytes for the same content."""
    specs = file_order(spec_of(name, tensor) for name, tensor in tensors.items())
    header = encode_header(specs, {"format": "pt", **metadata})
    return b"".join([header, *(tensor_bytes(tensors[spec.name]) for spec in specs)])


def tensor_bytes(tensor: "Tensor") -> memoryview:
    """The row-major bytes of a CPU tensor; a view of its memory when that is row-major already."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")
