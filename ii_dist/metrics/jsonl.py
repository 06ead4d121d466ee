"""One file of JSON lines a rank: written line by line, cut back to the resumed step, readable after any kill.

In: a path, steps and values. Out, one line each:

    {"step": 0, "time": 1700000000.0, "event": "start", "rank": 0, "world_size": 2, "host": "node1"}
    {"step": 50, "time": 1700000031.5, "train/loss": 2.1, "time/step_s": 0.21, ...}

A start line opens every attempt; its step is the one that the attempt goes on from. `time` is Unix time in seconds.
A value that is not finite is null. Numbers have all their digits: they read back to the same bits.
"""

import json
import math
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ii_dist.config.errors import CheckpointError
from ii_dist.metrics.tags import check_tags


class JsonlBoard:
    """Appends to one rank's file. Each line is one write to the operating system: a kill leaves whole lines behind."""

    def __init__(self, path: Path, *, rank: int, world_size: int, resumed_step: int) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            cut_to_step(path, resumed_step)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{path}: metrics cannot be written ({error.strerror}); free or change it") from None
        self._torn = False
        start = {"event": "start", "rank": rank, "world_size": world_size, "host": socket.gethostname()}
        self._append(resumed_step, start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        check_tags(values)
        self._append(step, {tag: value if math.isfinite(value) else None for tag, value in values.items()})

    def text(self, tag: str, markdown: str) -> None:
        """Nothing: the run folder holds the config and the plan as files."""

    def pictures(self, step: int, pngs: Mapping[str, bytes]) -> None:
        """Nothing."""

    def close(self) -> None:
        self._file.close()

    def _append(self, step: int, values: Mapping[str, Any]) -> None:
        line = json.dumps({"step": step, "time": round(time.time(), 3), **values}).encode() + b"\n"
        if self._torn:  # a full disk took only part of the last line: end that one first
            line = b"\n" + line
        self._torn = True
        written = self._file.write(line)
        self._torn = written != len(line)
        if self._torn:
            raise OSError(f"{written} of {len(line)} bytes written")


def cut_to_step(path: Path, step: int) -> None:
    """Cut the file off after its last whole line of `step` or before. No file is fine."""
    if not path.exists():
        return
    keep = end = 0
    with path.open("rb") as file:
        for line in file:
            end += len(line)
            row = parse_line(line) if line.endswith(b"\n") else None
            if row is not None and row["step"] > step:
                break
            if row is not None:
                keep = end
    os.truncate(path, keep)


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The line's object, or None for a torn or foreign line."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
