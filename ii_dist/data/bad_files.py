"""What a source met that it could not read: counted, and named once.

In: word from the threads that make batches, and from the loop that a batch was handed out. Out: `Counts` for the log,
entries for ``quarantine.jsonl``. A batch that was made ahead and thrown away by a seek counts nothing, so that a
resumed run counts what the uninterrupted one does.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ii_dist.data.quarantine import BadFile
from ii_dist.data.substitute import Picks, Refused

if TYPE_CHECKING:
    from ii_dist.data.index import Index

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Counts:
    """What came up since the last look.

    replaced: epoch -> images that another one stood for (training) or that did not count (evaluation).
    retries: further tries of reads. new: files not named before by this source.
    """

    replaced: Counter[int] = field(default_factory=Counter)
    retries: int = 0
    new: list[BadFile] = field(default_factory=list)


class BadFiles:
    """The record of one source. Threads may write to it at any time; a good batch costs it nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[int, tuple[Picks, Index]] = {}
        self._named: set[tuple[int, str | None]] = set()
        self._counts = Counts()

    def note(self, number: int, picks: Picks, index: Index) -> None:
        """Batch `number` was made of `picks`. Called by a producer, before it gives the batch away."""
        if picks.refused:
            self._made[number] = (picks, index)

    def note_retry(self) -> None:
        with self._lock:
            self._counts.retries += 1

    def handed_out(self, number: int) -> None:
        """Count and name what batch `number` came to."""
        if not self._made or (found := self._made.pop(number, None)) is None:
            return
        picks, index = found
        with self._lock:
            self._counts.replaced[picks.rows.epoch] += picks.replaced
        for each in picks.refused:
            self._name(each, index, "does not count" if picks.blank else "another image takes its place")

    def forget(self) -> None:
        """The batches that were made but not handed out never will be."""
        self._made.clear()

    def take(self) -> Counts:
        """The counts since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Counts()
        return counts

    def _name(self, refused: Refused, index: Index, fate: str) -> None:
        """Once for each file of a process, however often it is met."""
        if (refused.row, refused.sha256) in self._named:
            return
        self._named.add((refused.row, refused.sha256))
        split, path = index.path.stem, index.name(refused.row)
        _log.warning("%s: %s; %s", index.told(refused.row), refused.reason, fate)
        entry = BadFile(split, path, refused.sha256, refused.reason, refused.row, refused.epoch)
        with self._lock:
            self._counts.new.append(entry)
