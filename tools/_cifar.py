"""CIFAR-10 and CIFAR-100 from their binary archives; the Python archives hold pickles and are not read.

In: `cifar-10-binary.tar.gz` or `cifar-100-binary.tar.gz`: files of records, each one or two bytes of labels and 32 x 32
pixels as a red, a green and a blue plane, and the names of the classes. Out: PNG files with the pixels as they are.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ii_dist.config.errors import DataError
from tools._archive import Official, check_official, read_gzipped
from tools._datasets import claim, write_images
from tools._small_sets import encode_png

_SIDE, _PLANES = 32, 3


@dataclass(frozen=True, slots=True)
class Layout:
    """How one of the two archives is laid out. `label_at`: of a record's `label_bytes` bytes the one that counts."""

    archive: Official
    files: dict[str, tuple[str, ...]]
    names: str
    classes: int
    label_bytes: int
    label_at: int
    images: dict[str, int]


CIFAR = {
    "cifar10": Layout(
        Official("cifar-10-binary.tar.gz", 170_052_171, "c32a1d4ab5d03f1284b67883e8d87530"),
        {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "val": ("test_batch.bin",)},
        names="batches.meta.txt",
        classes=10,
        label_bytes=1,
        label_at=0,
        images={"train": 50_000, "val": 10_000},
    ),
    "cifar100": Layout(
        Official("cifar-100-binary.tar.gz", 168_513_733, "03b5dce01913d631647c71ecec9e9cb8"),
        {"train": ("train.bin",), "val": ("test.bin",)},
        names="fine_label_names.txt",
        classes=100,
        label_bytes=2,  # of 20 coarse classes, of 100 fine ones
        label_at=1,
        images={"train": 50_000, "val": 10_000},
    ),
}


def import_cifar(name: str, source: Path, out: Path, workers: int, allow_other: bool) -> None:
    """All of it. Raises DataError, OSError."""
    layout = CIFAR[name]
    archive = source / layout.archive.name if source.is_dir() else source
    if not archive.is_file():
        raise DataError(f"{archive}: no such file; {name} is read from {layout.archive.name} (the binary version)")
    with claim(out, name, [archive.name, archive.stat().st_size], workers) as target:
        if target.complete():
            print(f"{out}: {name} is complete ({sum(target.noted('images').values()):,} images); nothing to do")
            return
        official = check_official(archive, layout.archive, target, allow_other)
        parts = _read_parts(archive, layout)
        folders = _class_folders(archive, parts[layout.names], layout.classes)
        records = {split: _records(archive, parts, layout, split) for split in layout.files}
        images = {split: len(found) for split, found in records.items()}
        if official and images != layout.images:
            raise DataError(f"{archive}: has {images} images, the official archive {layout.images}")
        for split, found in records.items():
            write_images(target, split, _images(found, layout, folders), len(found))
        target.finish(images)


def _read_parts(archive: Path, layout: Layout) -> dict[str, bytes]:
    """Content of the files that count, by their names without folders; all members are checked."""
    wanted = {layout.names, *(name for files in layout.files.values() for name in files)}
    parts: dict[str, bytes] = {}
    for_python = False
    for name, content in read_gzipped(archive):
        file_name = name.rsplit("/", 1)[-1]
        for_python |= file_name in ("batches.meta", "meta")
        if file_name in wanted:
            parts[file_name] = content
    if missing := sorted(wanted - set(parts)):
        why = "the Python version, which can run code and is never loaded" if for_python else "another archive"
        raise DataError(f"{archive}: has no {missing[0]}; this is {why}; get {layout.archive.name}")
    return parts


def _class_folders(archive: Path, text: bytes, classes: int) -> list[str]:
    """`0_airplane` ...: the number in front keeps the official order of the classes."""
    names = text.decode("ascii", "replace").split()
    if len(names) != classes:
        raise DataError(f"{archive}: names {len(names)} classes, not {classes}")
    if wrong := [name for name in names if not re.fullmatch(r"[\w-]{1,64}", name, re.ASCII)]:
        raise DataError(f"{archive}: {wrong[0]!r} is not the name of a class")
    return [f"{label:0{len(str(classes - 1))}}_{name}" for label, name in enumerate(names)]


def _records(archive: Path, parts: dict[str, bytes], layout: Layout, split: str) -> NDArray[np.uint8]:
    """Records of a split, one a row."""
    length = layout.label_bytes + _PLANES * _SIDE * _SIDE
    found = []
    for name in layout.files[split]:
        if not parts[name] or len(parts[name]) % length:
            raise DataError(
                f"{archive}: {name} has {len(parts[name]):,} bytes, not whole records of {length}; cut off?"
            )
        found.append(np.frombuffer(parts[name], np.uint8).reshape(-1, length))
    records = np.concatenate(found)
    labels = records[:, layout.label_at]
    if int(labels.max()) >= layout.classes:
        row = int(np.flatnonzero(labels >= layout.classes)[0])
        raise DataError(f"{archive}: {split} image {row} has label {labels[row]}, not one of {layout.classes} classes")
    return records


def _images(
    records: NDArray[np.uint8], layout: Layout, folders: list[str]
) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for number, record in enumerate(records):
        pixels = record[layout.label_bytes :].reshape(_PLANES, _SIDE, _SIDE).transpose(1, 2, 0)
        name = f"{folders[record[layout.label_at]]}/{number:05d}.png"
        yield name, partial(encode_png, pixels)
