"""What a report needs to know of a run. In: a run folder, perhaps of a run that still goes on, or a folder with another
trainer's TensorBoard event files. Out: `RunFacts`.

Config, plan and job records are read leniently: a report over a run of an earlier version, or one started without
`launch`, leaves out what is not there. Only the numbers themselves are required.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ii_dist.config.errors import CheckpointError
from ii_dist.config.run_folder import COMMITTED, RunFolder, parse_step
from ii_dist.metrics import Row, RunMetrics, read_run, read_summary
from ii_dist.metrics.events import has_events, read_events
from ii_dist.metrics.goodput import Goodput, account
from ii_dist.metrics.read import PHASES, is_steady, split_phases
from tools._run_jobs import Attempt, minute, pieces_of, queue_s, read_attempts, read_submitted

DEFAULT_SILENCE_S = 1800.0


@dataclass(frozen=True)
class RunFacts:
    """One run, read once."""

    name: str
    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    metrics: RunMetrics
    device: str = "?"
    checkpoints: list[tuple[str, int, str]] = field(default_factory=list)
    """Committed steps on disk: name, bytes, when."""
    attempts: list[Attempt] = field(default_factory=list)
    """In order of their start; empty where the run was started without `launch`."""
    queue_s: float = 0.0
    mapped: Mapping[str, str] | None = None
    """Of another trainer's run: our tag for each of theirs. None: a run of ours."""
    unknown: tuple[str, ...] = ()
    """Of another trainer's run: tags that became nothing of ours."""

    def setting(self, key: str) -> Any:
        """The config's value at a dotted key, or None."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    @property
    def ranks(self) -> int | None:
        """Of the newest attempt, where known."""
        if self.mapped is not None:
            return None
        return self.metrics.starts[-1].world_size if self.metrics.starts else self.plan.get("world_size")

    @property
    def expected_top1(self) -> float | None:
        """What the recipe is published to reach, per cent."""
        value = self.setting("expected_top1")
        return float(value) if isinstance(value, int | float) and value > 0 else None

    @property
    def images_per_s(self) -> float:
        """All ranks, after the first epoch; over everything where there is no more."""
        return rate(steady_rows(self.metrics.rows) or self.metrics.rows)

    @property
    def cold_images_per_s(self) -> float:
        """All ranks, in the first epoch."""
        return rate([row for row in self.metrics.rows if row.values.get("train/epoch", math.inf) <= 1])

    @property
    def data_wait_share(self) -> float:
        """Share of the training time, after the first epoch where there is more."""
        return self.mean("time/data_wait_share")

    def mean(self, tag: str) -> float:
        """Of a tag over the training time after the first epoch, or all where there is no more; NaN without it."""
        rows = [row for row in steady_rows(self.metrics.rows) or self.metrics.rows if tag in row.values]
        pairs = [(row.values[tag], weight(row)) for row in rows if math.isfinite(row.values[tag])]
        total = sum(seconds for _, seconds in pairs)
        return sum(value * seconds for value, seconds in pairs) / total if total else math.nan

    @cached_property
    def phase_s(self) -> dict[str, float]:
        """Seconds of a step by phase, mean of the steady steps; empty where the run wrote none."""
        found = {phase: self.mean(f"time/{phase}_s") for phase in PHASES}
        return split_phases({phase: value for phase, value in found.items() if math.isfinite(value)})

    @property
    def last_step(self) -> int:
        return self.metrics.rows[-1].step if self.metrics.rows else 0

    @property
    def is_done(self) -> bool:
        return 0 < int(self.plan.get("total_steps") or 0) <= self.last_step

    @property
    def running_s(self) -> float:
        """Wall time of all attempts, the gaps between them left out."""
        return max(self.elapsed_s, default=0.0)

    @cached_property
    def elapsed_s(self) -> list[float]:
        """For each row the running time up to it, the gaps between attempts left out."""
        attempts = self._attempt_starts()
        elapsed: list[float] = []
        before, k = 0.0, 0
        for row in self.metrics.rows:
            while k + 1 < len(attempts) and row.time_s >= attempts[k + 1]:
                before, k = (elapsed[-1] if elapsed else 0.0), k + 1
            elapsed.append(before + max(0.0, row.time_s - attempts[k]))
        return elapsed

    def restart_steps(self) -> list[int]:
        """The steps that later attempts went on from; one that found nothing left to do does not count."""
        return [start.step for start in self.metrics.starts[1:] if start.step < self.last_step]

    @cached_property
    def goodput(self) -> Goodput | None:
        """None for another trainer's run: when its processes started is not in its numbers."""
        if self.mapped is not None:
            return None
        metrics = self.metrics
        limits = [self.setting("launch.hang_after_s"), self.setting("train.hang_timeout_s")]
        silent_s = min((float(limit) for limit in limits if limit), default=DEFAULT_SILENCE_S)
        pieces = pieces_of(self.attempts, metrics.starts, metrics.rows, silent_s)
        return account(pieces, metrics.rows, metrics.starts) if pieces else None

    def _attempt_starts(self) -> list[float]:
        times = [start.time_s for start in self.metrics.starts]
        return times or [row.time_s for row in self.metrics.rows[:1]]


