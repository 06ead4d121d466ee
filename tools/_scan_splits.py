"""What there is to scan: the images of a split, from its folder or, where it has none, from its index.

In: a data set's folder. Out: `Split`s: names and classes of their images, a way to read each, what is wrong with the
split as a whole.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ii_dist.config.errors import DataError
from ii_dist.data import Index
from ii_dist.data.scan import IMAGE_SUFFIXES
from tools._scan_kinds import Finding

SPLITS = ("train", "val")


@dataclass(slots=True)
class Split:
    """images: (path below the folder, class). rows: path -> row of the index, where there is one."""

    name: str
    folder: Path
    classes: tuple[str, ...]
    images: list[tuple[str, str]] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    index: Index | None = None
    by_index: bool = False
    """Images are read through the index: there is no folder beside it."""
    findings: list[Finding] = field(default_factory=list)

    def read(self, path: str) -> bytes:
        """Raises OSError, and DataError where an index does not find what it says."""
        if self.by_index:
            assert self.index is not None
            return self.index.read_bytes(self.rows[path]).tobytes()
        return (self.folder / path).read_bytes()

    def version(self, path: str) -> list[int]:
        """Changes when the file does: bytes and time of the last change. Raises OSError."""
        place = self.folder / path
        if self.by_index:
            assert self.index is not None
            place = Path(self.index.place(self.rows[path])[0])
        stat = place.stat()
        return [stat.st_size, stat.st_ctime_ns]


def find_splits(root: Path) -> list[Split]:
    """Those of train and val that are there. Raises DataError where there is none."""
    splits = [split for name in SPLITS if (split := _find(root, name)) is not None]
    if not splits:
        raise DataError(f"{root}: neither folders nor indexes called {' or '.join(SPLITS)}")
    train = splits[0]
    for split in splits[1:]:
        for name in sorted(set(split.classes) - set(train.classes)) if train.name == "train" else ():
            split.findings.append(Finding("unknown class", split.name, name))
    for split in splits:
        if split.by_index and split.name != "train":
            continue  # its classes are those of the training images; one may have no image to evaluate
        filled = {label for _, label in split.images}
        split.findings += [Finding("empty class", split.name, name) for name in split.classes if name not in filled]
    return splits


def _find(root: Path, name: str) -> Split | None:
    folder, path = root / name, root / f"{name}.index"
    findings: list[Finding] = []
    index = None
    if path.is_file():
        try:
            index = Index.open(path)
        except DataError as error:
            findings.append(Finding("bad index", name, path.name, str(error).removeprefix(f"{path}: ")))
    if not folder.is_dir():
        return _of_index(name, index) if index is not None else _without_images(name, folder, findings)
    split = Split(name, folder, (), index=index, findings=findings)
    _walk(split)
    if index is not None:
        split.rows = {index.name(row): row for row in range(len(index))}
        there = {path for path, _ in split.images}
        split.findings += [Finding("missing", name, path) for path in split.rows if path not in there]
    return split


def _without_images(name: str, folder: Path, findings: list[Finding]) -> Split | None:
    return Split(name, folder, (), findings=findings) if findings else None


def _of_index(name: str, index: Index) -> Split:
    rows = {index.name(row): row for row in range(len(index))}
    images = [(path, index.classes[int(index.label[row])]) for path, row in rows.items()]
    return Split(name, index.folder, index.classes, images, rows, index, by_index=True)


def _walk(split: Split) -> None:
    try:
        with os.scandir(split.folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{split.folder}: cannot read the image folder ({error.strerror})") from None
    split.classes = tuple(names)
    for label in names:
        for path in _files_below(split.folder / label):
            relative = path.relative_to(split.folder).as_posix()
            if path.suffix.lower() in IMAGE_SUFFIXES:
                split.images.append((relative, label))
            else:
                split.findings.append(Finding("other name", split.name, relative))


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))
