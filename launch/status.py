"""What runs do now: `python -m launch status [RUN ...]`.

In: run folders, one answer of squeue for all of them. Out: a `Status` a run, as a table, in detail, or as JSON. Works
without SLURM from the files of the run folders alone.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from ii_dist.config import ConfigError, RunFolder
from launch.history import Attempt, Standing, queue_waits_s, read_attempts, standing
from launch.numbers import Numbers, duration, newest_commit, read_numbers, total_steps
from launch.scheduler import LiveJob
from launch.sweep import runs_of_sweep, sweep_table
from launch.why import cause_of, queue_words

SILENT_S = 15.0
"""A rank that gave no sign of life for longer is named."""


@dataclass(frozen=True, slots=True)
class Status:
    """One run. None where nothing is known yet; times are seconds."""

    run: str
    folder: str
    state: str
    why: str
    job: str
    attempts: int
    step: int | None
    total_steps: int | None
    images_per_s: float | None
    top1: float | None
    newest_commit: int | None
    eta_s: float | None
    """Until the last step, with the jobs and the waiting still to come."""
    eta_jobs: int | None
    """Further jobs that it takes."""
    queue_wait_s: float | None
    """Mean so far."""
    start_expected_s: float | None
    """Of a waiting job, where SLURM says so: seconds from now."""
    nodes: tuple[str, ...]
    ranks: int
    slowest_rank: int | None
    """The rank that gave no sign of life for longest, where that is long."""
    silent_s: float | None
    updated_s: float | None
    """Since the newest line of numbers."""


def status_of(folder: RunFolder, live: Sequence[LiveJob] | None, now_s: float | None = None) -> Status:
    """What one run does now."""
    now_s = time.time() if now_s is None else now_s
    attempts = read_attempts(folder)
    stands = standing(folder, live, attempts)
    numbers, plan = read_numbers(folder), total_steps(folder)
    commit, beats = newest_commit(folder), read_beats(folder, stands)
    step = max((s for s in (numbers.step, commit, beats.step) if s is not None), default=None)
    waits = queue_waits_s(folder, attempts)
    wait_s = mean(waits) if waits else None
    eta_s, jobs = _eta(stands, numbers, step, plan, wait_s, _time_minutes(folder), now_s)
    attempt = stands.attempt
    if stands.state == "training" and not _has_begun(stands, numbers, beats):
        stands = replace(stands, state="starting", why="its ranks start")
    return Status(
        run=folder.root.name,
        folder=str(folder.root),
        state=stands.state,
        why=_words(folder, stands, attempts),
        job=stands.job,
        attempts=len(attempts),
        step=step,
        total_steps=plan[0] if plan else None,
        images_per_s=numbers.images_per_s,
        top1=numbers.top1,
        newest_commit=commit,
        eta_s=eta_s,
        eta_jobs=jobs,
        queue_wait_s=wait_s,
        start_expected_s=_start_expected_s(stands, now_s),
        nodes=attempt.nodes if attempt is not None else (),
        ranks=attempt.ranks if attempt is not None else 0,
        slowest_rank=beats.rank,
        silent_s=beats.silent_s,
        updated_s=None if numbers.time_s is None else max(0.0, now_s - numbers.time_s),
    )


def _has_begun(stands: Standing, numbers: Numbers, beats: "Beats") -> bool:
    """Whether the newest attempt has come to its first step, as far as anything tells."""
    start_s = stands.attempt.start_s if stands.attempt is not None else None
    return beats.stepped or start_s is None or (numbers.time_s is not None and numbers.time_s >= start_s)


@dataclass(frozen=True, slots=True)
class Beats:
    """The newest signs of life of a job: the last step of the slowest rank, and who is silent."""

    step: int | None = None
    rank: int | None = None
    silent_s: float | None = None
    stepped: bool = False
    """Whether every rank is past its start."""


def read_beats(folder: RunFolder, stands: Standing) -> Beats:
    """What the supervisors of a running job wrote last of their ranks."""
    if stands.state not in ("training", "stopping") or stands.attempt is None:
        return Beats()
    steps: list[int] = []
    silent: list[tuple[float, int]] = []
    phases: set[str] = set()
    for path in (folder.jobs / stands.attempt.job).glob("beats_node_*.json"):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts["attempt"] != stands.attempt.attempt:
                continue
            for rank, life in facts["ranks"].items():
                steps.append(int(life["step"]))
                silent.append((float(life["silent_s"]), int(rank)))
                phases.add(str(life.get("phase", "step")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    longest = max(silent, default=(0.0, 0))
    quiet = longest[0] > SILENT_S
    stepped = bool(phases) and not phases & {"", "start"}
    return Beats(min(steps, default=None), longest[1] if quiet else None, longest[0] if quiet else None, stepped)


def run_folders(texts: Sequence[str], runs_folder: Path) -> list[RunFolder]:
    """The named runs and those of named sweeps (folders, or names below `runs_folder`); all there are for no name."""
    if texts:
        return [folder for text in texts for folder in find_runs(text, runs_folder)]
    found = sorted(path.parent for path in runs_folder.glob("*/config.yaml"))
    return [RunFolder(path.absolute()) for path in found]


def find_runs(text: str, runs_folder: Path) -> list[RunFolder]:
    """A run, or the runs of a sweep that have been submitted, by its folder or by its name."""
    for path in (Path(text), runs_folder / text):
        if (runs := runs_of_sweep(path)) is not None:
            return [RunFolder(run) for run in runs if (run / "config.yaml").is_file()]
    return [find_run(text, runs_folder)]


def find_run(text: str, runs_folder: Path) -> RunFolder:
    """A run by its folder or by its name. Raises ConfigError naming near ones."""
    for path in (Path(text), runs_folder / text):
        if (runs := runs_of_sweep(path)) is not None:
            names = ", ".join(run.name for run in runs[:4]) + (", ..." if len(runs) > 4 else "")
            raise ConfigError(f"{text}: is a sweep of {len(runs)} runs; name one of them: {names}")
        if (path / "config.yaml").is_file() or (path / "jobs").is_dir():
            return RunFolder(path.absolute())
    raise _unknown_run(text, runs_folder)


def table(rows: Sequence[Status]) -> list[str]:
    """One line a run."""
    return sweep_table([_row(status) for status in rows])


def details(status: Status) -> list[str]:
    """One run in a few lines."""
    lines = [f"{status.run}: {status.state}, {status.why}" if status.why else f"{status.run}: {status.state}"]
    if status.job:
        on = f" on {_hosts(status.nodes)}, {status.ranks} ranks" if status.nodes else ""
        lines.append(f"  job     {status.job}{on}; {status.attempts} attempt(s) so far")
    lines.append(f"  step    {_steps(status)}{f', {status.images_per_s:,.0f} images/s' if status.images_per_s else ''}")
    if status.newest_commit is not None:
        lines.append(f"  saved   step {status.newest_commit}")
    if status.top1 is not None:
        lines.append(f"  top-1   {status.top1:.2f} %")
    if status.eta_s is not None:
        more = f", {status.eta_jobs} more job(s) and their waiting counted" if status.eta_jobs else ""
        lines.append(f"  left    {duration(status.eta_s)}{more}")
    if status.start_expected_s is not None:
        lines.append(f"  starts  in {duration(status.start_expected_s)}, SLURM expects")
    if status.queue_wait_s is not None:
        lines.append(f"  queue   {duration(status.queue_wait_s)} a start so far")
    if status.slowest_rank is not None and status.silent_s is not None:
        lines.append(f"  silent  rank {status.slowest_rank} for {duration(status.silent_s)}")
    return lines


def as_json(status: Status) -> dict[str, Any]:
    return asdict(status)


def _eta(
    stands: Standing,
    numbers: Numbers,
    step: int | None,
    plan: tuple[int, int] | None,
    wait_s: float | None,
    time_minutes: float | None,
    now_s: float,
) -> tuple[float | None, int | None]:
    """Seconds to the last step and further jobs, at the present rate; each further job waits as long as the mean."""
    if not stands.is_live or plan is None or not numbers.images_per_s or step is None:
        return None, None
    training_s = max(0, plan[0] - step) * plan[1] / numbers.images_per_s
    live = stands.live
    if live is None:
        return training_s, 0
    left_s = live.end_s - now_s if live.end_s is not None and not live.waits else math.inf
    first_wait_s = 0.0
    if live.waits:
        left_s = time_minutes * 60 if time_minutes else math.inf
        expected_s = None if live.start_s is None else live.start_s - now_s
        first_wait_s = max(0.0, expected_s if expected_s is not None else wait_s or 0.0)
    if training_s <= left_s:
        return first_wait_s + training_s, 0
    per_job_s = time_minutes * 60 if time_minutes else max(60.0, left_s)
    jobs = math.ceil((training_s - max(0.0, left_s)) / per_job_s)
    return first_wait_s + training_s + jobs * (wait_s or 0.0), jobs


def _time_minutes(folder: RunFolder) -> float | None:
    from launch.submitted import read_submitted

    entries = [entry for entry in read_submitted(folder) if entry.executor == "slurm"]
    return entries[-1].time_minutes if entries else None


def _start_expected_s(stands: Standing, now_s: float) -> float | None:
    live = stands.live
    return max(0.0, live.start_s - now_s) if live is not None and live.waits and live.start_s is not None else None


def _words(folder: RunFolder, stands: Standing, attempts: Sequence[Attempt]) -> str:
    if stands.state in ("failed", "lost"):
        cause = cause_of(folder, stands, attempts)
        return f"{cause.kind}: {cause.says}"
    if stands.state == "queued":
        return queue_words(stands.why)
    return "" if stands.why in ("running", "done") else stands.why


def _row(status: Status) -> dict[str, str]:
    return {
        "run": status.run,
        "state": status.state,
        "job": status.job or "-",
        "step": _steps(status),
        "images/s": f"{status.images_per_s:,.0f}" if status.images_per_s else "-",
        "left": duration(status.eta_s) if status.eta_s is not None else "-",
        "saved": str(status.newest_commit) if status.newest_commit is not None else "-",
        "why": status.why if len(status.why) <= 70 else status.why[:67] + "...",
    }


def _steps(status: Status) -> str:
    if status.step is None:
        return f"0 of {status.total_steps}" if status.total_steps else "-"
    if not status.total_steps:
        return str(status.step)
    return f"{status.step} of {status.total_steps} ({status.step / status.total_steps:.0%})"


def _hosts(nodes: Sequence[str]) -> str:
    return ", ".join(nodes) if len(nodes) <= 4 else f"{nodes[0]} ... {nodes[-1]} ({len(nodes)} nodes)"


def _unknown_run(text: str, runs_folder: Path) -> Exception:
    import difflib

    names = sorted(path.parent.name for path in runs_folder.glob("*/config.yaml"))
    near = difflib.get_close_matches(Path(text).name, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; runs below {runs_folder}: {', '.join(names[:8]) or 'none'}"
    return ConfigError(f"{text}: is no run folder and no run's name{hint}")
