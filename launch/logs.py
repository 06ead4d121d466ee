"""What the ranks of a run have printed, of one rank or of all in the order of time: `python -m launch logs RUN`.

In: `logs/<job>_rank_00000.log`, in which each attempt begins with a line `== job J attempt A rank R ...` and the others
are `2026-11-23T10:11:12.345Z 3| text` (or bare text). Out: `Line`s. Only the ends of files are read, unless an earlier
attempt is asked for.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ii_dist.config import ConfigError, RunFolder

POLL_S = 0.5
_HEADER = re.compile(r"== job (\S+) attempt (\d+)\b.*? rank (\d+) of (\d+) on (\S+), (\S+)")
_STAMPED = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3})Z (\d+)\| (.*)", re.DOTALL)
_NAME = re.compile(r"(.+)_rank_(\d{5})\.log")
_TAIL_BYTES = 1 << 17
_LEAST_TAIL_BYTES = 1 << 12


@dataclass(frozen=True, slots=True)
class Line:
    """One printed line. `time` is UTC, ISO; "" before the first line that has one."""

    time: str
    rank: int
    text: str
    attempt: int = 0


def log_jobs(folder: RunFolder) -> list[str]:
    """Jobs that have logs, the one written to last at the end."""
    written = {job: path.stat().st_mtime for path, job, rank in _log_files(folder) if rank == 0}
    return sorted(written, key=lambda job: written[job])


def log_ranks(folder: RunFolder, job: str) -> list[int]:
    """Ranks of which there is a log of this job, ascending."""
    return sorted(rank for _, of_job, rank in _log_files(folder) if of_job == job)


def read_lines(
    folder: RunFolder, job: str, ranks: Sequence[int], attempt: int | None = None, last: int = 0
) -> list[Line]:
    """Lines of these ranks by time, of one attempt or of the newest; the last `last` of them, 0 = all there are."""
    tail = 0 if attempt is not None or not last else max(_LEAST_TAIL_BYTES, _TAIL_BYTES // len(ranks or [0]))
    merged: list[Line] = []
    for rank in ranks:
        lines = parse_log(_end_of(folder.rank_log(job, rank), tail), rank)
        wanted = attempt if attempt is not None else lines[-1].attempt if lines else 0
        of_attempt = [line for line in lines if line.attempt == wanted]
        merged += of_attempt[-last:] if last else of_attempt
    if len(ranks) > 1:
        merged.sort(key=lambda line: line.time)  # stable: a rank's own lines keep their order
    return merged[-last:] if last else merged


def last_attempt_lines(folder: RunFolder, job: str, rank: int, last: int = 60) -> list[Line]:
    """The end of a rank's log, of its newest attempt."""
    return read_lines(folder, job, [rank], last=last)


def parse_log(text: str, rank: int) -> list[Line]:
    """Lines with time and attempt; a line without a time has that of the line before it."""
    lines: list[Line] = []
    when, attempt = "", 0
    for raw in text.splitlines():
        if raw.startswith("== job ") and (header := _HEADER.match(raw)):
            attempt, when = int(header[2]), header[6].partition("+")[0].removesuffix("Z")
            lines.append(Line(when, rank, raw, attempt))
        elif (stamped := _STAMPED.fullmatch(raw)) is not None:
            when = stamped[1]
            lines.append(Line(when, int(stamped[2]), stamped[3], attempt))
        else:
            lines.append(Line(when, rank, raw, attempt))
    return _attempts_filled_in(lines)


def parse_ranks(text: str, there: Sequence[int]) -> list[int]:
    """`all`, or ranks and spans such as 0,3,8-15. Raises ConfigError for others, or for ranks that have no log."""
    if text == "all":
        return list(there)
    wanted: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ConfigError(f"--rank {text!r}: needs all, or ranks such as 0,3,8-15")
        wanted += range(int(match[1]), int(match[2] or match[1]) + 1)
    if missing := sorted(set(wanted) - set(there)):
        span = f"{there[0]} to {there[-1]}" if there else "none"
        raise ConfigError(f"--rank {text}: no log of rank {missing[0]}; this job has ranks {span}")
    return wanted


def show(lines: Iterable[Line], as_json: bool, several: bool) -> None:
    """Print lines; with several ranks each says whose it is."""
    for line in lines:
        if as_json:
            print(json.dumps(asdict(line)))
        elif several:
            print(f"{line.time[11:] or '-':12} rank {line.rank:<4} {line.text}")
        else:
            print(f"{line.time[11:]} {line.text}" if line.time else line.text)


def follow(
    folder: RunFolder, job: str, ranks: Sequence[int], on_lines: Callable[[list[Line]], None], live: Callable[[], bool]
) -> None:
    """Hand over what is appended to these logs until the run is over, and then the rest."""
    offsets = {rank: _size(folder.rank_log(job, rank)) for rank in ranks}
    while True:
        goes_on = live()  # before the last look: what it wrote while it ended is shown
        new: list[Line] = []
        for rank in ranks:
            text, offsets[rank] = _read_from(folder.rank_log(job, rank), offsets[rank])
            new += parse_log(text, rank)
        on_lines(sorted(new, key=lambda line: line.time) if len(ranks) > 1 else new)
        sys.stdout.flush()
        if not goes_on:
            return
        time.sleep(POLL_S)


def _log_files(folder: RunFolder) -> list[tuple[Path, str, int]]:
    try:
        names = [(entry, _NAME.fullmatch(entry.name)) for entry in os.scandir(folder.logs)]
    except OSError:
        return []
    return [(Path(entry.path), match[1], int(match[2])) for entry, match in names if match]


def _attempts_filled_in(lines: list[Line]) -> list[Line]:
    """Lines before the first header that was read are of the attempt before it."""
    first = next((i for i, line in enumerate(lines) if line.text.startswith("== job ")), None)
    if not first or lines[first].attempt == 0:
        return lines
    before = lines[first].attempt - 1
    return [Line(line.time, line.rank, line.text, before) for line in lines[:first]] + lines[first:]


def _end_of(path: Path, limit_bytes: int) -> str:
    """The whole file, or with a limit its last whole lines."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - limit_bytes) if limit_bytes else 0
            file.seek(start)
            text = file.read()
    except OSError:
        return ""
    if start:
        text = text.partition(b"\n")[2]
    return text.decode("utf-8", "replace")


def _read_from(path: Path, offset: int) -> tuple[str, int]:
    """Whole lines behind `offset`, and where the next ones begin."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            text = file.read()
    except OSError:
        return "", offset
    whole = text[: text.rfind(b"\n") + 1]
    return whole.decode("utf-8", "replace"), offset + len(whole)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
