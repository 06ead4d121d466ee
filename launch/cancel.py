"""End a run's jobs, or those of all runs of a sweep: `python -m launch cancel RUN [--save]`.

In: run folders. Out: what was ended, in words. A note is left before any signal, so that no supervisor takes the stop
for a preemption and goes on by itself. SLURM's own state is never waited for without end.
"""

import contextlib
import getpass
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ii_dist.config import ClusterError, RunFolder, UserError
from launch.history import read_attempts
from launch.owner import its_job_has_gone, jobs_of, last_submitted, local_job_lives, read_lease
from launch.processes import started_ticks
from launch.records import now_text
from launch.scheduler import LiveJob

AGAIN_S = 1.2
"""Between the two SIGTERM that mean: now. Sooner, a supervisor takes the second for the first."""
GONE_WITHIN_S = 8.0


@dataclass(frozen=True, slots=True)
class Cancelled:
    """What was done to one job."""

    job: str
    how: str


def cancel_all(
    folders: Sequence[RunFolder], live: Sequence[LiveJob] | None, save: bool
) -> tuple[list[Cancelled], list[UserError]]:
    """End the jobs of several runs; what could not be done to one does not keep the others.

    Those that wait come first: elements of an array would start in places that become free.
    """
    done: list[Cancelled] = []
    errors: list[UserError] = []
    for folder in sorted(folders, key=lambda folder: not any(job.waits for job in jobs_of(folder, live))):
        try:
            done += cancel(folder, live, save)
        except UserError as error:
            errors.append(error)
    return done, errors


def cancel(folder: RunFolder, live: Sequence[LiveJob] | None, save: bool) -> list[Cancelled]:
    """End every job of the run: asked to save and leave, or at once. Raises ClusterError where that cannot be done."""
    ours = jobs_of(folder, live)
    waiting_first = sorted(ours, key=lambda job: not job.waits)  # else one of them starts when the running one ends
    done = [_cancel_slurm(folder, job, save) for job in waiting_first]
    entry = last_submitted(folder)
    if entry is not None and local_job_lives(entry):
        done.append(_cancel_local(folder, entry.job, entry.pid, entry.pid_ticks, save))
    if done:
        return done
    if live is None and entry is not None and entry.executor == "slurm":
        raise ClusterError(f"{folder.root}: squeue does not answer; cancel job {entry.job} where SLURM is")
    lease = read_lease(folder)
    if lease is not None and lease.alive and not its_job_has_gone(lease, live, entry):
        raise ClusterError(
            f"{folder.root}: process {lease.pid} on {lease.host} trains there without launch; there: kill {lease.pid}"
        )
    return []


def _cancel_slurm(folder: RunFolder, job: LiveJob, save: bool) -> Cancelled:
    _leave_note(folder, job.job)
    if job.waits or not save:
        _scancel([job.job])
        return Cancelled(job.job, "taken out of the queue" if job.waits else "ended")
    # To the step, where the supervisors are: the batch shell would die of it. An element's step is named: while other
    # elements wait, SLURM 22.05 signals one that goes by its own name again and again, and then says that it cannot.
    _scancel(["--signal=USR2", f"{job.job}.0" if "_" in job.job else job.job])
    return Cancelled(job.job, "asked to save and leave")


def _cancel_local(folder: RunFolder, job: str, controller_pid: int, ticks: int, save: bool) -> Cancelled:
    """A local job ends by SIGTERM once it has saved, by a second one at once."""
    _leave_note(folder, job)
    target = _supervisor_pid(folder, job) or controller_pid
    _signal(target, signal.SIGTERM)
    if save:
        return Cancelled(job, "asked to save and leave")
    if not _gone(controller_pid, ticks, AGAIN_S):
        _signal(target, signal.SIGTERM)
        if not _gone(controller_pid, ticks, GONE_WITHIN_S):
            _signal(target, signal.SIGKILL)
            _gone(controller_pid, ticks, GONE_WITHIN_S)
    return Cancelled(job, "ended")


def _leave_note(folder: RunFolder, job: str) -> None:
    place = folder.jobs / job
    facts = {"time": now_text(), "by": _user()}
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = place / f".cancel.json.{os.getpid()}"
        partial.write_text(json.dumps(facts) + "\n", encoding="utf-8")
        partial.replace(place / "cancel.json")
    except OSError as error:
        raise ClusterError(
            f"{place}: no note can be left there ({error.strerror}), so the run would go on by itself; scancel {job}"
        ) from None


def _scancel(arguments: Sequence[str]) -> None:
    try:
        done = subprocess.run(["scancel", *arguments], capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        raise ClusterError("scancel is not on the PATH: cancel from a login node") from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"scancel {' '.join(arguments)} does not answer; try again") from None
    if done.returncode:
        raise ClusterError(f"scancel {' '.join(arguments)}: {' '.join(done.stderr.split())}")


def _supervisor_pid(folder: RunFolder, job: str) -> int | None:
    """The job's supervisor on this machine, where it has begun."""
    record = next((attempt for attempt in reversed(read_attempts(folder)) if attempt.job == job), None)
    if record is None or record.end_s is not None or started_ticks(record.supervisor_pid) is None:
        return None
    return record.supervisor_pid


def _signal(pid: int, signum: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def _gone(pid: int, ticks: int, limit_s: float) -> bool:
    until_s = time.monotonic() + limit_s
    while started_ticks(pid) == ticks:
        if time.monotonic() > until_s:
            return False
        time.sleep(0.1)
    return True


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
