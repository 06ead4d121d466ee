"""What ranks print, line by line, into one log a rank: each line with its time and its rank.

In: a pipe from each rank. Out: lines `2026-11-23T10:11:12.345Z 3| text`, which sort by time over all logs of a run.
One thread for all ranks of a node: a rank never waits for its log for longer than a line takes.
"""

import contextlib
import os
import re
import selectors
import threading
from datetime import UTC, datetime
from pathlib import Path

_STAMP = re.compile(rb"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z \d+\| ", re.MULTILINE)
_CHUNK_BYTES = 1 << 16
_LONGEST_LINE_BYTES = 1 << 16


def without_stamps(text: bytes) -> bytes:
    """Lines of a rank's log as the rank printed them."""
    return _STAMP.sub(b"", text)


class OutputPump:
    """Carries what ranks print into their logs until they have closed their pipes."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)

    def add(self, rank: int, log: Path) -> int:
        """A pipe for `rank`; returns its writing end, which the caller hands to the rank and closes."""
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._selector.register(read_end, selectors.EVENT_READ, _Lines(rank, file))
        return write_end

    def start(self) -> None:
        self._thread.start()

    def close(self, limit_s: float = 2.0) -> None:
        """Wait for the last words; a process that left its group may keep a pipe open for ever."""
        self._thread.join(limit_s)

    def _run(self) -> None:
        while self._selector.get_map():
            for key, _ in self._selector.select():
                lines: _Lines = key.data
                try:
                    new = os.read(key.fd, _CHUNK_BYTES)
                except BlockingIOError:
                    continue
                if new:
                    lines.take(new)
                    continue
                lines.close()
                self._selector.unregister(key.fd)
                os.close(key.fd)


class _Lines:
    """One rank's log, written in whole lines."""

    def __init__(self, rank: int, file: int) -> None:
        self._rank = rank
        self._file = file
        self._rest = b""

    def take(self, new: bytes) -> None:
        *whole, self._rest = (self._rest + new).split(b"\n")
        if len(self._rest) > _LONGEST_LINE_BYTES:
            whole.append(self._rest)
            self._rest = b""
        if whole:
            stamp = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}"[:-3].encode() + b"Z %d| " % self._rank
            # A full disk must not stop the rank: what does not fit is dropped.
            with contextlib.suppress(OSError):
                os.write(self._file, b"".join(stamp + line + b"\n" for line in whole))

    def close(self) -> None:
        if self._rest:
            self.take(b"\n")
        os.close(self._file)
