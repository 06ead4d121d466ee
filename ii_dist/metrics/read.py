"""The ranks' JSON lines read back: one rank as rows, a run as one table over all ranks.

In: ``metrics/rank_*.jsonl``, perhaps torn by a kill or with steps that a later attempt made again. Out: rows in which
each step stands once (what was written last wins). Files are read from their end, block by block, so that the latest
value comes first and memory does not grow with the ranks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ii_dist.config.errors import CheckpointError
from ii_dist.config.run_folder import RunFolder, parse_rank_metrics
from ii_dist.metrics.clock import Stretch
from ii_dist.metrics.jsonl import parse_line
from ii_dist.metrics.tags import TAGS

_BLOCK_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Start:
    """An attempt began on one rank: from `step`, at Unix time `time_s`."""

    step: int
    time_s: float
    rank: int
    world_size: int
    host: str


@dataclass(slots=True)
class Row:
    """The numbers of one step by tag. `time_s` is the Unix time of its first line. A value may be NaN."""

    step: int
    time_s: float
    values: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class RankFigures:
    """What one rank did in the steps that counted. Rate and share are over its training time after the first epoch,
    or over all of it where there is no more."""

    rank: int
    host: str = "?"
    last_step: int = 0
    images_per_s: float = math.nan
    data_wait_share: float = math.nan
    rss_gib: float = math.nan
    device_gib: float = math.nan


@dataclass(frozen=True, slots=True)
class RunMetrics:
    """A run over all ranks: rows by step, attempts in order, figures by rank."""

    rows: list[Row]
    starts: list[Start]
    ranks: list[RankFigures]

    def series(self, tag: str) -> tuple[list[Row], list[float]]:
        """The rows that have a finite value of `tag`, and the values."""
        assert tag in TAGS, f"not in metrics/tags.py: {tag}"
        rows = [row for row in self.rows if math.isfinite(row.values.get(tag, math.nan))]
        return rows, [row.values[tag] for row in rows]

    def last(self, tag: str) -> float | None:
        """The newest finite value of `tag`, or None."""
        _, values = self.series(tag)
        return values[-1] if values else None


def read_rank_metrics(path: Path) -> list[Row]:
    """One rank's rows in ascending order, each step once."""
    return [row for row in newest_first(path) if isinstance(row, Row)][::-1]


def newest_first(path: Path) -> Iterator[Row | Start]:
    """Rows and starts from the end of the file to its beginning, superseded ones left out.

    A line counts if no later line is of an earlier step: an attempt that goes back makes later steps again. Lines of
    one step become one row; a start comes after (in the file: before) the rows of its attempt.
    """
    row: Row | None = None
    first_step: float = math.inf
    for line in _lines_backwards(path):
        found = parse_line(line)
        if found is None or found["step"] > first_step:
            continue
        step, time_s = found.pop("step"), found.pop("time", math.nan)
        first_step = step
        if row is not None and (row.step != step or "event" in found):
            yield row
            row = None
        if found.get("event") == "start":
            yield Start(step, time_s, found.get("rank", 0), found.get("world_size", 1), found.get("host", "?"))
        elif "event" not in found:
            row = row or Row(step, time_s)
            row.time_s = time_s
            for tag, value in found.items():
                row.values.setdefault(tag, value if isinstance(value, int | float) else math.nan)
    if row is not None:
        yield row


def _lines_backwards(path: Path) -> Iterator[bytes]:
    """Whole lines without their newline, last first. What follows the last newline is torn and left out."""
    with path.open("rb") as file:
        end = file.seek(0, 2)
        rest: bytes | None = None  # the end of a line whose beginning lies in an earlier block
        while end > 0:
            start = max(0, end - _BLOCK_BYTES)
            file.seek(start)
            lines = file.read(end - start).split(b"\n")
            end = start
            if rest is not None:
                lines[-1] += rest
            elif len(lines) > 1:
                lines.pop()
            else:
                continue  # no newline so far: all of it is torn
            yield from reversed(lines[1:])
            rest = lines[0]
        if rest is not None:
            yield rest


