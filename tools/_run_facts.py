"""What a report needs to know of a run. In: a run folder, perhaps of a run that still goes on. Out: `RunFacts`.

Config, plan and job records are read leniently: a report over a run of an earlier version, or one started without
`launch`, leaves out what is not there. Only the numbers themselves are required.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from ii_dist.config.errors import CheckpointError
from ii_dist.config.run_folder import COMMITTED, RunFolder, parse_step
from ii_dist.metrics import Row, RunMetrics, read_run, read_summary
from ii_dist.metrics.read import is_steady
from ii_dist.metrics.words import in_words_s


@dataclass(frozen=True, slots=True)
class RunFacts:
    """One run, read once."""

    name: str
    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    metrics: RunMetrics
    device: str
    checkpoints: list[tuple[str, int, str]]
    """Committed steps on disk: name, bytes, when."""
    jobs: list[tuple[str, ...]]
    """One row of text an attempt, in order of their start."""

    def setting(self, key: str) -> Any:
        """The config's value at a dotted key, or None."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

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
        rows = [r for r in steady_rows(self.metrics.rows) or self.metrics.rows if "time/data_wait_share" in r.values]
        seconds = sum(step_s(row) for row in rows)
        return sum(row.values["time/data_wait_share"] * step_s(row) for row in rows) / seconds if seconds else math.nan

    @property
    def last_step(self) -> int:
        return self.metrics.rows[-1].step if self.metrics.rows else 0

    @property
    def running_s(self) -> float:
        """Wall time of all attempts, the gaps between them left out."""
        return max(self.elapsed_s(), default=0.0)

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

    def _attempt_starts(self) -> list[float]:
        times = [start.time_s for start in self.metrics.starts]
        return times or [row.time_s for row in self.metrics.rows[:1]]


def step_s(row: Row) -> float:
    return row.values.get("time/step_s", 0.0)


def steady_rows(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if is_steady(row) and step_s(row) > 0]


def rate(rows: Iterable[Row]) -> float:
    """Images over time: rows stand for equally many steps, so each weighs by the time of a step."""
    found = [row for row in rows if "throughput/images_per_s" in row.values]
    seconds = sum(step_s(row) for row in found)
    return sum(row.values["throughput/images_per_s"] * step_s(row) for row in found) / seconds if seconds else math.nan


def read_facts(root: Path) -> RunFacts:
    """Read one run folder. Raises CheckpointError where it is none, or has no numbers yet."""
    folder = RunFolder(root)
    metrics = read_run(folder)
    summary = read_summary(folder)
    config = _read_yaml(folder.config)
    wanted = config.get("engine", {}).get("device", "?") if isinstance(config.get("engine"), Mapping) else "?"
    return RunFacts(
        name=str(config.get("name") or root.resolve().name),
        config=config,
        plan=_read_json(folder.plan),
        metrics=metrics,
        device=summary.device if summary else str(wanted),
        checkpoints=_read_checkpoints(folder),
        jobs=_read_jobs(folder),
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
            _minute(datetime.fromtimestamp((path / COMMITTED).stat().st_mtime, UTC)),
        )
        for path in steps
    ]


def _read_jobs(folder: RunFolder) -> list[tuple[str, ...]]:
    """A row an attempt, from the records that the first node of each job wrote."""
    records: list[Mapping[str, Any]] = []
    for path in sorted(folder.jobs.glob("*.json")) if folder.jobs.is_dir() else ():
        record = _read_json(path)
        if record.get("node_rank", 0) == 0 and "job" in record:
            records += [*record.get("earlier", ()), record]
    return [_job_row(record) for record in sorted(records, key=lambda record: str(record.get("start")))]


def _job_row(record: Mapping[str, Any]) -> tuple[str, ...]:
    start, end = _time(record.get("start")), _time(record.get("end"))
    code = record.get("exit_code")
    return (
        str(record["job"]),
        str(record.get("attempt", 0)),
        " ".join(map(str, record.get("nodes", ()))),
        str(record.get("ranks", "?")),
        _minute(start) if start else "?",
        in_words_s((end - start).total_seconds()) if start and end else "-",
        "-" if code is None else str(code),
        str(record.get("why", "?")),
    )


def _time(text: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None


def _minute(when: datetime) -> str:
    return when.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
