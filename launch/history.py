"""A run as a chain of attempts: what its supervisors, its submitters and SLURM say, joined.

In: a run folder, the live jobs of this user. Out: `Attempt`s, oldest first, and a `Standing`: what the run does now.
Records of any version are read: what a record does not say is left open.
"""

import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from ii_dist.config import RunFolder
from ii_dist.config.errors import EXIT_DONE, EXIT_STOPPED
from launch.numbers import newest_commit, total_steps
from launch.owner import its_job_has_gone, jobs_of, local_job_lives, read_lease
from launch.records import cancel_path
from launch.scheduler import Ending, LiveJob, ending
from launch.submitted import Submitted, read_submitted

State = Literal["queued", "starting", "training", "stopping", "requeued", "done", "stopped", "failed", "lost", "new"]
"""lost: its supervisor ended without a word. new: never submitted."""
LIVE_STATES = ("queued", "starting", "training", "stopping", "requeued")
_NODE_RECORD = re.compile(r"(.+)_node_(\d{5})\.json")
_CLASS_OF_STATE = {
    "TIMEOUT": "time_limit",
    "DEADLINE": "time_limit",
    "PREEMPTED": "preempted",
    "NODE_FAIL": "node_failure",
    "BOOT_FAIL": "node_failure",
    "OUT_OF_MEMORY": "out_of_memory",
    "CANCELLED": "cancelled",
    "COMPLETED": "finished",
}


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of a job by SLURM or on this machine. Times are Unix seconds; steps are committed ones."""

    job: str
    attempt: int
    host: str = ""
    nodes: tuple[str, ...] = ()
    ranks: int = 0
    supervisor_pid: int = 0
    start_s: float | None = None
    end_s: float | None = None
    exit_code: int | None = None
    failed_rank: int | None = None
    failed_host: str = ""
    why: str = ""
    ended_as: str = ""
    last_line: str = ""
    asked: str = ""
    restarts: int = 0
    rounds: tuple[dict[str, Any], ...] = ()
    step_start: int = 0
    step_end: int | None = None
    requeued: str = ""
    excluded: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Standing:
    """What a run does now."""

    state: State
    why: str
    job: str = ""
    live: LiveJob | None = None
    """What SLURM says of its job, where it has one."""
    ended: Ending | None = None
    """What SLURM says of its last job, where it has ended and SLURM was asked."""
    attempt: Attempt | None = None
    """The newest one."""

    @property
    def is_live(self) -> bool:
        return self.state in LIVE_STATES


def read_attempts(folder: RunFolder) -> list[Attempt]:
    """Every attempt that a supervisor has written down, oldest first."""
    found: list[Attempt] = []
    for path in _job_records(folder):
        facts = _read_json(path)
        if facts is None:
            continue
        found += [_attempt(earlier) for earlier in facts.get("earlier") or ()]
        found.append(_attempt(facts))
    return sorted(found, key=lambda attempt: (attempt.start_s or 0.0, attempt.attempt))


def node_records(folder: RunFolder, job: str) -> list[Attempt]:
    """What the supervisors of a job's other nodes say."""
    paths = sorted(folder.jobs.glob(f"{job}_node_*.json")) if folder.jobs.is_dir() else []
    return [_attempt(facts) for path in paths if (facts := _read_json(path)) is not None]


def standing(folder: RunFolder, live: Sequence[LiveJob] | None, attempts: Sequence[Attempt]) -> Standing:
    """What the run does now. Asks SLURM of a job that has gone without a word."""
    newest = attempts[-1] if attempts else None
    ours = jobs_of(folder, live)
    if ours:
        return _in_slurm(folder, _first(ours), attempts)
    submitted = read_submitted(folder)
    last = submitted[-1] if submitted else None
    if last is not None and local_job_lives(last):
        return _on_this_machine(folder, last, attempts)
    lease = read_lease(folder)
    if lease is not None and lease.alive and not its_job_has_gone(lease, live, last):
        started = newest if newest is not None and newest.job == lease.job else None
        return Standing(
            "training", f"process {lease.pid} on {lease.host} has the run folder", lease.job, attempt=started
        )
    if newest is None or (last is not None and last.job != newest.job and not _later(newest, last)):
        return _never_started(folder, last, live)
    if newest.end_s is not None:
        return _ended(folder, newest)
    told = ending(newest.job)
    if told is None:
        if live is None and last is not None and last.executor == "slurm":
            return Standing("lost", "squeue does not answer, and the record has no end", newest.job, attempt=newest)
        return Standing("lost", "its supervisor ended without a word", newest.job, attempt=newest)
    return Standing("failed", f"SLURM: {told.state.lower()}", newest.job, ended=told, attempt=newest)


def class_of(told: Ending) -> str:
    """SLURM's word for an end as a class of ours."""
    return _CLASS_OF_STATE.get(told.state, "lost")


