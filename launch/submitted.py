"""One line a submission in `jobs/submitted.jsonl`: the only trace of a job that still waits in a queue.

In: facts of whoever submits. Out: `Submitted`s, oldest first.
"""

import contextlib
import json
import os
import socket
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ii_dist.config import RunFolder
from launch.processes import started_ticks
from launch.records import now_text


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that was asked for. `pid` is that of the process on this machine that runs a local job, 0 on SLURM."""

    job: str
    executor: str
    host: str
    submitted: str
    nodes: int
    ranks_per_node: int
    time_minutes: int = 0
    code: str = ""
    """Name of the folder below code/, of the run or of the sweep."""
    pid: int = 0
    pid_ticks: int = 0
    sweep: str = ""
    """Folder of the sweep whose job array it is an element of."""


def note_submitted(folder: RunFolder, job: str, executor: str, pid: int = 0, **facts: Any) -> None:
    """Append a line for a job that was just handed over. The line is one write: a reader sees all of it or nothing."""
    entry = Submitted(
        job=job,
        executor=executor,
        host=socket.gethostname(),
        submitted=now_text(),
        pid=pid,
        pid_ticks=(started_ticks(pid) or 0) if pid else 0,
        **facts,
    )
    _append(folder, entry)


def note_again(folder: RunFolder, job: str, new: str) -> None:
    """Append a line for `new`, which goes on where `job` was submitted before."""
    entry = next((entry for entry in reversed(read_submitted(folder)) if entry.job == job), None)
    if entry is not None:
        with contextlib.suppress(OSError):  # the job is there all the same
            _append(folder, replace(entry, job=new, host=socket.gethostname(), submitted=now_text()))


def submitit_folder(folder: RunFolder, job: str) -> Path:
    """Where Submitit's files of a job of this run lie: its own, or those of the sweep that it was submitted with."""
    sweep = next((entry.sweep for entry in read_submitted(folder) if entry.job == job), "")
    return (RunFolder(Path(sweep)) if sweep else folder).jobs / "submitit"


def _append(folder: RunFolder, entry: Submitted) -> None:
    file = os.open(folder.submitted, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(file, json.dumps(asdict(entry)).encode() + b"\n")
    finally:
        os.close(file)


def read_submitted(folder: RunFolder) -> list[Submitted]:
    """All submissions of a run, oldest first; lines of another version or torn ones are left out."""
    return [entry for line in _lines(folder.submitted) if (entry := _entry(line)) is not None]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _entry(line: str) -> Submitted | None:
    known = {field.name for field in fields(Submitted)}
    try:
        facts = json.loads(line)
        return Submitted(**{name: value for name, value in facts.items() if name in known})
    except (ValueError, TypeError, AttributeError):
        return None
