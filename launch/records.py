"""One JSON a job of a run: which nodes, from when to when, why it ended.

In: facts of the supervisor. Out: `jobs/<job>.json`, which followers and later commands read. Submitit's own result
files are pickles and are never read.
"""

import json
import os
import socket
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Facts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class JobRecord:
    """What a supervisor says of its job; `end` is None while it runs."""

    job: str
    attempt: int
    host: str
    nodes: tuple[str, ...]
    node_rank: int
    ranks: int
    """Ranks on all nodes."""
    supervisor_pid: int
    start: str
    end: str | None = None
    exit_code: int | None = None
    failed_rank: int | None = None
    why: str = "running"
    earlier: tuple[Facts, ...] = ()
    """Records of the same job before it was requeued, oldest first."""

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
    return replace(record, earlier=(*earlier, facts))


def write_record(path: Path, record: JobRecord) -> None:
    """Replace the record at `path` as a whole: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(asdict(record), file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_record(path: Path) -> JobRecord | None:
    """The record at `path`, or None where there is none yet. Raises ValueError for a file that is no record."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    try:
        facts["nodes"], facts["earlier"] = tuple(facts["nodes"]), tuple(facts["earlier"])
        return JobRecord(**facts)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: is not a job record ({error})") from None
