"""The list of bad files: ``quarantine.jsonl``, one JSON object a line.

In: entries, from a run or from `tools.scan_dataset`. Out: the file, which the index obeys. Keys of a line:

    split    "train" or "val"
    path     as the index names it: relative to the split's folder, '/' between parts
    sha256   hex, of the bytes that are bad; null where they could not be read
    reason   for a person
    row, epoch    where a run met it; absent from a scan's list

An entry stands for a path with these very bytes: a file that was replaced by a good copy is in the data set again.
Without a hash it stands for the path. Lines are appended whole, under a lock where the file system has one, each file
once.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ii_dist.config.errors import DataError

QUARANTINE = "quarantine.jsonl"
_START = b'{"split": "'


@dataclass(frozen=True, slots=True)
class BadFile:
    """One line of the list."""

    split: str
    path: str
    sha256: str | None
    reason: str
    row: int | None = None
    epoch: int | None = None

    @property
    def identity(self) -> tuple[str, str, str | None]:
        return self.split, self.path, self.sha256


class Quarantine:
    """The bad files of one split, to be left out of its index."""

    def __init__(self, split: str, entries: Iterable[BadFile]) -> None:
        self._hashes: dict[str, set[str | None]] = {}
        for entry in entries:
            if entry.split == split:
                self._hashes.setdefault(entry.path, set()).add(entry.sha256)

    def __len__(self) -> int:
        return len(self._hashes)

    def holds(self, path: str, sha256: str | None) -> bool:
        """Whether the file `path` with content `sha256` (hex) is to be left out; None: whatever its content."""
        hashes = self._hashes.get(path)
        return hashes is not None and (None in hashes or sha256 in hashes)


def read_quarantine(path: Path) -> list[BadFile]:
    """All entries. Torn lines are left out. Raises DataError for a file that is missing or no such list."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot read the list of bad files ({error.strerror})") from None
    return list(_entries(path, lines))


def append_quarantine(path: Path, entries: Sequence[BadFile]) -> int:
    """Add those entries that the file does not hold yet; how many they were. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks: an entry may then come twice
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with os.fdopen(os.dup(descriptor), "rb") as file:
            file.seek(0)
            held = file.read()
        known = {entry.identity for entry in _entries(path, held.split(b"\n"))}
        new = {entry.identity: entry for entry in entries if entry.identity not in known}
        text = "".join(f"{json.dumps(_as_json(entry))}\n" for entry in new.values()).encode()
        if text and held and not held.endswith(b"\n"):  # a kill or a full disk left half a line: end it
            text = b"\n" + text
        while text:
            text = text[os.write(descriptor, text) :]
    finally:
        os.close(descriptor)
    return len(new)


def _as_json(entry: BadFile) -> dict[str, Any]:
    return {name: value for name, value in asdict(entry).items() if value is not None or name == "sha256"}


def _entries(path: Path, lines: Sequence[bytes]) -> Iterator[BadFile]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not all(isinstance(row[name], str) for name in ("split", "path", "reason")):
                raise TypeError
            yield BadFile(**{name: row.get(name) for name in BadFile.__slots__})
        except (ValueError, KeyError, TypeError):
            if not line.startswith(_START[: len(line)]):  # else a kill or a full disk tore it
                raise DataError(
                    f"{path}: line {number} is no entry of a list of bad files; take it out or make the list again "
                    "with: python -m tools.scan_dataset"
                ) from None
