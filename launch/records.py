"""One JSON a job of a run: which nodes, from when to when, how far it came, why it ended.

In: facts of the supervisors. Out: files that followers and later commands read. Submitit's own result files are pickles
and are never read. Written by the supervisors, below the run folder:

    jobs/<job>.json                    the `JobRecord` of node 0, which is the job's
    jobs/<job>_node_00001.json         those of the other nodes, what concerns the whole job left at its default
    jobs/<job>/beats_node_00000.json   what the ranks of a node did last (`BEATS`), each few seconds
    jobs/<job>/preflight.json          what the check of the nodes measured, where it was asked for

and by whoever cancels, before the signal:

    jobs/<job>/cancel.json             {"time": ISO, "by": user}: the stop that comes is the end, do not requeue

An attempt is one start of the job by SLURM (SLURM_RESTART_COUNT); a restart is one new start of the ranks inside an
attempt. `end` None: still running, or the supervisor died with its node; the next attempt of the same job then closes
the record among its `earlier` ones (preempted where a stop had been asked for, else node_failure).
"""

import json
import os
import socket
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ii_dist.config import RunFolder
from ii_dist.config.run_folder import parse_step

Facts = dict[str, Any]
EndedAs = Literal[
    "",  # still running
    "finished",  # the last step is committed
    "stopped",  # a person asked, or train.stop_after_steps
    "time_limit",
    "preempted",
    "node_failure",  # a node or its supervisor was lost
    "out_of_memory",  # the kernel killed a rank for its memory, or an allocation failed on the GPU or the host
    "killed_rank",  # a rank died of a signal
    "hang",  # failed_rank is the first silent one
    "nan",
    "disk_full",
    "bad_data",
    "bad_config",
    "bad_checkpoint",
    "exception",  # failed_rank is the first to fail, last_line its last words
    "environment",  # port, network, missing package: exit code 5
    "launch",  # the ranks were never started
]
BEATS = """{"job", "attempt", "restart", "node_rank", "host", "time": ISO, "ranks": {"<rank>": {"pid", "phase", "step",
"silent_s": seconds since its last sign of life, "step_p50_s": null before the first steps, "save_s": longest save}}}"""


@dataclass(frozen=True, slots=True)
class JobRecord:
    """What a supervisor says of its job; `end` is None while it runs."""

    job: str
    attempt: int
    """How often SLURM has started this job before (SLURM_RESTART_COUNT)."""
    host: str
    nodes: tuple[str, ...]
    node_rank: int
    ranks: int
    """Ranks on all nodes."""
    supervisor_pid: int
    start: str
    """UTC, ISO, as all times here."""
    end: str | None = None
    exit_code: int | None = None
    """Of the run: 0, 1 to 5, 75, 128 + signal."""
    failed_rank: int | None = None
    """The first rank to fail, or to fall silent."""
    why: str = "running"
    """One line for people."""
    earlier: tuple[Facts, ...] = ()
    """Records of the same job before it was requeued, oldest first."""
    ended_as: EndedAs = ""
    last_line: str = ""
    """The failing rank's last words."""
    failed_host: str = ""
    restarts: int = 0
    """Starts of the ranks inside this attempt after the first."""
    rounds: tuple[Facts, ...] = ()
    """How each ended start of the ranks went, oldest first: restart, start, end, exit_code, failed_rank, failed_host,
    why, ended_as, last_line, step_start, step_end."""
    barren_restarts: int = 0
    """Failures in a row after which no new checkpoint stood; carried over a requeue after a lost node."""
    step_start: int = 0
    """Newest committed step when this attempt began; 0 = none."""
    step_end: int | None = None
    """... and when it ended."""
    asked: str = ""
    """The request to stop, written when it arrives: SIGUSR2, SIGTERM, SIGINT, or "time" (the supervisor's own)."""
    time_limit: str = ""
    """When SLURM will end the job, where known."""
    requeued: str = ""
    """How the run goes on: "scontrol" = this job again, "job 123" = a dependent job, "" = it does not by itself."""
    excluded: tuple[str, ...] = ()
    """Hosts that the next attempt shall avoid, by the check of the nodes."""

    def ended(self, exit_code: int, failed_rank: int | None, why: str) -> "JobRecord":
        return replace(self, end=now_text(), exit_code=exit_code, failed_rank=failed_rank, why=why)


def now_text() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def new_record(job: str, attempt: int, nodes: tuple[str, ...], node_rank: int, ranks: int) -> JobRecord:
    return JobRecord(
        job=job,
        attempt=attempt,
        host=socket.gethostname(),
        nodes=nodes,
        node_rank=node_rank,
        ranks=ranks,
        supervisor_pid=os.getpid(),
        start=now_text(),
    )


def with_earlier(record: JobRecord, before: JobRecord | None) -> JobRecord:
    """The record of a requeued job, carrying what its earlier attempts said."""
    if before is None:
        return record
    facts = asdict(before)
    earlier = facts.pop("earlier")
    if before.end is None:
        facts.update(_closed(before))
    barren = before.barren_restarts if facts["ended_as"] == "node_failure" else 0
    return replace(record, earlier=(*earlier, facts), barren_restarts=barren)


def _closed(before: JobRecord) -> Facts:
    """What is known of an attempt whose supervisor could not say how it ended."""
    if before.asked:
        return {"ended_as": "preempted", "why": f"asked to stop ({before.asked}) and ended before it had"}
    return {"ended_as": "node_failure", "why": "a node was lost, or the job was requeued from outside"}


def supervisor_folder(folder: RunFolder, job: str) -> Path:
    """Where the supervisors of a job leave what is no record."""
    return folder.jobs / job


def beats_path(folder: RunFolder, job: str, node_rank: int) -> Path:
    return supervisor_folder(folder, job) / f"beats_node_{node_rank:05d}.json"


def cancel_path(folder: RunFolder, job: str) -> Path:
    return supervisor_folder(folder, job) / "cancel.json"


def preflight_path(folder: RunFolder, job: str) -> Path:
    return supervisor_folder(folder, job) / "preflight.json"


def newest_step(folder: RunFolder) -> int:
    """The newest committed step by its name (which only a commit makes); 0 = none. Reads no content."""
    try:
        names = [path.name for path in folder.checkpoints.iterdir()]
    except FileNotFoundError:
        return 0
    return max((step for name in names if (step := parse_step(name)) is not None), default=0)


def write_record(path: Path, record: JobRecord) -> None:
    write_json(path, asdict(record))


def write_json(path: Path, facts: Facts, durable: bool = True) -> None:
    """Replace the file at `path` as a whole: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(facts, file, indent=1)
        file.write("\n")
        file.flush()
        if durable:
            os.fsync(file.fileno())
    partial.replace(path)


def read_record(path: Path) -> JobRecord | None:
    """The record at `path`, or None where there is none yet. Raises ValueError for a file that is no record."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    try:
        for name in ("nodes", "earlier", "rounds", "excluded"):
            facts[name] = tuple(facts.get(name, ()))
        return JobRecord(**facts)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: is not a job record ({error})") from None
