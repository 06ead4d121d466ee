"""Writes an index: whole or not at all.

In: rows, or columns as arrays, and the classes. Out: a file in the layout that `ii_dist.data.index` describes and maps,
with a summary in its header by which two indexes are told apart in words (`ii_dist.config.index_change`).
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ii_dist.config.errors import DataError
from ii_dist.config.index_header import INDEX_FORMAT, INDEX_VERSION
from ii_dist.data.index import COLUMNS, Row

Columns = Mapping[str, NDArray[Any]]


def write_index(
    path: str | Path,
    rows: Sequence[Row],
    classes: Sequence[str],
    *,
    root: str = ".",
    shards: Sequence[str] = (),
    shard_bytes: Sequence[int] = (),
) -> str:
    """Write an index (temporary file, fsync, rename); returns its digest. Raises DataError.

    root: the images' folder, relative to the index's or absolute. shard_bytes: size of each shard; none = not checked.
    """
    return write_columns(path, _columns_of(rows), classes, root=root, shards=shards, shard_bytes=shard_bytes)


def write_columns(
    path: str | Path,
    columns: Columns,
    classes: Sequence[str],
    *,
    root: str = ".",
    shards: Sequence[str] = (),
    shard_bytes: Sequence[int] = (),
) -> str:
    """`write_index` for columns that are arrays already, with the names and shapes of the layout."""
    path = Path(path)
    arrays = {name: np.ascontiguousarray(columns[name], dtype=kind) for name, (_, kind, _) in COLUMNS.items()}
    images = len(arrays["label"])
    if not images:
        raise DataError(f"{path}: no images to index")
    about = {
        "format": INDEX_FORMAT,
        "version": INDEX_VERSION,
        "images": str(images),
        "classes": json.dumps(list(classes)),
        "shards": json.dumps(list(shards)),
    }
    if shard_bytes:
        about["shard_bytes"] = json.dumps(list(shard_bytes))
    # The root stays out: the same images at another place are the same data set.
    content = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    header: dict[str, object] = {}
    start = 0
    for name, (type_name, _, tail) in COLUMNS.items():
        column = arrays[name]
        length = column.size if name == "path_bytes" else images + (name == "path_offsets")
        assert column.shape == (length, *tail), f"column {name}: shape {column.shape}, not {(length, *tail)}"
        content.update(column.data)
        header[name] = {"dtype": type_name, "shape": list(column.shape), "data_offsets": [start, start + column.nbytes]}
        start += column.nbytes
    summary = json.dumps(_summary(arrays, len(classes)))
    metadata = {**about, "root": root, "sha256": content.hexdigest(), "summary": summary}
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    text += b" " * (-len(text) % 8)  # the columns start at a multiple of 8
    _write_whole(path, [len(text).to_bytes(8, "little"), text, *(arrays[name].data for name in COLUMNS)])
    return content.hexdigest()


def _summary(columns: Columns, classes: int) -> dict[str, Any]:
    """Images and content of each class, and one digest a kind of column; not part of the index's own digest."""
    label = columns["label"]
    known = (label >= 0) & (label < classes)
    # The sum over a class's images of 64 bits of their hashes: the same in any order, another for any other image.
    sums = np.zeros(classes, np.uint64)
    np.add.at(sums, label[known], columns["sha256"][known, :8].copy().view("<u8")[:, 0])
    kinds = {
        "order": ("sha256",),
        "paths": ("path_offsets", "path_bytes"),
        "places": ("shard", "offset"),
        "sizes": ("width", "height", "length"),
    }
    digests = {}
    for kind, names in kinds.items():
        digest = hashlib.sha256()
        for name in names:
            digest.update(columns[name].data)
        digests[kind] = digest.hexdigest()[:16]
    return {
        "class_images": np.bincount(label[known], minlength=classes).tolist(),
        "class_contents": [f"{value:016x}" for value in sums.tolist()],
        "digests": digests,
    }


def _columns_of(rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
    paths = [row.path.encode() for row in rows]
    columns: dict[str, NDArray[Any]] = {
        "path_offsets": np.cumsum([0, *map(len, paths)], dtype=np.int64),
        "path_bytes": np.frombuffer(b"".join(paths), dtype=np.uint8),
        "sha256": np.frombuffer(b"".join(row.sha256 for row in rows), dtype=np.uint8).reshape(len(rows), 32),
    }
    for name in ("offset", "length", "shard", "label", "width", "height"):
        columns[name] = np.array([getattr(row, name) for row in rows], dtype=COLUMNS[name][1])
    return columns


def _write_whole(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot write the index ({error.strerror})") from None