def read_run(folder: RunFolder) -> RunMetrics:
    """All ranks of a run as one table. Raises CheckpointError where there are no metrics."""
    paths = _rank_paths(folder)
    merged = _Merge()
    starts: list[Start] = []
    ranks: list[RankFigures] = []
    for rank, path in paths:
        average = _RankAverage(RankFigures(rank))
        for found in newest_first(path):
            if isinstance(found, Row):
                merged.add(found)
                average.add(found)
                continue
            average.figures.host = found.host if average.figures.host == "?" else average.figures.host
            if rank == paths[0][0]:
                starts.append(found)
        ranks.append(average.done())
    return RunMetrics(merged.rows(), starts[::-1], ranks)


def _rank_paths(folder: RunFolder) -> list[tuple[int, Path]]:
    if not folder.root.is_dir():
        raise CheckpointError(
            f"{folder.root}: no such run folder; runs are below runs/ unless runs_folder says otherwise"
        )
    found = folder.metrics.iterdir() if folder.metrics.is_dir() else ()
    paths = sorted((rank, path) for path in found if (rank := parse_rank_metrics(path.name)) is not None)
    if not paths:
        raise CheckpointError(f"{folder.metrics}: no rank_*.jsonl; train with jsonl in metrics.boards")
    return paths


class _Merge:
    """Combines rank after rank, as each tag's row of the table says."""

    def __init__(self) -> None:
        self._rows: dict[int, Row] = {}
        self._means: dict[int, dict[str, int]] = {}

    def add(self, new: Row) -> None:
        row = self._rows.setdefault(new.step, Row(new.step, new.time_s))
        for tag, value in new.values.items():
            if tag not in TAGS:  # of another version: nobody knows how its ranks combine
                continue
            if tag not in row.values:
                row.values[tag] = value
            elif TAGS[tag].combine == "sum":
                row.values[tag] += value
            elif TAGS[tag].combine == "max":
                row.values[tag] = max(row.values[tag], value)
            elif TAGS[tag].combine == "mean":
                seen = self._means.setdefault(new.step, {})
                seen[tag] = seen.get(tag, 1) + 1
                row.values[tag] += (value - row.values[tag]) / seen[tag]

    def rows(self) -> list[Row]:
        return [self._rows[step] for step in sorted(self._rows)]


def is_steady(row: Row) -> bool:
    """Whether the row's steps lie after the first epoch, when files and kernels are warm."""
    return row.values.get("train/epoch", 0.0) > 1


class _RankAverage:
    """Means of one rank, weighted so that rates are images over time and shares are time over time."""

    def __init__(self, figures: RankFigures) -> None:
        self.figures = figures
        self._cold, self._steady = Stretch(), Stretch()

    def add(self, row: Row) -> None:
        values, figures = row.values, self.figures
        figures.last_step = max(figures.last_step, row.step)
        figures.rss_gib = _larger(figures.rss_gib, values.get("memory/rss_gib"))
        figures.device_gib = _larger(figures.device_gib, values.get("memory/device_gib"))
        if "time/step_s" in values and "throughput/images_per_s_rank" in values:
            # A line stands for equally many steps, so one step of it stands for all.
            seconds = values["time/step_s"]
            images = values["throughput/images_per_s_rank"] * seconds
            wait_s = values.get("time/data_wait_share", 0.0) * seconds
            (self._steady if is_steady(row) else self._cold).add(images, seconds, wait_s)

    def done(self) -> RankFigures:
        found = self._steady if self._steady.steps else self._cold
        if found.steps:
            self.figures.images_per_s = found.images_per_s
            self.figures.data_wait_share = found.data_wait_share
        return self.figures


def _larger(known: float, value: float | None) -> float:
    return known if value is None else value if math.isnan(known) else max(known, value)