def step_s(row: Row) -> float:
    return row.values.get("time/step_s", 0.0)


def weight(row: Row) -> float:
    """What a row counts in a mean over time: rows stand for equally many steps, so each counts as a step of it lasts;
    another trainer's row without a step time counts as one second."""
    return row.values.get("time/step_s", 1.0)


def steady_rows(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if is_steady(row) and weight(row) > 0]


def rate(rows: Iterable[Row]) -> float:
    """Images over time."""
    found = [row for row in rows if math.isfinite(row.values.get("throughput/images_per_s", math.nan))]
    seconds = sum(weight(row) for row in found)
    return sum(row.values["throughput/images_per_s"] * weight(row) for row in found) / seconds if seconds else math.nan


def read_facts(root: Path, by_hand: Mapping[str, str] | None = None, global_batch: int = 0) -> RunFacts:
    """Read one run folder, or event files of another trainer (by_hand, global_batch: see `read_events`). Raises
    CheckpointError where it is neither, or has no numbers yet."""
    folder = RunFolder(root)
    if root.is_dir() and not folder.metrics.is_dir() and not folder.config.exists() and has_events(root):
        foreign = read_events(root, by_hand, global_batch)
        whole = root.resolve()
        return RunFacts(
            f"{whole.parent.name}/tb" if whole.name == "tb" else whole.name,
            {},
            {},
            foreign.metrics,
            mapped=foreign.mapped,
            unknown=tuple(foreign.unknown),
        )
    metrics = read_run(folder)
    summary = read_summary(folder)
    config = _read_yaml(folder.config)
    wanted = config.get("engine", {}).get("device", "?") if isinstance(config.get("engine"), Mapping) else "?"
    attempts = read_attempts(folder)
    return RunFacts(
        name=str(config.get("name") or root.resolve().name),
        config=config,
        plan=_read_json(folder.plan),
        metrics=metrics,
        device=summary.device if summary else str(wanted),
        checkpoints=_read_checkpoints(folder),
        attempts=attempts,
        queue_s=queue_s(attempts, read_submitted(folder)),
    )


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError):
        raise CheckpointError(f"{path}: cannot be read as YAML; copy it back or remove it") from None
    return values if isinstance(values, Mapping) else {}


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        raise CheckpointError(f"{path}: cannot be read as JSON; copy it back or remove it") from None
    return values if isinstance(values, Mapping) else {}


def _read_checkpoints(folder: RunFolder) -> list[tuple[str, int, str]]:
    found = sorted(folder.checkpoints.iterdir()) if folder.checkpoints.is_dir() else []
    steps = [path for path in found if parse_step(path.name) is not None and (path / COMMITTED).is_file()]
    return [
        (
            path.name,
            sum(file.stat().st_size for file in path.iterdir()),
            minute((path / COMMITTED).stat().st_mtime),
        )
        for path in steps
    ]