def queue_waits_s(folder: RunFolder, attempts: Sequence[Attempt]) -> list[float]:
    """How long the run has waited for each start so far: after a submission, and after each requeue."""
    asked = {entry.job: _unix(entry.submitted) for entry in read_submitted(folder) if entry.executor == "slurm"}
    waits: list[float] = []
    before: Attempt | None = None
    for attempt in attempts:
        since = asked.get(attempt.job) if attempt.attempt == 0 else before.end_s if before is not None else None
        if since is not None and attempt.start_s is not None and attempt.job in asked:
            waits.append(max(0.0, attempt.start_s - since))
        before = attempt
    return waits


def _in_slurm(folder: RunFolder, job: LiveJob, attempts: Sequence[Attempt]) -> Standing:
    started = [attempt for attempt in attempts if attempt.job == job.job]
    newest = started[-1] if started else None
    earlier = attempts[-1] if attempts else None
    if job.waits:
        if earlier is None or not (started or job.dependency not in ("", "(null)")):
            return Standing("queued", job.reason, job.job, job)
        return Standing(
            "requeued", f"waits ({job.reason}) after: {earlier.why or 'a stop'}", job.job, job, None, earlier
        )
    if newest is None or (newest.start_s or 0.0) < (job.start_s or 0.0) - 1:
        return Standing("starting", "SLURM has started it", job.job, job, None, newest or earlier)
    if newest.end_s is not None:  # SLURM has not seen it yet
        return _ended(folder, newest)
    if newest.asked or job.state == "COMPLETING":
        return Standing("stopping", f"asked to stop ({newest.asked or 'SLURM'})", job.job, job, None, newest)
    return Standing("training", "running", job.job, job, None, newest)


def _on_this_machine(folder: RunFolder, entry: Submitted, attempts: Sequence[Attempt]) -> Standing:
    started = [attempt for attempt in attempts if attempt.job == entry.job]
    if not started:
        return Standing("starting", "its supervisor starts", entry.job)
    if started[-1].end_s is not None:
        return _ended(folder, started[-1])
    if started[-1].asked:
        return Standing("stopping", f"asked to stop ({started[-1].asked})", entry.job, attempt=started[-1])
    return Standing("training", "running", entry.job, attempt=started[-1])


def _never_started(folder: RunFolder, last: Submitted | None, live: Sequence[LiveJob] | None) -> Standing:
    if last is None:
        plan, commit = total_steps(folder), newest_commit(folder)
        if plan is not None and commit is not None:
            state: State = "done" if commit >= plan[0] else "stopped"
            return Standing(state, "trained without launch")
        return Standing("new", "never submitted")
    told = ending(last.job) if last.executor == "slurm" else None
    if told is not None:
        state = "stopped" if told.state == "CANCELLED" else "failed"
        return Standing(state, f"SLURM: {told.state.lower()} before its supervisor started", last.job, ended=told)
    if cancel_path(folder, last.job).exists():  # SLURM forgets an element of an array that never ran
        return Standing("stopped", "cancelled before its supervisor started", last.job)
    if live is None and last.executor == "slurm":
        return Standing("queued", "squeue does not answer", last.job)
    return Standing("lost", "ended before its supervisor started", last.job)


def _ended(folder: RunFolder, newest: Attempt) -> Standing:
    plan = total_steps(folder)
    if newest.exit_code == EXIT_DONE:
        return Standing("done", newest.why, newest.job, attempt=newest)
    if newest.exit_code == EXIT_STOPPED:
        if plan is not None and newest.step_end is not None and newest.step_end >= plan[0]:
            return Standing("done", "done", newest.job, attempt=newest)
        return Standing("stopped", newest.why, newest.job, attempt=newest)
    return Standing("failed", newest.why, newest.job, attempt=newest)


def _first(jobs: Sequence[LiveJob]) -> LiveJob:
    """The job that runs; of waiting ones the oldest: a dependent job waits for it."""
    return min(jobs, key=lambda job: (job.waits, job.submitted_s or 0.0))


def _later(attempt: Attempt, entry: Submitted) -> bool:
    """Whether an attempt of another job (a dependent one) began after this submission."""
    asked = _unix(entry.submitted)
    return asked is not None and attempt.start_s is not None and attempt.start_s > asked


def _job_records(folder: RunFolder) -> Iterable[Path]:
    try:
        return [p for p in folder.jobs.iterdir() if p.suffix == ".json" and not _NODE_RECORD.fullmatch(p.name)]
    except OSError:
        return []


_FIELDS = {field.name for field in fields(Attempt)}


def _attempt(facts: dict[str, Any]) -> Attempt:
    known = {name: value for name, value in facts.items() if name in _FIELDS and value is not None}
    for name in ("nodes", "rounds", "excluded"):
        known[name] = tuple(known.get(name, ()))
    known |= {"start_s": _unix(facts.get("start")), "end_s": _unix(facts.get("end"))}
    return Attempt(**{"job": "", "attempt": 0, **known})


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def _unix(text: object) -> float | None:
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return None


def ago(seconds: float | None) -> float | None:
    return None if seconds is None else max(0.0, time.time() - seconds)
