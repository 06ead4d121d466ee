"""What the importers share: a target folder that knows what it holds, whole files, both indexes, progress.

In: images by split and class. Out: `<out>/train/<class>/...`, `<out>/val/<class>/...`, `<out>/train.index`,
`<out>/val.index`. A file has its name only when it is whole, so an import that was killed goes on where it stopped.
"""

import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from ii_dist.config.errors import DataError
from ii_dist.config.index_header import read_index_header
from ii_dist.data import build_index, write_index

SPLITS = ("train", "val")
MARKER = "dataset.json"


class Progress:
    """One line on stderr that counts; a new line every few seconds where stderr is not a terminal."""

    def __init__(self, what: str) -> None:
        self._what, self._terminal = what, sys.stderr.isatty()
        self._pause_s = 0.2 if self._terminal else 5.0
        self._next_s = time.monotonic() + self._pause_s
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() < self._next_s and not (done == total and self._shown):
            return
        self._next_s, self._shown = time.monotonic() + self._pause_s, True
        end = "\n" if done == total or not self._terminal else "\r"
        print(f"{self._what}: {done:,} of {total:,}", file=sys.stderr, end=end, flush=True)


def claim(out: Path, name: str) -> None:
    """Make `out` the folder of data set `name`; refuse a folder that holds anything else. Raises DataError."""
    marker = out / MARKER
    if marker.exists():
        try:
            held = json.loads(marker.read_text())["name"]
        except (ValueError, KeyError, TypeError):
            held = "something unreadable"
        if held != name:
            raise DataError(f"{out}: already holds {held}; choose another --out")
        return
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise DataError(f"{out}: is not empty and was not made by this program; choose another --out")
    write_whole(marker, json.dumps({"name": name}).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears only when it is complete."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(content)
    temporary.replace(path)


def write_images(folder: Path, images: Iterable[tuple[str, bytes]], total: int) -> int:
    """Write (path below `folder`, encoded image) pairs; returns how many were not there before."""
    progress, new, made = Progress(f"{folder.name} images"), 0, set()
    for done, (name, content) in enumerate(images, start=1):
        path = folder / name
        if path.parent not in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.add(path.parent)
        if not path.exists():
            write_whole(path, content)
            new += 1
        progress(done, total)
    return new


def write_indexes(source: Path, out: Path) -> None:
    """Index `source`/train and `source`/val into `out`; prints what was found."""
    for split in SPLITS:
        if not (source / split).is_dir():
            raise DataError(
                f"{source / split}: no such folder; images are expected as {source}/{split}/<class>/<image>"
            )
    inside = out.resolve() == source.resolve()
    rows, classes = build_index(source / "train", progress=Progress("train index"))
    val_rows, _ = build_index(source / "val", classes, progress=Progress("val index"))
    for split, found in (("train", rows), ("val", val_rows)):
        path = out / f"{split}.index"
        digest = write_index(path, found, classes, root=split if inside else str((source / split).resolve()))
        total_mb = sum(row.length for row in found) / 1e6
        print(f"{path}: {len(found):,} images, {len(classes):,} classes, {total_mb:,.1f} MB, sha256 {digest[:12]}")


def complete(out: Path, images: dict[str, int]) -> bool:
    """Whether both indexes are there with these many images."""
    try:
        return all(read_index_header(out / f"{split}.index").images == images[split] for split in SPLITS)
    except DataError:
        return False


def as_data_error(error: OSError, where: Path) -> DataError:
    """The one line for a disk that is full, read-only or gone."""
    return DataError(f"{error.filename or where}: {error.strerror or os.strerror(error.errno or 0)}")
