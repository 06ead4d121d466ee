"""Who has a run folder: a job that waits, runs or is being submitted, or a process that trains in it.

In: a run folder and what SLURM says. Out: the owner in words, or nothing; a lock that lets one submission through at a
time. The training itself holds `lease.json`, with a fence; this asks earlier, so that no job waits in vain.
"""

import contextlib
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ii_dist.config import ClusterError, RunFolder
from launch.processes import started_ticks
from launch.scheduler import LiveJob
from launch.submitted import Submitted, read_submitted

_SLURM_ID = re.compile(r"\d+(_\d+)?")
LOCK_WAIT_S = 3.0
HEARTBEAT_DEAD_S = 60.0
"""As the lease itself judges an owner on another machine."""


@dataclass(frozen=True, slots=True)
class Lease:
    """What `lease.json` says of the process that trains, and whether it lives."""

    job: str
    host: str
    pid: int
    since: str
    fence: int
    alive: bool


def require_free(folder: RunFolder, live: Sequence[LiveJob] | None) -> None:
    """Raise ClusterError where another job has the run folder, naming it; live: None where SLURM did not answer."""
    advice = f"wait for it, end it with: python -m launch cancel {folder.root}, or give this run another name=..."
    for job in jobs_of(folder, live):
        since = "" if job.submitted_s is None else f", submitted {_utc(job.submitted_s)}"
        raise ClusterError(f"run folder {folder.root}: has job {job.job} ({job.state.lower()}{since}); {advice}")
    if (entry := last_submitted(folder)) is not None and local_job_lives(entry):
        raise ClusterError(
            f"run folder {folder.root}: has job {entry.job} on {entry.host}, pid {entry.pid}, since {entry.submitted}; "
            f"{advice}"
        )
    lease = read_lease(folder)
    if lease is not None and lease.alive and its_job_has_gone(lease, live, entry):
        raise ClusterError(
            f"run folder {folder.root}: job {lease.job} has ended, but {lease.host} gave a sign of life of it less than"
            f" {HEARTBEAT_DEAD_S:.0f} s ago; submit again after that time"
        )
    if lease is not None and lease.alive:
        raise ClusterError(
            f"run folder {folder.root}: in use by job {lease.job} on host {lease.host}, pid {lease.pid}, since "
            f"{lease.since}; {advice}"
        )
    if live is None and entry is not None and entry.executor == "slurm" and not _has_ended(folder, entry.job):
        raise ClusterError(
            f"run folder {folder.root}: squeue does not answer, so job {entry.job} of it may still wait or run; "
            "submit where SLURM answers"
        )


def jobs_of(folder: RunFolder, live: Sequence[LiveJob] | None) -> list[LiveJob]:
    """The run's own among these jobs: submitted from its folder, or its elements of the arrays of its sweeps."""
    sweeps = {entry.job: Path(entry.sweep) for entry in read_submitted(folder) if entry.sweep}
    return [
        job
        for job in live or ()
        if job.belongs_to(folder.root) or (job.job in sweeps and job.belongs_to(sweeps[job.job]))
    ]


def its_job_has_gone(lease: Lease, live: Sequence[LiveJob] | None, entry: Submitted | None) -> bool:
    """Whether SLURM says that the owner's job is over, whatever its last sign of life was."""
    of_slurm = entry is not None and entry.executor == "slurm" and bool(_SLURM_ID.fullmatch(lease.job))
    return of_slurm and live is not None and all(lease.job not in (job.job, job.raw_id) for job in live)


def last_submitted(folder: RunFolder) -> Submitted | None:
    entries = read_submitted(folder)
    return entries[-1] if entries else None


def local_job_lives(entry: Submitted) -> bool:
    """Whether the process of a job on this machine is still there; False for jobs of other machines."""
    if not entry.pid or entry.host != socket.gethostname():
        return False
    ticks = started_ticks(entry.pid)
    return ticks is not None and ticks == entry.pid_ticks


def read_lease(folder: RunFolder) -> Lease | None:
    """The owner in lease.json unless it was given back; None where there is none or it is no lease."""
    try:
        facts: dict[str, Any] = json.loads(folder.lease.read_text(encoding="utf-8"))
        if facts["released"]:
            return None
        facts = {name: facts[name] for name in ("job", "host", "pid", "since", "fence")} | {
            "alive": _lives(folder, facts)
        }
        return Lease(**facts)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lives(folder: RunFolder, facts: dict[str, Any]) -> bool:
    here = (socket.gethostname(), _read("/proc/sys/kernel/random/boot_id"), _link("/proc/self/ns/pid"))
    if (facts["host"], facts["boot"], facts["pid_namespace"]) == here:
        ticks = started_ticks(facts["pid"])
        return ticks is not None and ticks == facts["started_ticks"]
    try:
        last_s = (folder.root / f".heartbeat_fence_{facts['fence']:06d}").stat().st_mtime
    except OSError:
        return False
    return time.time() - last_s < HEARTBEAT_DEAD_S


@contextlib.contextmanager
def one_submission(folder: RunFolder) -> Iterator[None]:
    """Hold the run folder against another submission. Raises ClusterError when one is under way for seconds."""
    path = folder.root / ".submit.lock"
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        until_s = time.monotonic() + LOCK_WAIT_S
        while not _locked(file):
            if time.monotonic() > until_s:
                raise ClusterError(
                    f"run folder {folder.root}: another submission is under way; look with launch status"
                )
            time.sleep(0.05)
        yield
    finally:
        os.close(file)


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: the lease still decides, when the jobs run
    return True


def _has_ended(folder: RunFolder, job: str) -> bool:
    try:
        return json.loads(folder.job(job).read_text(encoding="utf-8"))["end"] is not None
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(seconds))


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return ""
