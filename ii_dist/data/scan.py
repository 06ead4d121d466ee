"""Turns an image folder into index rows.

In: a folder `<class>/.../<image>` (classes sorted by name). Out: rows in a fixed order, with size, label and hash of
each file, read in parallel; the pixels are not decoded.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ii_dist.config.errors import DataError
from ii_dist.data.index import Row

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
_THREADS = min(32, 2 * (os.cpu_count() or 1))


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
    folder: Path, classes: Sequence[str] | None = None, progress: Callable[[int, int], None] | None = None
) -> tuple[list[Row], tuple[str, ...]]:
    """Rows of all images below `folder`, paths relative to it, and the classes.

    classes: those of the training split, so that labels agree; a folder of another name is then an error.
    progress: called with images done and images in all.
    """
    found = find_classes(folder)
    names = tuple(classes) if classes is not None else found
    if unknown := sorted(set(found) - set(names)):
        raise DataError(f"{folder / unknown[0]}: the training images have no class {unknown[0]!r}")
    files = [(path, names.index(name)) for name in found for path in _images_below(folder / name)]
    if not files:
        raise DataError(f"{folder}: no images in its {len(found)} class folders (looked for {_suffixes()})")
    if classes is None and (empty := sorted(set(range(len(names))) - {label for _, label in files})):
        raise DataError(f"{folder / names[empty[0]]}: a class without images (looked for {_suffixes()})")
    rows: list[Row] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for row in pool.map(lambda file: _describe(folder, *file), files):
                rows.append(row)
                if progress:
                    progress(len(rows), len(files))
        except DataError:
            pool.shutdown(cancel_futures=True)
            raise
    return rows, names


def _images_below(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield Path(parent, name)


def _describe(folder: Path, path: Path, label: int) -> Row:
    from PIL import Image

    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be indexed ({reason}); remove or replace this file") from None
    return Row(
        path=path.relative_to(folder).as_posix(),
        label=label,
        width=width,
        height=height,
        length=len(content),
        sha256=hashlib.sha256(content).digest(),
    )


def _suffixes() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))
