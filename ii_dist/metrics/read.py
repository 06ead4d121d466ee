"""The ranks' JSON lines read back: one rank as rows, a run as one table over all ranks.

In: ``metrics/rank_*.jsonl``, perhaps torn by a kill or with steps that a later attempt made again. Out: rows in which
each step stands once (what was written last wins). `columns` reads a file; here ranks are combined, one after the
other, so that memory does not grow with their number.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ii_dist.config.errors import CheckpointError
from ii_dist.config.run_folder import RunFolder, parse_rank_metrics
from ii_dist.metrics.columns import Floats, Ints, Mask, RankTable, Start, read_columns
from ii_dist.metrics.tags import TAGS

PHASES = ("data_wait", "copy", "forward", "backward", "allreduce", "optimizer", "metrics", "other")
"""Parts of a step in their order; each has a tag ``time/<phase>_s``. allreduce is the wait for other ranks, which the
tag of backward has in it and `split_phases` takes out."""

_GROUPS = ("first", "mean", "sum", "max", "")
"""How ranks combine; "" is of another version."""


@dataclass(slots=True)
class Row:
    """The numbers of one step by tag. `time_s` is the Unix time of its first line. A value may be NaN."""

    step: int
    time_s: float
    values: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class RankFigures:
    """What one rank did in the steps that counted. Rates, shares and times are over its training time after the first
    epoch, or over all of it where there is no more."""

    rank: int
    host: str = "?"
    last_step: int = 0
    images_per_s: float = math.nan
    data_wait_share: float = math.nan
    step_s: float = math.nan
    rss_gib: float = math.nan
    device_gib: float = math.nan
    phase_s: dict[str, float] = field(default_factory=dict)
    """Seconds of a step by phase, for those of `PHASES` that were written; backward without allreduce."""


@dataclass(frozen=True, slots=True)
class RunMetrics:
    """A run over all ranks: rows by step, attempts in order, figures by rank."""

    rows: list[Row]
    starts: list[Start]
    ranks: list[RankFigures]

    def series(self, tag: str) -> tuple[list[Row], list[float]]:
        """The rows that have a finite value of `tag`, and the values."""
        rows = [row for row in self.rows if math.isfinite(row.values.get(tag, math.nan))]
        return rows, [row.values[tag] for row in rows]

    def last(self, tag: str) -> float | None:
        """The newest finite value of `tag`, or None."""
        _, values = self.series(tag)
        return values[-1] if values else None


def read_rank_metrics(path: Path) -> list[Row]:
    """One rank's rows in ascending order, each step once."""
    table = read_columns(path)
    columns = {tag: (table.values_of(tag), table.there_of(tag)) for tag in table.tags()}
    return _rows(table.steps, table.times_s, columns)


def read_run(folder: RunFolder) -> RunMetrics:
    """All ranks of a run as one table. Raises CheckpointError where there are no metrics."""
    (lowest, path), *others = _rank_paths(folder)
    first = _in_groups(read_columns(path))
    merged = _Merge(first)
    ranks = [_figures(lowest, first)]
    for rank, path in others:
        table = read_columns(path, first.keys)
        ranks.append(_figures(rank, table))
        merged.add(table)
    return RunMetrics(_rows(merged.steps, merged.times_s, merged.columns()), first.starts, ranks)


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


def _in_groups(table: RankTable) -> RankTable:
    """The same with the tags in order of how ranks combine: what is done to a group is done to one slice."""
    groups = [TAGS[key].combine if key in TAGS else "" for key in table.keys]
    order = [0, 1, *sorted(range(2, len(groups)), key=lambda k: _GROUPS.index(groups[k]))]
    keys = tuple(table.keys[k] for k in order)
    return RankTable(table.steps, table.times_s, keys, table.values[:, order], table.there[:, order], table.starts)


class _Merge:
    """Combines rank after rank, as each tag's row of the table says; tags of another version are left out, for nobody
    knows how their ranks combine.

    As long as all ranks wrote the same tags at the same steps, whole groups of columns are combined at once; from the
    first that did not on, tag by tag.
    """

    def __init__(self, first: RankTable) -> None:
        self.steps, self.times_s = first.steps, first.times_s
        self._first, self._values, self._count = first, first.values.copy(), 1
        groups = [TAGS[key].combine if key in TAGS else "" for key in first.keys[2:]]
        begin, self._slices = 2, dict[str, slice]()
        for how in _GROUPS:
            self._slices[how] = slice(begin, begin + groups.count(how))
            begin += groups.count(how)
        self._columns: dict[str, _Column] | None = None
        """Of the way tag by tag."""

    def add(self, table: RankTable) -> None:
        if self._columns is None and self._is_alike(table):
            self._count += 1
            for how in ("mean", "sum", "max"):
                part = self._slices[how]
                self._values[:, part] = _combine(how, self._values[:, part], table.values[:, part], self._count)
            return
        if self._columns is None:
            self._columns = self._by_tag()
        if not np.array_equal(table.steps, self.steps):
            self._add_steps(table)
        places = np.searchsorted(self.steps, table.steps)
        for tag in table.tags():
            if tag in TAGS:
                new = _spread(table.values_of(tag), table.there_of(tag), places, len(self.steps))
                self._columns[tag] = _combined(TAGS[tag].combine, self._columns.get(tag), new)

    def columns(self) -> dict[str, tuple[Floats, Mask]]:
        columns = self._by_tag() if self._columns is None else self._columns
        return {tag: (column.values, column.ranks > 0) for tag, column in columns.items()}

    def _is_alike(self, table: RankTable) -> bool:
        if table.keys != self._first.keys or not np.array_equal(table.steps, self.steps):
            return False
        first, other = self._slices["first"], slice(self._slices["mean"].start, self._slices["max"].stop)
        there, known = table.there, self._first.there
        return bool((there[:, other] == known[:, other]).all() and (there[:, first] <= known[:, first]).all())

    def _by_tag(self) -> "dict[str, _Column]":
        tags = [tag for tag in self._first.tags() if tag in TAGS]
        places = {tag: self._first.keys.index(tag) for tag in tags}
        there = self._first.there
        return {
            tag: _Column(self._values[:, k].copy(), there[:, k] * np.int64(self._count)) for tag, k in places.items()
        }

    def _add_steps(self, table: RankTable) -> None:
        """Make room for steps that only `table` has."""
        assert self._columns is not None
        steps = np.union1d(self.steps, table.steps)
        mine, theirs = np.searchsorted(steps, self.steps), np.searchsorted(steps, table.steps)
        times_s = np.full(len(steps), math.nan)
        times_s[theirs] = table.times_s
        times_s[mine] = self.times_s
        for tag, column in self._columns.items():
            values, ranks = np.full(len(steps), math.nan), np.zeros(len(steps), np.int64)
            values[mine], ranks[mine] = column.values, column.ranks
            self._columns[tag] = _Column(values, ranks)
        self.steps, self.times_s = steps, times_s


