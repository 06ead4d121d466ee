"""Goes through all images of a split in threads; goes on where a scan that was killed had stopped.

In: a `Split`. Out: the `Facts` of each of its images, in order. A journal beside the list of bad files holds one line a
file; a file that has changed since is looked at again.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ii_dist.config.errors import DataError
from ii_dist.data import in_parallel
from tools._scan_file import Facts, look_at, unreadable
from tools._scan_splits import Split

Scanned = tuple[str, str, Facts]  # path, class, facts


class ScanJournal:
    """What is known of files from before; `add` may be called from several threads."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self.path = path
        self._known: dict[tuple[str, str], list[Any]] = {}
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with os.fdopen(os.dup(self._file), "rb") as lines:
            for line in lines:
                try:
                    split, name, *rest = json.loads(line)
                except ValueError:  # torn by the kill
                    os.write(self._file, b"\n" * (not line.endswith(b"\n")))
                    continue
                self._known[split, name] = rest

    def find(self, split: str, name: str, version: list[int]) -> Facts | None:
        found = self._known.get((split, name))
        return Facts(*found[1:]) if found is not None and found[0] == version else None

    def add(self, split: str, name: str, version: list[int], facts: Facts) -> None:
        row = [split, name, version, facts.sha256, facts.length, facts.width, facts.height, facts.kinds]
        os.write(self._file, json.dumps(row).encode() + b"\n")

    def close(self, done: bool) -> None:
        """done: all was scanned and reported; the next scan starts anew."""
        os.close(self._file)
        if done:
            self.path.unlink(missing_ok=True)


def scan(split: Split, journal: ScanJournal, workers: int) -> Iterator[Scanned]:
    """Every image, in the split's order."""

    def look(image: tuple[str, str]) -> Scanned:
        path, label = image
        return path, label, _facts(split, path, journal)

    return in_parallel(look, split.images, workers)


def _facts(split: Split, path: str, journal: ScanJournal) -> Facts:
    try:
        version = split.version(path)
        facts = journal.find(split.name, path, version)
        if facts is None:
            facts = look_at(split.read(path), Path(path).suffix.lower())
            journal.add(split.name, path, version, facts)
    except OSError as error:
        return unreadable(error.strerror or str(error))
    except DataError as error:
        return Facts(kinds={"changed": str(error)})
    _compare(split, path, facts)
    return facts


def _compare(split: Split, path: str, facts: Facts) -> None:
    """With the index, if there is one."""
    if split.index is None:
        return
    row = split.rows.get(path)
    if row is None:
        facts.kinds["not indexed"] = ""
    elif facts.sha256 != split.index.sha256[row].tobytes().hex():
        facts.kinds["changed"] = f"{facts.length:,} bytes, the index says {int(split.index.length[row]):,}"
