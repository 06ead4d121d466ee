"""The tensors of a folder that torch.distributed.checkpoint wrote; only read, never written.

In: the folder. Out: its tensors by name, put together from their chunks when asked for, one at a time.
"""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ii_dist.checkpoint.disk import open_regular
from ii_dist.checkpoint.foreign import decode_tensor, read_dcp_metadata
from ii_dist.checkpoint.foreign_tensor import ForeignTensor
from ii_dist.checkpoint.shards import spec_of
from ii_dist.config.errors import CheckpointError

METADATA = ".metadata"


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A box of a tensor: its corner and its sides, and the bytes of a file that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


def dcp_tensors(folder: Path) -> dict[str, ForeignTensor]:
    """Every tensor of the folder, by the name in its metadata; scalars are left out. Raises CheckpointError."""
    metadata = read_dcp_metadata(folder / METADATA)
    try:
        stored = {(index.fqn, _tuple(index.offset)): info for index, info in metadata.storage_data.items()}
        found = {}
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                continue
            size, dtype = _tuple(entry.size), entry.properties.dtype
            chunks = [
                _chunk(folder, _tuple(c.offsets), _tuple(c.sizes), stored[name, _tuple(c.offsets)])
                for c in entry.chunks
            ]
            covered = sum(torch.Size(chunk.sizes).numel() for chunk in chunks)
            if covered != torch.Size(size).numel() or any(not _inside(chunk, size) for chunk in chunks):
                raise CheckpointError(f"{folder}: the chunks of {name} do not fill it")
            empty = torch.empty(size, dtype=dtype, device="meta")
            found[name] = ForeignTensor(spec_of(name, empty), partial(_assemble, chunks, empty))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{folder / METADATA}: damaged ({type(error).__name__}: {text})") from None
    return found


def _tuple(numbers: object) -> tuple[int, ...]:
    """None (a scalar of the state) and sizes alike; ValueError for what is neither."""
    if numbers is None:
        return ()
    if not isinstance(numbers, tuple) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError(f"{numbers!r:.40} is no size")
    return tuple(numbers)


def _chunk(folder: Path, offsets: tuple[int, ...], sizes: tuple[int, ...], info: object) -> _Chunk:
    file, start, length = (getattr(info, key) for key in ("relative_path", "offset", "length"))
    if not (isinstance(file, str) and isinstance(start, int) and isinstance(length, int)):
        raise ValueError("a chunk's place is not a file and two numbers")
    if Path(file).name != file or file in ("", ".", ".."):
        raise CheckpointError(f"{folder / METADATA}: names the file {file!r}, which is not in this folder")
    if getattr(info, "transform_descriptors", None):
        raise CheckpointError(f"{folder}: its files are compressed; save it again without extensions")
    return _Chunk(offsets, sizes, folder / file, start, length)


def _inside(chunk: _Chunk, size: tuple[int, ...]) -> bool:
    ends = (o + s for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
    return len(size) == len(chunk.sizes) and all(end <= side for end, side in zip(ends, size, strict=True))


def _assemble(chunks: list[_Chunk], empty: torch.Tensor) -> torch.Tensor:
    whole = torch.empty(empty.shape, dtype=empty.dtype)
    for chunk in chunks:
        part = decode_tensor(_bytes_of(chunk), str(chunk.file))
        if (tuple(part.shape), part.dtype) != (chunk.sizes, empty.dtype):
            raise CheckpointError(f"{chunk.file}: a chunk is not as {METADATA} says")
        box = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[box] = part
    return whole


def _bytes_of(chunk: _Chunk) -> bytes:
    file = open_regular(chunk.file)
    try:
        if not 0 <= chunk.start <= chunk.start + chunk.length <= os.fstat(file).st_size:
            raise CheckpointError(f"{chunk.file}: shorter than {METADATA} says")
        return os.pread(file, chunk.length, chunk.start)
    except OSError as error:
        raise CheckpointError(f"{chunk.file}: {error.strerror}") from None
    finally:
        os.close(file)
