"""What SLURM says of jobs: those that wait or run, and how the others ended. It may know nothing, or not answer.

In: job ids. Out: `LiveJob`s from one squeue call; an `Ending` from scontrol (minutes after the end), else sacct (where
there is an accounting database), else nothing. Times are Unix seconds.
"""

import functools
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ANSWER_WITHIN_S = 4.0
FINAL = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
)
_NOT_FINAL = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED", "STOPPED", "RESIZING")
_FORMAT = "%i|%A|%T|%r|%V|%S|%e|%E|%N|%o"


@dataclass(frozen=True, slots=True)
class LiveJob:
    """One job that SLURM has waiting or running."""

    job: str
    raw_id: str
    """SLURM_JOB_ID on the node; another than `job` only for an element of an array."""
    state: str
    reason: str
    submitted_s: float | None
    start_s: float | None
    """When it started; of a waiting job when SLURM expects it to, if it says so."""
    end_s: float | None
    """When its time limit ends it."""
    dependency: str
    nodes: str
    script: str
    """The file that was given to sbatch."""

    @property
    def waits(self) -> bool:
        return self.state in ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")

    def belongs_to(self, folder: Path) -> bool:
        """Whether it was submitted from this folder, of a run or of a sweep, by whatever name either goes."""
        if self.script.startswith(f"{folder}/jobs/"):
            return True
        script = Path(self.script)
        return script.is_absolute() and _resolved(script.parent).is_relative_to(_resolved(folder))


@dataclass(frozen=True, slots=True)
class Ending:
    """How SLURM says that a job ended. `state` is one word of `FINAL`."""

    state: str
    reason: str = ""
    exit_code: int | None = None
    signal: int = 0
    end_s: float | None = None
    source: str = ""


@functools.lru_cache(maxsize=4096)
def _resolved(path: Path) -> Path:
    """Remembered: every element of an array is compared with every run."""
    return path.resolve()


def live_jobs() -> list[LiveJob] | None:
    """All jobs of this user that wait or run; None where there is no SLURM or it does not answer in time."""
    text = ask(["squeue", "--noheader", "--array", f"--user={os.getuid()}", f"--format={_FORMAT}"])
    if text is None:
        return None
    return [job for line in text.splitlines() if (job := _live(line)) is not None]


def ending(job: str) -> Ending | None:
    """How `job` ended, if SLURM still knows. None while it may go on."""
    if not re.fullmatch(r"\d+(_\d+)?", job):
        return None
    shown = ask(["scontrol", "--oneliner", "show", "job", job])
    if shown and (found := _from_scontrol(shown)) is not None:
        return found
    kept = ask(["sacct", f"--jobs={job}", "--allocations", "--noheader", "--parsable2", "--format=State,ExitCode,End"])
    return _from_sacct(kept) if kept else None


def may_go_on(job: str) -> bool:
    """Whether SLURM still has the job waiting, running or to be run again. An unanswered question counts as yes."""
    command = ["squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return True
    if done.returncode:
        return "Invalid job id" not in done.stderr
    return done.stdout.strip() in _NOT_FINAL


def ask(command: Sequence[str]) -> str | None:
    """What a command of SLURM prints; None where it is missing, fails or takes too long."""
    environ = {**os.environ, "SLURM_TIME_FORMAT": "%s"}
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=ANSWER_WITHIN_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _live(line: str) -> LiveJob | None:
    parts = line.strip().split("|", 9)
    if len(parts) != 10:
        return None
    job, raw_id, state, reason, submitted, start, end, dependency, nodes, script = parts
    if state in FINAL:  # squeue shows a job for a moment after its end
        return None
    times = (_seconds(submitted), _seconds(start), _seconds(end))
    return LiveJob(job, raw_id, state, reason, *times, dependency, nodes, script)


def _from_scontrol(text: str) -> Ending | None:
    fields = dict(re.findall(r"(\w+)=(\S*)", text))
    state = fields.get("JobState", "")
    if state not in FINAL:
        return None
    code, signal = _exit_code(fields.get("ExitCode", ""))
    return Ending(state, fields.get("Reason", ""), code, signal, _seconds(fields.get("EndTime", "")), "scontrol")


def _from_sacct(text: str) -> Ending | None:
    state, code_text, end = (*text.splitlines()[-1].split("|"), "", "", "")[:3]
    word = state.split(" ")[0]  # "CANCELLED by 0"
    if word not in FINAL:
        return None
    code, signal = _exit_code(code_text)
    return Ending(word, state.removeprefix(word).strip(), code, signal, _seconds(end), "sacct")


def _exit_code(text: str) -> tuple[int | None, int]:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (None, 0)


def _seconds(text: str) -> float | None:
    return float(text) if text.isdigit() else None
