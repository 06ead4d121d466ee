"""Shards: which tensors go into which file, and the bytes of one file.

In: the names, types and shapes of all tensors; host memory that holds some of them as they will stand in a file. Out: a
file that any safetensors reader opens, its size and its sha256. The bytes depend on names and values alone: larger
elements first (so that each tensor is aligned), then by name; row-major whatever the strides.
Format: 8 bytes little-endian header length, JSON header padded with spaces to 8 bytes, the tensors without gaps.
"""

import heapq
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from ii_dist.checkpoint.disk import open_regular, write_hashed
from ii_dist.config.errors import CheckpointError
from ii_dist.config.run_folder import LAST_STEP

if TYPE_CHECKING:
    import torch
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
# A rank's share is cut into files that are hashed side by side: sha256 of one file keeps one core busy.
PART_BYTES = 1 << 25
MOST_PARTS = 16


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

    @property
    def torch_dtype(self) -> "torch.dtype":
        import torch

        dtype = getattr(torch, DTYPES[self.dtype][0])
        assert isinstance(dtype, torch.dtype)
        return dtype


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A written shard: name in the step folder, size, hash."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ShardImage:
    """A shard in host memory, byte for byte as in the file, but for the header, which is put in front at last.

    specs: its tensors in file order. data: header room, then the tensors; writable. ready: returns when the tensors
    are all there. Raises CheckpointError if they will never be.
    """

    specs: tuple[TensorSpec, ...]
    header_bytes: int
    data: memoryview
    ready: Callable[[], None] = lambda: None

    def put_header(self, step: int) -> None:
        """The same length for every step, so that the tensors stay where they are."""
        self.data[: self.header_bytes] = encode_shard_header(self.specs, step)


def encode_shard_header(specs: Sequence[TensorSpec], step: int) -> bytes:
    """The header of a shard, of the same length for every step."""
    longest = len(encode_header(specs, {"format": "pt", "step": str(LAST_STEP)}))
    return encode_header(specs, {"format": "pt", "step": str(step)}, longest)


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


def plan_shards(specs: Sequence[TensorSpec], world_size: int) -> list[list[str]]:
    """Names of each shard's tensors: equally many shards for every rank, those of rank 0 first.

    Pure, like `assign_shards`. As many shards a rank as its share has PART_BYTES, at least one, at most MOST_PARTS.
    """
    sizes = {spec.name: spec.bytes for spec in specs}
    parts = min(MOST_PARTS, max(1, -(-sum(sizes.values()) // (world_size * PART_BYTES))))
    shares = assign_shards(sizes.items(), world_size)
    return [part for share in shares for part in assign_shards(((n, sizes[n]) for n in share), parts)]


def file_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The order of tensors in a file: by falling element size, then by name."""
    return sorted(specs, key=lambda spec: (-DTYPES[spec.dtype][1], spec.name))


def encode_header(specs: Sequence[TensorSpec], metadata: Mapping[str, str], room_bytes: int = 0) -> bytes:
    """The bytes before the first tensor, for tensors stored in the order of `specs`; at least `room_bytes`."""
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
    text += b" " * max(-len(text) % 8, room_bytes - 8 - len(text))
    return len(text).to_bytes(8, "little") + text


def write_shard(path: Path, image: ShardImage, step: int) -> ShardFile:
    """Write an image, when it is ready, to the new file `path`; on disk when this returns. Raises OSError."""
    image.ready()
    image.put_header(step)
    sha256 = write_hashed(path, image.data)
    return ShardFile(path.name, len(image.data), sha256)


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
