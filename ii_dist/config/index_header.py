"""Reads what a data-set index says about itself. Standard library only, so that a config check needs no numpy.

An index is one file a split, in the safetensors layout: 8 bytes (length of the header, little endian), a JSON header,
then the columns as raw bytes. The header's `__metadata__` names format, version, images, classes, shards, a sha256 of
these and the columns, the folder that paths are relative to, and a summary by which two indexes are told apart in words
(`ii_dist.config.index_change`). `ii_dist.data.index_write` writes it, `ii_dist.data.index` maps the columns.

In: the path of an index. Out: `IndexHeader`.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ii_dist.config.errors import DataError

INDEX_FORMAT = "ii_dist.index"
INDEX_VERSION = "1"
MAX_HEADER_BYTES = 100_000_000
_HOW = "make it with: python -m tools.index_dataset, or python -m tools.import_dataset"


@dataclass(frozen=True, slots=True)
class Column:
    """Where one column lies: safetensors type name, shape, first and last byte from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class IndexHeader:
    """What an index says of itself. `root` is the images' folder, relative to the index or absolute;
    `sha256` (hex) stands for the whole content and was computed when the index was written; `summary` is JSON text,
    "" in an index of an earlier program."""

    version: str
    images: int
    classes: tuple[str, ...]
    shards: tuple[str, ...]
    root: str
    sha256: str
    summary: str = field(repr=False)
    columns: Mapping[str, Column] = field(repr=False)
    shard_bytes: tuple[int, ...] = ()
    """Size of each shard; empty in an index that does not know."""


def read_index_header(path: str | Path) -> IndexHeader:
    """Read the header only. Raises DataError (one line) for a file that is missing, of another kind or version."""
    raw, data_start, file_bytes = _read_json(Path(path))
    try:
        meta = raw.pop("__metadata__")
        found, version = meta["format"], meta["version"]
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: not a data-set index (no format name in its header); {_HOW}") from None
    if found != INDEX_FORMAT:
        raise DataError(f"{path}: not a data-set index (it calls itself {found!r}); {_HOW}")
    if version != INDEX_VERSION:
        raise DataError(f"{path}: index version {version!r}, this program reads {INDEX_VERSION!r}; {_HOW}")
    try:
        header = IndexHeader(
            version=version,
            images=int(meta["images"]),
            classes=tuple(str(name) for name in json.loads(meta["classes"])),
            shards=tuple(str(name) for name in json.loads(meta["shards"])),
            root=str(meta["root"]),
            sha256=str(meta["sha256"]),
            summary=str(meta.get("summary", "")),
            columns={name: _column(entry, data_start) for name, entry in raw.items()},
            shard_bytes=tuple(int(count) for count in json.loads(meta.get("shard_bytes", "[]"))),
        )
        if header.shard_bytes and len(header.shard_bytes) != len(header.shards):
            raise ValueError(f"{len(header.shards)} shards, {len(header.shard_bytes)} sizes")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: damaged index header ({type(error).__name__}: {error}); {_HOW}") from None
    end = max((column.end for column in header.columns.values()), default=data_start)
    if end != file_bytes:
        raise DataError(f"{path}: damaged index, {file_bytes} bytes where its header says {end}; {_HOW}")
    return header


def _read_json(path: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON header, the position of the first data byte, and the file's length."""
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, file_bytes - 8):
                raise DataError(f"{path}: not a data-set index; {_HOW}")
            raw = json.loads(file.read(length))
    except FileNotFoundError:
        raise DataError(f"{path}: no such index; {_HOW}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read the index ({error.strerror})") from None
    except ValueError:
        raise DataError(f"{path}: not a data-set index (its header is not JSON); {_HOW}") from None
    if not isinstance(raw, dict):
        raise DataError(f"{path}: not a data-set index (its header is not a table); {_HOW}")
    return raw, 8 + length, file_bytes


def _column(entry: Mapping[str, Any], data_start: int) -> Column:
    start, end = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    return Column(str(entry["dtype"]), shape, data_start + int(start), data_start + int(end))