@dataclass(slots=True)
class _Column:
    """One tag over all steps, and how many ranks have written each."""

    values: Floats
    ranks: Ints


def _spread(values: Floats, there: Mask, places: Ints, count: int) -> _Column:
    column = _Column(np.full(count, math.nan), np.zeros(count, np.int64))
    column.values[places], column.ranks[places] = values, there
    return column


def _combined(how: str, old: _Column | None, new: _Column) -> _Column:
    if old is None:
        return new
    ranks = old.ranks + new.ranks
    both = _combine(how, old.values, new.values, np.maximum(ranks, 1))
    return _Column(np.where(new.ranks == 0, old.values, np.where(old.ranks == 0, new.values, both)), ranks)


@np.errstate(over="ignore", invalid="ignore")
def _combine(how: str, old: Floats, new: Floats, ranks: Ints | int) -> Floats:
    """Values of the ranks so far with those of one more; `ranks` counts it."""
    if how == "sum":
        return old + new
    if how == "max":
        return np.where(new > old, new, old)
    if how == "mean":
        return old + (new - old) / ranks
    return old


def _rows(steps: Ints, times_s: Floats, columns: dict[str, tuple[Floats, Mask]]) -> list[Row]:
    rows = [Row(step, time_s) for step, time_s in zip(steps.tolist(), times_s.tolist(), strict=True)]
    for tag, (values, there) in columns.items():
        for k in np.flatnonzero(there).tolist():
            rows[k].values[tag] = values.item(k)
    return rows


def is_steady(row: Row) -> bool:
    """Whether the row's steps lie after the first epoch, when files and kernels are warm."""
    return row.values.get("train/epoch", 0.0) > 1


@np.errstate(over="ignore", invalid="ignore")
def _figures(rank: int, table: RankTable) -> RankFigures:
    """Means of one rank, weighted so that rates are images over time and shares are time over time."""
    figures = RankFigures(rank, host=table.starts[-1].host if table.starts else "?")
    figures.last_step = int(table.steps[-1]) if len(table.steps) else 0
    figures.rss_gib = _largest(table, "memory/rss_gib")
    figures.device_gib = _largest(table, "memory/device_gib")
    step_s, rate = _values(table, "time/step_s"), _values(table, "throughput/images_per_s_rank")
    timed = np.isfinite(step_s) & np.isfinite(rate)
    steady = timed & (_values(table, "train/epoch") > 1)
    chosen = steady if steady.any() else timed
    # A line stands for equally many steps, so one step of it stands for all.
    seconds = float(step_s[chosen].sum())
    if seconds > 0:
        figures.images_per_s = float((rate * step_s)[chosen].sum()) / seconds
        figures.data_wait_share = _sum(_values(table, "time/data_wait_share") * step_s, chosen) / seconds
        figures.step_s = seconds / int(chosen.sum())
        means = {}
        for phase in PHASES:
            values = _values(table, f"time/{phase}_s")
            if (there := chosen & np.isfinite(values)).any():
                means[phase] = float(values[there].mean())
        figures.phase_s = split_phases(means)
    return figures


def split_phases(means_s: Mapping[str, float]) -> dict[str, float]:
    """Parts that add up to a step: backward without the wait for other ranks."""
    parts = dict(means_s)
    if "backward" in parts:
        parts["backward"] = max(0.0, parts["backward"] - parts.get("allreduce", 0.0))
    return parts


def _values(table: RankTable, tag: str) -> Floats:
    return table.values_of(tag) if tag in table.keys else np.full(len(table.steps), math.nan)


def _sum(values: Floats, chosen: Mask) -> float:
    return float(np.nan_to_num(values[chosen]).sum())


def _largest(table: RankTable, tag: str) -> float:
    values = _values(table, tag)
    return float(np.fmax.reduce(values, initial=math.nan))
