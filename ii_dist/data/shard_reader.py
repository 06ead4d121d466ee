"""Reads images from shards by offset; knows which shards have a copy on the node's own disk.

In: the shards that an index names, and a folder where copies of them may appear while the run goes on. Out: bytes, read
straight into the caller's buffer. Shards stay open, the least used is closed when there are too many; threads share
one reader.
"""

import logging
import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from ii_dist.config.errors import DataError

_log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
"""Pause between two looks for new copies; one look lists one folder, whatever the number of images read."""
_FEWEST_OPEN, _MOST_OPEN = 8, 1024
PACK_AGAIN = "bring it back, or pack the data set again with: python -m tools.pack_dataset"


class _OpenShard:
    """A descriptor that closes when the last thread that reads from it lets go, so never under a read."""

    def __init__(self, path: str, is_copy: bool) -> None:
        self.is_copy = is_copy
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # Images lie anywhere: what the system would read ahead of one is thrown away.
        os.posix_fadvise(self.number, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class ShardReader:
    """The shards of one index. `expected_bytes`: size of each; none = taken as they are when they are first opened."""

    def __init__(self, folder: str, names: Sequence[str], expected_bytes: Sequence[int], most_open: int = 0) -> None:
        self._folder, self.names = folder, tuple(names)
        self._bytes = list(expected_bytes) or [0] * len(self.names)
        self._most_open = most_open or _share_of_descriptors()
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._copies: Path | None = None
        self._copied: set[int] = set()
        self._distrusted: set[int] = set()
        self._next_look_s = float("inf")

    def path(self, shard: int) -> str:
        """The shard itself, not its copy."""
        return f"{self._folder}/{self.names[shard]}"

    def check(self, shard: int) -> int:
        """Size of the shard in bytes. Raises DataError where it is gone or not as the index says."""
        try:
            found = os.stat(self.path(shard)).st_size  # noqa: PTH116 - a Path for each of many shards costs more
        except OSError as error:
            raise DataError(f"{self.path(shard)}: cannot be read ({error.strerror}); {PACK_AGAIN}") from None
        return self._same_size(shard, found)

    def read(self, shard: int, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset` on; returns the bytes found there.

        Raises OSError as the system does, after which the next call opens the shard anew; DataError where the shard
        has another size than the index says.
        """
        if time.monotonic() >= self._next_look_s:
            self._look()
        file: _OpenShard | None = None
        try:
            file = self._opened(shard)
            found = os.preadv(file.number, [buffer], offset)
            if found == buffer.nbytes or not file.is_copy:
                return found
            self._distrust(shard, "was cut off")
        except OSError as error:
            self._forget(shard)
            if not (file.is_copy if file else shard in self._copied):
                raise
            self._distrust(shard, error.strerror)
        return self.read(shard, offset, buffer)

    def use_copies(self, folder: Path) -> None:
        """From now on read from whole copies in `folder`, as they appear there."""
        for shard in (i for i, known in enumerate(self._bytes) if not known):
            self.check(shard)
        self._copies = folder
        self._look()

    def expected_bytes(self, shard: int) -> int:
        """Size that the shard and its copy must have; 0 = not known yet."""
        return self._bytes[shard]

    def missing_copies(self) -> list[int]:
        """Shards without a whole copy so far."""
        self._look()
        return [shard for shard in range(len(self.names)) if shard not in self._copied]

    def _opened(self, shard: int) -> _OpenShard:
        with self._lock:
            if file := self._open.get(shard):
                self._open.move_to_end(shard)
                return file
            copied = shard in self._copied
        path = f"{self._copies}/{self.names[shard]}" if copied else self.path(shard)
        file = _OpenShard(path, copied)
        found = os.fstat(file.number).st_size
        if not copied:
            self._same_size(shard, found)
        elif found != self._bytes[shard]:
            self._distrust(shard, f"has {found:,} bytes, not {self._bytes[shard]:,}")
            return self._opened(shard)
        with self._lock:
            if copied != (shard in self._copied):
                return file  # this once: a copy came, or went, meanwhile
            self._open[shard] = file
            if len(self._open) > self._most_open:
                self._open.popitem(last=False)
        return file

    def _same_size(self, shard: int, found: int) -> int:
        expected = self._bytes[shard]
        if expected and found != expected:
            raise DataError(f"{self.path(shard)}: has {found:,} bytes, not the {expected:,} indexed; {PACK_AGAIN}")
        self._bytes[shard] = found
        return found

    def _look(self) -> None:
        """List the folder of copies once and leave the originals of those that are new there."""
        if self._copies is None:
            return
        with self._lock:
            self._next_look_s = time.monotonic() + LOOK_EVERY_S
        try:
            with os.scandir(self._copies) as entries:
                there = {entry.name: entry.stat().st_size for entry in entries if not entry.name.startswith(".")}
        except OSError:
            return  # not made yet, or gone: the originals are there
        with self._lock:
            for shard, name in enumerate(self.names):
                new = shard not in self._copied and shard not in self._distrusted
                if new and name in there and there[name] == self._bytes[shard]:
                    self._copied.add(shard)
                    self._open.pop(shard, None)
            if len(self._copied) + len(self._distrusted) == len(self.names):
                self._next_look_s = float("inf")

    def _forget(self, shard: int) -> None:
        with self._lock:
            self._open.pop(shard, None)

    def _distrust(self, shard: int, reason: str | None) -> None:
        """Never read this copy again."""
        with self._lock:
            first = not self._distrusted
            self._copied.discard(shard)
            self._open.pop(shard, None)
            self._distrusted.add(shard)
        log = _log.warning if first else _log.debug
        log("%s/%s: the copy cannot be used (%s); reading the original", self._copies, self.names[shard], reason)


def _share_of_descriptors() -> int:
    """A quarter of what this process may open: two splits, sockets and logs need theirs."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return _MOST_OPEN
    return max(_FEWEST_OPEN, min(_MOST_OPEN, allowed // 4))
