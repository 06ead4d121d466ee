"""Turns an image folder into index rows.

In: a folder `<class>/.../<image>` (classes sorted by name). Out: rows in a fixed order, with size, label and hash of
each file, read in parallel; the pixels are not decoded. `in_parallel` serves every program that goes through many
images.
"""

import collections
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ii_dist.config.errors import DataError
from ii_dist.data.facts import examine_file
from ii_dist.data.index import Row
from ii_dist.data.journal import Journal
from ii_dist.data.quarantine import Quarantine

Item = TypeVar("Item")
Result = TypeVar("Result")

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
THREADS = min(32, 2 * (os.cpu_count() or 1))
SMALL_ITEMS = 16


def in_parallel(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int = THREADS,
    chunk: int = SMALL_ITEMS,
    stop: threading.Event | None = None,
) -> Iterator[Result]:
    """`work(item)` of each item, in order, done in threads a few items ahead; what `work` raises ends it.

    chunk: items a thread takes at once; handing one over costs more than a small file.
    stop: set when no more results are wanted (an error, Ctrl-C), for work that takes long to look at.
    """
    remaining = iter(items)
    waiting: collections.deque[Future[list[Result]]] = collections.deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="in-parallel")
    try:
        while part := list(itertools.islice(remaining, chunk)):
            waiting.append(pool.submit(_each, work, part))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        if stop:
            stop.set()
        pool.shutdown(cancel_futures=True)


def _each(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [work(item) for item in items]


def find_classes(folder: Path) -> tuple[str, ...]:
    """Names of the class folders, sorted. Raises DataError where there are none."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot read the image folder ({error.strerror})") from None
    if not names:
        raise DataError(f"{folder}: no class folders; images are expected as {folder}/<class>/<image>")
    return tuple(names)


def build_index(
    folder: Path,
    classes: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    workers: int = THREADS,
    journal: Journal | None = None,
    quarantine: Quarantine | None = None,
) -> tuple[list[Row], tuple[str, ...]]:
    """Rows of all images below `folder`, paths relative to it, and the classes. Raises DataError.

    classes: those of the training split, so that labels agree; a folder of another name is then an error.
    progress: called with images done and images in all.
    journal: files that it knows are not read again, others are noted there.
    quarantine: files that are left out.
    """
    names, files = list_images(folder, classes)
    rows: list[Row] = []
    described = in_parallel(lambda file: _row(folder, file[0], file[1], journal, quarantine), files, workers)
    for done, row in enumerate(described, start=1):
        if row is not None:
            rows.append(row)
        if progress:
            progress(done, len(files))
    return rows, names


def list_images(folder: Path, classes: Sequence[str] | None = None) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """The classes, and of each image its path relative to `folder` and its label, in the order of the index."""
    found = find_classes(folder)
    names = tuple(classes) if classes is not None else found
    if unknown := sorted(set(found) - set(names)):
        raise DataError(f"{folder / unknown[0]}: the training images have no class {unknown[0]!r}")
    labels = {name: label for label, name in enumerate(names)}
    files = [(path, labels[name]) for name in found for path in _images_below(folder, name)]
    if not files:
        raise DataError(f"{folder}: no images in its {len(found)} class folders (looked for {_suffixes()})")
    if classes is None and (empty := sorted(set(labels.values()) - {label for _, label in files})):
        raise DataError(f"{folder / names[empty[0]]}: a class without images (looked for {_suffixes()})")
    return names, files


def _images_below(folder: Path, name: str) -> Iterator[str]:
    """Paths of the images of class `name`, relative to `folder`, in a fixed order."""
    for parent, folders, names in os.walk(folder / name):
        folders.sort()
        inner = os.path.relpath(parent, folder)
        for file in sorted(names):
            if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES and not file.startswith("."):  # noqa: PTH122
                yield f"{inner}/{file}"


def _row(folder: Path, path: str, label: int, journal: Journal | None, quarantine: Quarantine | None) -> Row | None:
    """None for a file in quarantine."""
    if not path.isprintable():  # also a name that is not UTF-8
        raise DataError(f"{str(folder / path)!r}: cannot be indexed (its name is not printable text); rename this file")
    if quarantine and quarantine.holds(path, None):
        return None
    stat = _stat(folder / path) if journal else None
    facts = journal.find(path, stat) if journal and stat else None
    known = facts is not None
    if facts is None:
        facts = examine_file(folder / path)
    if quarantine and quarantine.holds(path, facts.sha256.hex()):
        return None
    if facts.problem:
        raise DataError(
            f"{folder / path}: cannot be indexed ({facts.problem}); all bad files are listed by: "
            "python -m tools.scan_dataset"
        )
    if journal and stat and not known:
        journal.add(path, stat, facts)
    return Row(path, label, facts.width, facts.height, facts.length, facts.sha256)


def _stat(path: Path) -> os.stat_result | None:
    """None where there is nothing to see; reading the file then says why."""
    try:
        return path.stat()
    except OSError:
        return None


def _suffixes() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))
