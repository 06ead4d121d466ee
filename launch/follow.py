"""Shows a job's first rank until the job ends, and hands over how it ended.

In: a log and a record that the job writes, a question whether it still lives. Out: text on stdout, the last record.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from launch.output import without_stamps
from launch.ranks import StopSignals
from launch.records import JobRecord, read_record

POLL_S = 0.2
LAST_WORD_S = 5.0


class LogTail:
    """Prints what is appended to a file, which need not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def show(self) -> None:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
                new = new[: new.rfind(b"\n") + 1]  # whole lines
        except FileNotFoundError:
            return
        if new:
            self._offset += len(new)
            new = without_stamps(new)
            sys.stdout.write(new.decode("utf-8", "replace"))
            sys.stdout.flush()


def follow(
    log: Path,
    record_path: Path,
    alive: Callable[[], bool],
    stop: StopSignals,
    on_signal: Callable[[], bool],
    poll_s: float = POLL_S,
) -> JobRecord | None:
    """Print `log` until the record says that the job ended, the job is gone, or `on_signal` says to leave (False).

    Returns the last record seen, None where the job never began.
    """
    tail = LogTail(log)
    while True:
        lives = alive()  # before the record: a job that ended in between has written it
        record = read_record(record_path)
        tail.show()
        if not lives or (record is not None and record.end is not None):
            return record
        if stop.take() and not on_signal():
            return record
        time.sleep(poll_s)


def wait_gone(alive: Callable[[], bool], limit_s: float = LAST_WORD_S) -> None:
    """Give a job that has said its last word a moment to leave."""
    until_s = time.monotonic() + limit_s
    while alive() and time.monotonic() < until_s:
        time.sleep(POLL_S / 4)


def seldom(question: Callable[[], bool], every_s: float) -> Callable[[], bool]:
    """`question`, asked at most every `every_s`; the last answer in between."""
    asked_s, answer = float("-inf"), True

    def cached() -> bool:
        nonlocal asked_s, answer
        if time.monotonic() - asked_s >= every_s:
            asked_s, answer = time.monotonic(), question()
        return answer

    return cached
