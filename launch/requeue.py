"""How a run goes on after its job: SLURM starts the same job again, or a new job waits for the end of this one.

In: the id of the job that this process runs in. Out: when SLURM will end it, why it was asked to stop, and a requeue.
Every question has a time limit: a scheduler that does not answer must not keep a node from saving.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from ii_dist.config import ClusterError
from launch.records import EndedAs

ANSWER_WITHIN_S = 10.0
TRIES_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Waits between tries to requeue: the controller may be restarting."""
ASK_AGAIN_S = 60.0
LEAST_LEAD_S = 20.0
NEAR_LIMIT_S = 75.0
"""SLURM sends the signal before a time limit up to 60 s early, and looks at its clock every 30 s."""


def job_fields(job: str) -> dict[str, str]:
    """What `scontrol show job` says; nothing where it does not answer."""
    done = _ask(["scontrol", "--oneliner", "show", "job", job])
    return dict(re.findall(r"(\w+)=(\S*)", done.stdout)) if done is not None and done.returncode == 0 else {}


@dataclass(slots=True)
class JobClock:
    """When SLURM ends this job, and whether it is time to save."""

    job: str
    end_s: float | None
    """Unix time; None = no limit known."""
    fields_of: Callable[[str], dict[str, str]] = job_fields
    now: Callable[[], float] = time.time
    _asked_s: float = field(default=float("-inf"))

    @classmethod
    def of_job(cls, job: str, environ: Mapping[str, str]) -> "JobClock":
        """From SLURM_JOB_END_TIME (newer versions set it), else from scontrol."""
        text = environ.get("SLURM_JOB_END_TIME", "")
        return cls(job, float(text) if text.isdigit() else _seconds(job_fields(job).get("EndTime", "")))

    def due(self, lead_s: float) -> bool:
        """Whether a stop that takes `lead_s` must begin now. A limit that was moved meanwhile counts."""
        lead_s = max(lead_s, LEAST_LEAD_S)
        if self.end_s is None or self.now() < self.end_s - lead_s:
            return False
        if self.now() - self._asked_s > ASK_AGAIN_S:
            self._asked_s = self.now()
            self.end_s = _seconds(self.fields_of(self.job).get("EndTime", "")) or self.end_s
        return self.now() >= self.end_s - lead_s

    def near(self, signal_lead_s: float) -> bool:
        """Whether a signal now may be the one before the time limit."""
        return self.end_s is not None and self.now() > self.end_s - max(signal_lead_s, LEAST_LEAD_S) - NEAR_LIMIT_S

    def text(self) -> str:
        return "" if self.end_s is None else datetime.fromtimestamp(self.end_s).astimezone().isoformat("T", "seconds")


def reason_of_stop(asked: str, fields: Mapping[str, str], cancelled: bool, near_limit: bool) -> EndedAs:
    """Why SLURM, or a person through it, asked this job to stop."""
    state = fields.get("JobState", "")
    if cancelled or state == "CANCELLED":
        return "stopped"
    if fields.get("PreemptTime", "None") not in ("None", "Unknown", "N/A", "0") or state == "PREEMPTED":
        return "preempted"
    if near_limit or state == "TIMEOUT":
        return "time_limit"
    return "stopped" if asked == "SIGUSR2" else "preempted"


def requeue(
    job: str, submitit_folder: Path, avoid: Sequence[str] = (), wait: Callable[[float], None] = time.sleep
) -> str:
    """Have the run go on; "scontrol", or "job N" for a new job. Raises ClusterError where neither is possible.

    avoid: hosts that the next attempt shall not get, where SLURM lets a job say so.
    """
    words = ""
    for wait_s in (*TRIES_S, None):
        if avoid:
            _exclude(job, avoid)
        done = _ask(["scontrol", "requeue", job])
        if done is not None and done.returncode == 0:
            return "scontrol"
        words = _words(done)
        if done is None or wait_s is None or not _may_pass(words):
            break
        wait(wait_s)
    return _submit_again(job, submitit_folder, words, avoid)


def _submit_again(job: str, folder: Path, words: str, avoid: Sequence[str]) -> str:
    """Submit the job's own script once more, to start when this job has ended."""
    array, _, element = job.partition("_")
    script, submitted = folder / f"{array}_submission.sh", folder / f"{job}_submitted.pkl"
    if not script.is_file() or not submitted.is_file():
        raise ClusterError(f"job {job} not requeued ({words}), and {script} is not there to submit it again")
    command = ["sbatch", "--parsable", f"--dependency=afterany:{job}"]
    if avoid:
        command.append(f"--exclude={','.join(avoid)}")
    if element:  # the script asks for the whole array
        command.append(f"--array={element}")
    done = _ask([*command, str(script)], without_job=True)
    if done is None or done.returncode:
        raise ClusterError(f"job {job} not requeued ({words}), nor submitted again ({_words(done)})")
    new = done.stdout.strip().partition(";")[0]
    if not new.isdigit():
        raise ClusterError(f"job {job}: sbatch answered {done.stdout.strip()!r}, which is no job")
    again = f"{new}_{element}" if element else new
    shutil.copy2(submitted, folder / f"{again}_submitted.pkl")  # where Submitit's task looks for what it shall run
    shutil.copy2(script, folder / f"{new}_submission.sh")
    return f"job {again}"


def _exclude(job: str, hosts: Sequence[str]) -> None:
    before = job_fields(job).get("ExcNodeList", "")
    named = [] if before in ("", "(null)") else [before]
    _ask(["scontrol", "update", f"jobid={job}", f"excnodelist={','.join([*named, *hosts])}"])


def _may_pass(words: str) -> bool:
    """Whether the controller was only away. Other refusals (requeue disabled, not the owner) stay as they are."""
    return bool(re.search(r"Unable to contact|Connection|timed out|Socket|not responding", words, re.IGNORECASE))


def _ask(command: Sequence[str], without_job: bool = False) -> subprocess.CompletedProcess[str] | None:
    environ = {
        name: value
        for name, value in os.environ.items()
        if not (without_job and re.match(r"SLURM_|SBATCH_|SUBMITIT_", name) and name != "SLURM_CONF")
    }
    environ["SLURM_TIME_FORMAT"] = "%s"
    try:
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=ANSWER_WITHIN_S)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(list(command), 1, "", "timed out")
    except OSError:
        return None


def _words(done: subprocess.CompletedProcess[str] | None) -> str:
    if done is None:
        return "the command is not on this node's PATH"
    return " ".join((done.stderr or done.stdout).split())[:200] or f"exit code {done.returncode}"


def _seconds(text: str) -> float | None:
    return float(text) if text.isdigit() else None
