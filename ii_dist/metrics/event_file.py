"""TensorBoard's event files: appended to without a torn record, and cut back to the step that a run resumes after.

In: serialized events. Out: `events.out.tfevents.<second>.<host>.<pid>` files, records of TensorFlow's format: length
(uint64, little-endian), its checksum, the event, its checksum (masked crc32c).

TensorBoard's own writer is not used: its thread keeps up to seconds of events in memory, which a kill loses, and a full
disk leaves half a record behind which nothing can be read. TensorBoard reads the files of a folder in the order of
their names; its fast reader (the default) does not know the mark by which an attempt takes steps back, so that what is
not to be seen twice must not be in the files.
"""

import os
import re
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

_NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\..*")
_LENGTH = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<I")


class EventFile:
    """A new file of events. Each event is one write: none waits in memory. Raises OSError, also for a full disk: the
    file is whole then, and there may be room for the next event."""

    def __init__(self, path: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        path.parent.mkdir(parents=True, exist_ok=True)
        self._event: Any = Event
        self._checksum = _checksums()
        self._file = path.open("wb", buffering=0)
        self._end = 0
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(self, step: int, summary: Any) -> None:
        """summary: a tensorboard Summary."""
        self._append(self._event(wall_time=time.time(), step=step, summary=summary))

    def take_back_steps(self, first: int) -> None:
        """Tell a TensorBoard that has been watching since before: events of step `first` and later no longer count."""
        from tensorboard.compat.proto.event_pb2 import SessionLog

        start = SessionLog(status=SessionLog.START)
        self._append(self._event(wall_time=time.time(), step=first, session_log=start))

    def _append(self, event: Any) -> None:
        record = self._record(event.SerializeToString())
        try:
            written = self._file.write(record)
        except OSError:
            self._take_back()
            raise
        if written != len(record):
            self._take_back()
            raise OSError(f"{written} of {len(record)} bytes written")
        self._end += len(record)

    def close(self) -> None:
        self._file.close()

    def _record(self, data: bytes) -> bytes:
        length = _LENGTH.pack(len(data))
        sums = (_CHECKSUM.pack(self._checksum(part)) for part in (length, data))
        return length + next(sums) + data + next(sums)

    def _take_back(self) -> None:
        self._file.truncate(self._end)
        self._file.seek(self._end)


def next_path(folder: Path) -> Path:
    """A name for an event file that is read after all that are there."""
    # Clocks of nodes differ: what counts is the order of the attempts.
    second = max([int(time.time()), *(_second(path) + 1 for path in event_files(folder))])
    return folder / f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}"


def replace_settings(folder: Path, summaries: Iterable[Any]) -> None:
    """Summaries of step 0 that every attempt says anew, in a file of their own that is read first.

    Of several in one folder TensorBoard would believe the first, also where a run goes on with other settings.
    """
    part = folder / ".settings.part"
    file = EventFile(part)
    for summary in summaries:
        file.add(0, summary)
    file.close()
    part.replace(folder / "events.out.tfevents.0000000000.settings")


def event_files(folder: Path) -> list[Path]:
    """The event files of one folder, in the order in which TensorBoard reads them."""
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name)) if folder.is_dir() else []


def cut_to_step(path: Path, step: int) -> None:
    """Cut an event file off before its first event of a later step, or before its first torn record."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    keep = 0
    for end, data in _records(path):
        try:
            if Event.FromString(data).step > step:
                break
        except DecodeError:
            break
        keep = end
    if keep < path.stat().st_size:
        os.truncate(path, keep)


def _records(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset of its end, content) of every whole record from the start on."""
    checksum, end = _checksums(), 0
    with path.open("rb") as file:
        while True:
            length, length_sum = file.read(_LENGTH.size), file.read(_CHECKSUM.size)
            if len(length_sum) < _CHECKSUM.size or _CHECKSUM.unpack(length_sum)[0] != checksum(length):
                return
            data, data_sum = file.read(_LENGTH.unpack(length)[0]), file.read(_CHECKSUM.size)
            if len(data_sum) < _CHECKSUM.size:
                return
            end = file.tell()
            yield end, data


def _second(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def _checksums() -> Callable[[bytes], int]:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    checksum: Callable[[bytes], int] = masked_crc32c
    return checksum
