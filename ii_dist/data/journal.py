"""Remembers which files were already hashed, so that a program that was killed goes on where it stopped.

In: the path of a journal, a text file with one line a file, only ever appended to. Out: the facts of a file that has
not changed since. A line counts only with its end: what a kill cut off is left out, and that file is read again.

    sha256 length ctime_ns width height format mode path
"""

import os
import re
from pathlib import Path

from ii_dist.data.facts import FileFacts

_LINE = re.compile(rb"([0-9a-f]{64} \d+ \d+ \d+ \d+ \S+ \S+) (.+)")


class Journal:
    """Facts by path. `add` may be called from several threads."""

    def __init__(self, path: str | Path) -> None:
        """Read what is there, open for more. Raises OSError."""
        self._known: dict[bytes, bytes] = {}
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with os.fdopen(os.dup(self._file), "rb") as lines:
            torn = False
            for line in lines:
                torn = not line.endswith(b"\n")
                if not torn and (match := _LINE.fullmatch(line[:-1])):
                    self._known[match[2]] = match[1]
        if torn:
            os.write(self._file, b"\n")

    def find(self, name: str, stat: os.stat_result) -> FileFacts | None:
        """What is known of the file, if its length and time of last change are still the same."""
        line = self._known.get(os.fsencode(name))
        if line is None:
            return None
        sha256, length, ctime_ns, width, height, kind, mode = line.split(b" ")
        # Not the modification time: a copy that replaces the file may carry the old one.
        if (int(length), int(ctime_ns)) != (stat.st_size, stat.st_ctime_ns):
            return None
        digest = bytes.fromhex(sha256.decode())
        return FileFacts(int(length), digest, kind.decode(), mode.decode(), int(width), int(height))

    def add(self, name: str, stat: os.stat_result, facts: FileFacts) -> None:
        """Note one file. Raises OSError."""
        path = os.fsencode(name)
        if facts.problem or b"\n" in path:
            return
        numbers = f"{facts.length} {stat.st_ctime_ns} {facts.width} {facts.height}"
        line = f"{facts.sha256.hex()} {numbers} {facts.format or '?'} {facts.mode or '?'}".encode()
        os.write(self._file, line + b" " + path + b"\n")

    def close(self) -> None:
        os.close(self._file)
