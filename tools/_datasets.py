"""What the importers share: a target folder that knows what it holds, whole files, both indexes.

In: images by split and class. Out: `<out>/train/<class>/...`, `<out>/val/<class>/...`, `<out>/train.index`,
`<out>/val.index`. A file has its name only when it is whole, so an import that was killed goes on where it stopped;
`<out>/.train.journal` and `.val.journal` remember the hashes of the files written: the index need not read them again.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ii_dist.config.errors import DataError
from ii_dist.config.index_header import read_index_header
from ii_dist.data import Journal, build_index, examine_bytes, in_parallel, write_index
from ii_dist.data.quarantine import BadFile, Quarantine
from ii_dist.data.scan import THREADS
from tools._progress import Progress

SPLITS = ("train", "val")
MARKER = "dataset.json"


class Target:
    """The folder that an import fills. Its `dataset.json` says what it is, of what, and what was found to be right."""

    def __init__(self, out: Path, facts: dict[str, Any], workers: int = THREADS) -> None:
        self.out, self.workers, self._facts = out, workers, facts

    def complete(self) -> bool:
        """Whether both indexes are there, with the images that the import counted at its end."""
        images = self._facts.get("images", {})
        try:
            return all(read_index_header(self.out / f"{split}.index").images == images[split] for split in SPLITS)
        except (DataError, KeyError, TypeError):
            return False

    def noted(self, key: str) -> Any:
        return self._facts.get(key)

    def note(self, key: str, value: object) -> None:
        """Keep a fact for the next start. Raises OSError."""
        self._facts[key] = value
        write_whole(self.out / MARKER, json.dumps(self._facts).encode())

    @contextlib.contextmanager
    def filling(self, split: str) -> Iterator["Filling"]:
        with contextlib.closing(Journal(self.out / f".{split}.journal")) as journal:
            yield Filling(self.out / split, journal)

    def finish(self, images: Mapping[str, int]) -> None:
        """Index what was filled, `images` a split, and note that all is there. Raises DataError where it is not."""
        os.sync()  # an index on disk says that its images are there too, also after a power cut
        found = write_indexes(self.out, self.out, self.workers, images)
        self.note("images", found)


class Filling:
    """One split in the making. `put` may be called from several threads."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self.folder, self._journal = folder, journal
        self._made: set[Path] = set()

    def has(self, name: str, length: int | None = None) -> bool:
        """Whether the file is there, whole. length: where it is known beforehand."""
        try:
            found = (self.folder / name).lstat().st_size
        except FileNotFoundError:
            return False
        return found == length if length is not None else found > 0

    def put(self, name: str, content: bytes) -> None:
        """Write one image, whole, and remember its hash. Raises OSError."""
        path = self.folder / name
        if path.parent not in self._made:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._made.add(path.parent)
        write_whole(path, content)
        self._journal.add(name, path.stat(), examine_bytes(content))


@contextlib.contextmanager
def claim(out: Path, name: str, source: object = None, workers: int = THREADS) -> Iterator[Target]:
    """Make `out` the folder of data set `name`, for this process alone; refuse one that holds anything else.

    source: what the images come from, as JSON; a folder begun from another source is refused. Raises DataError.
    """
    marker = out / MARKER
    asked: dict[str, Any] = {"name": name, "source": source}
    if marker.exists():
        try:
            facts = dict(json.loads(marker.read_text()))
            held = {"name": facts["name"], "source": facts.get("source")}
        except (ValueError, KeyError, TypeError):
            facts, held = {}, {"name": "something unreadable"}
        if held.get("name") != name:
            raise DataError(f"{out}: already holds {held['name']}; choose another --out")
        if held != json.loads(json.dumps(asked)):
            raise DataError(f"{out}: was begun from another source ({held['source']}); choose another --out")
    else:
        facts = asked
        out.mkdir(parents=True, exist_ok=True)
        if any(path.name != ".lock" for path in out.iterdir()):
            raise DataError(f"{out}: is not empty and was not made by this program; choose another --out")
    with _alone(out):
        if not marker.exists():
            write_whole(marker, json.dumps(facts).encode())
        yield Target(out, facts, workers)


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Two imports into one folder would write the same files. The lock goes with the process, however it ends."""
    with (out / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{out}: another import is filling this folder; wait for it or stop it") from None
        yield


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears only when it is complete. Raises OSError."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_images(target: Target, split: str, images: Iterable[tuple[str, Callable[[], bytes]]], total: int) -> None:
    """Write the images (path below the split's folder, what encodes it) that are not there yet."""
    progress = Progress(f"{split} images")
    with target.filling(split) as filling:

        def put(image: tuple[str, Callable[[], bytes]]) -> None:
            name, encode = image
            if not filling.has(name):
                filling.put(name, encode())

        for done, _ in enumerate(in_parallel(put, images, target.workers), start=1):
            progress(done, total)


def write_indexes(
    source: Path,
    out: Path,
    workers: int = THREADS,
    expected: Mapping[str, int] | None = None,
    bad_files: Sequence[BadFile] = (),
) -> dict[str, int]:
    """Index `source`/train and `source`/val into `out`; prints what was found and returns the number of images.

    Files that the journals in `out` know are not read again. expected: images that each split must have. bad_files are
    left out.
    """
    for split in SPLITS:
        if not (source / split).is_dir():
            raise DataError(
                f"{source / split}: no such folder; images are expected as {source}/{split}/<class>/<image>"
            )
    inside = out.resolve() == source.resolve()
    classes: tuple[str, ...] | None = None
    found = {}
    for split in SPLITS:
        with contextlib.closing(Journal(out / f".{split}.journal")) as journal:
            rows, classes = build_index(
                *(source / split, classes, Progress(f"{split} index"), workers),
                journal=journal,
                quarantine=Quarantine(split, bad_files),
            )
        found[split] = rows
        if expected and len(rows) != expected[split]:
            raise DataError(
                f"{out / split}: holds {len(rows):,} images, the source has {expected[split]:,}; "
                "remove the folder and import again"
            )
    assert classes is not None
    for split, rows in found.items():
        path = out / f"{split}.index"
        digest = write_index(path, rows, classes, root=split if inside else str((source / split).resolve()))
        total_mb = sum(row.length for row in rows) / 1e6
        print(f"{path}: {len(rows):,} images, {len(classes):,} classes, {total_mb:,.1f} MB, sha256 {digest[:12]}")
    return {split: len(rows) for split, rows in found.items()}


def as_data_error(error: OSError, where: Path) -> DataError:
    """The one line for a disk that is full, read-only or gone."""
    return DataError(f"{error.filename or where}: {error.strerror or os.strerror(error.errno or 0)}")
