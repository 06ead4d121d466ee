"""One shard: named tensors in one safetensors file, hashed in the same pass that writes it.

In: host tensors. Out: a file that any safetensors reader opens, its size and its sha256. The bytes depend on names and
values alone: larger elements first (so that each tensor is aligned), then by name; row-major whatever the strides.
Format: 8 bytes little-endian header length, JSON header padded with spaces to 8 bytes, the tensors without gaps.
"""

import hashlib
import heapq
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from ii_dist.checkpoint.disk import CHUNK_BYTES, create_file, open_regular, write_views
from ii_dist.config.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from ii_dist.runtime.scattered import Scattered

# safetensors code -> (torch's name, bytes an element)
DTYPES: dict[str, tuple[str, int]] = {
    "BF16": ("bfloat16", 2),
    "BOOL": ("bool", 1),
    "C64": ("complex64", 8),
    "F16": ("float16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I16": ("int16", 2),
    "I32": ("int32", 4),
    "I64": ("int64", 8),
    "I8": ("int8", 1),
    "U16": ("uint16", 2),
    "U32": ("uint32", 4),
    "U64": ("uint64", 8),
    "U8": ("uint8", 1),
}
_CODES = {f"torch.{name}": code for code, (name, _) in DTYPES.items()}
_HEADER_LIMIT_BYTES = 100_000_000
_MOST_CHUNKS_BEHIND = 16
_FLUSH_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor is, without its values. dtype: a key of DTYPES."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def element_bytes(self) -> int:
        return DTYPES[self.dtype][1]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.element_bytes


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A written shard: name in the step folder, size, hash."""

    file: str
    bytes: int
    sha256: str


def spec_of(name: str, tensor: "Tensor | Scattered") -> TensorSpec:
    code = _CODES.get(str(tensor.dtype))
    if code is None:
        raise CheckpointError(f"tensor {name}: dtype {tensor.dtype} cannot be saved; one of {', '.join(DTYPES)} can")
    return TensorSpec(name, code, tuple(tensor.shape))


def assign_shards(names_and_bytes: Iterable[tuple[str, int]], world_size: int) -> list[list[str]]:
    """Names of each rank's share, balanced by bytes: the largest first, each to the rank with the least so far.

    Pure: the same on every rank, whatever the order of the names that come in. A share may be empty.
    """
    shares: list[list[str]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]
    for name, size in sorted(names_and_bytes, key=lambda item: (-item[1], item[0])):
        load, rank = heapq.heappop(loads)
        shares[rank].append(name)
        heapq.heappush(loads, (load + size, rank))
    return [sorted(share) for share in shares]


def file_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The order of tensors in a file: by falling element size, then by name."""
    return sorted(specs, key=lambda spec: (-DTYPES[spec.dtype][1], spec.name))


def encode_header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the first tensor, for tensors stored in the order of `specs`."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.bytes],
        }
        offset += spec.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(tensor: "Tensor") -> memoryview:
    """The row-major bytes of a CPU tensor; a view of its memory when that is row-major already."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


class HashingWriter:
    """Writes a new file in chunks; helper threads hash them and flush them to the disk meanwhile.

    Hashing takes a core, flushing waits for the disk: side by side with the making of the next chunk they take about as
    long as the slowest of the three.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1, "hash")
        self._flusher = ThreadPoolExecutor(1, "flush")
        self._flushing: Future[None] | None = None
        self._flushed_bytes = 0
        self._behind: deque[Future[None]] = deque()
        self._waiting: list[memoryview] = []
        self._waiting_bytes = 0
        self.bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`, which must not change before `finish`: it is not copied."""
        view = memoryview(data)
        for start in range(0, len(view), CHUNK_BYTES):
            piece = view[start : start + CHUNK_BYTES]
            self._waiting.append(piece)
            self._waiting_bytes += len(piece)
            if self._waiting_bytes >= CHUNK_BYTES:
                self._put()

    def finish(self) -> str:
        """Flush to the disk; the sha256 of all that was written."""
        self._put()
        self._flush_begun()
        os.fsync(self._file)
        while self._behind:
            self._behind.popleft().result()
        return self._digest.hexdigest()

    def close(self) -> None:
        self._hasher.shutdown()
        self._flusher.shutdown()

    def _put(self) -> None:
        views, self._waiting, self._waiting_bytes = self._waiting, [], 0
        self._behind.append(self._hasher.submit(self._hash, views))
        self.bytes += write_views(self._file, views)
        if self.bytes - self._flushed_bytes >= _FLUSH_BYTES and (self._flushing is None or self._flushing.done()):
            self._flush_begun()
            self._flushed_bytes = self.bytes
            self._flushing = self._flusher.submit(os.fdatasync, self._file)
        # Pieces that wait for the hasher are kept in memory: not more than a few.
        if len(self._behind) > _MOST_CHUNKS_BEHIND:
            self._behind.popleft().result()

    def _flush_begun(self) -> None:
        """Wait for the flush on its way. The system reports a failed write-back once: no flush may go unasked."""
        if self._flushing is not None:
            self._flushing.result()

    def _hash(self, views: list[memoryview]) -> None:
        for view in views:
            self._digest.update(view)


def write_shard(path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> ShardFile:
    """Write host tensors to the new file `path`; on disk when this returns. Raises OSError, CheckpointError."""
    specs = file_order(spec_of(name, tensor) for name, tensor in tensors.items())
    file = create_file(path)
    writer = HashingWriter(file)
    try:
        writer.write(encode_header(specs, {"format": "pt", **metadata}))
        for spec in specs:
            writer.write(tensor_bytes(tensors[spec.name]))
        sha256 = writer.finish()
    finally:
        writer.close()
        os.close(file)
    return ShardFile(path.name, writer.bytes, sha256)


def read_header(path: Path) -> tuple[int, list[TensorSpec]]:
    """Where the first tensor begins in a safetensors file, and its tensors in file order, which leave no gaps.

    Raises CheckpointError for a header that is too long, not JSON, or does not fit the file's size.
    """
    file = open_regular(path)
    try:
        size = os.fstat(file).st_size
        start = os.read(file, 8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(_HEADER_LIMIT_BYTES, size - 8):
            raise CheckpointError(f"{path.name}: not a safetensors file (its header does not fit)")
        text = b"".join(_read_exactly(file, length))
    finally:
        os.close(file)
    try:
        header = json.loads(text)
        entries = [(name, e) for name, e in header.items() if name != "__metadata__"]
        placed = sorted((tuple(e["data_offsets"]), e["dtype"], tuple(e["shape"]), name) for name, e in entries)
        specs = [TensorSpec(name, dtype, shape) for _, dtype, shape, name in placed]
        end = 0
        for (offsets, *_), spec in zip(placed, specs, strict=True):
            if offsets != (end, end + spec.bytes):
                raise ValueError(spec.name)
            end += spec.bytes
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path.name}: the safetensors header is damaged") from None
    if 8 + length + end != size:
        raise CheckpointError(f"{path.name}: {size} bytes, its header promises {8 + length + end}")
    return 8 + length, specs


def _read_exactly(file: int, count: int) -> Iterator[bytes]:
    while count > 0 and (part := os.read(file, count)):
        count -= len(part)
        yield part
