"""Why a run is not training: `python -m launch why RUN`.

In: a run folder and what SLURM says. Out: a `Cause`: one class, one sentence, what was seen, what to do. The records of
the supervisors come first, for they saw the ranks; where a supervisor was lost itself, SLURM's word counts; where there
is neither, the ends of the logs.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ii_dist.config import RunFolder
from ii_dist.config.errors import EXIT_CONFIG, EXIT_DATA, EXIT_DONE, EXIT_STOPPED
from launch.history import Attempt, Standing, class_of, node_records, read_attempts, standing
from launch.logs import Line, last_attempt_lines, log_ranks
from launch.scheduler import LiveJob
from launch.submitted import submitit_folder

EVIDENCE_LINES = 12
ADVICE = {
    "finished": "nothing: it is done",
    "stopped": "the same submit command goes on from the newest checkpoint",
    "cancelled": "the same submit command goes on from the newest checkpoint",
    "time_limit": "submit again; a longer launch.time_minutes means fewer stops",
    "preempted": "submit again, or ask for a partition or QOS that is not preempted",
    "node_failure": "submit again; launch.exclude keeps a bad node out",
    "out_of_memory": "lower train.max_images_per_rank (GPU) or raise launch.mem_gb (host), then submit again",
    "killed_rank": "submit again; if it comes back, look at the node's log (dmesg) for who killed it",
    "hang": "read the stacks in the rank's log; submit again, without that node: launch.exclude",
    "nan": "lower optim.lr or lengthen optim.warmup_epochs, then submit with --new-config KEY",
    "disk_full": "free space, or keep less: checkpoint.keep_last, keep_every_steps; then submit again",
    "bad_data": "python -m tools.scan_dataset names the bad files; mend them or raise data.max_bad_share",
    "bad_config": "mend the key, then submit again",
    "bad_checkpoint": "python -m tools.verify_checkpoint RUN says which steps are whole",
    "exception": "read the traceback above in the rank's log",
    "environment": "mend what the line names on the node, then submit again",
    "launch": "see the supervisor's own log, {log}",
    "lost": "look at the supervisor's own log, {log}; submit again",
    "running": "nothing: it runs; python -m launch status",
    "queued": "nothing: it waits for nodes",
    "never": "python -m launch submit",
}
_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("hang", re.compile(r"^Timeout \(\d+:\d\d:\d\d\)!|fell silent|no sign of life", re.I)),
    ("disk_full", re.compile(r"No space left on device|Disk quota exceeded|disk is full", re.I)),
    (
        "out_of_memory",
        re.compile(r"OutOfMemoryError|oom[-_ ]kill|out of memory|MemoryError|bad_alloc|Cannot allocate memory", re.I),
    ),
    ("nan", re.compile(r"non-finite|\bnan\b", re.I)),
)
_ECHO = re.compile(r"Connection (closed|reset)|lost another rank|Broken pipe|NCCL error.*remote|rendezvous", re.I)


@dataclass(frozen=True, slots=True)
class Cause:
    """Why the run stands where it does."""

    kind: str
    says: str
    advice: str
    job: str = ""
    attempt: int | None = None
    rank: int | None = None
    host: str = ""
    source: str = ""
    """Who said so: supervisor, slurm, logs."""
    evidence: tuple[str, ...] = ()
    """The last lines of the log that tells."""
    earlier: tuple[str, ...] = ()
    """How the attempts before went, newest first."""


def why(folder: RunFolder, live: Sequence[LiveJob] | None) -> Cause:
    """The cause of the run's present state."""
    attempts = read_attempts(folder)
    return cause_of(folder, standing(folder, live, attempts), attempts)


def cause_of(folder: RunFolder, now: Standing, attempts: Sequence[Attempt]) -> Cause:
    earlier = tuple(_line_of(attempt) for attempt in reversed(attempts[:-1]))[:EVIDENCE_LINES]
    if now.state in ("training", "starting", "stopping"):
        return _plain(folder, "running", f"{now.state}: {now.why}", now, earlier)
    if now.state == "queued":
        return _plain(folder, "queued", f"waits in the queue: {queue_words(now.why)}", now, earlier)
    if now.state == "new":
        return _plain(folder, "never", "was never submitted", now, earlier)
    if now.attempt is None:
        kind = class_of(now.ended) if now.ended is not None else "finished" if now.state == "done" else "lost"
        kind = "launch" if now.ended is not None and kind == "lost" else kind
        kind = "cancelled" if now.ended is None and now.state == "stopped" and now.job else kind
        return _plain(folder, kind, now.why, now, earlier)
    return _of_attempt(folder, now, now.attempt, earlier)


def queue_words(reason: str) -> str:
    """SLURM's reason for waiting, in words where it is a common one."""
    return _REASONS.get(reason, reason or "no reason given")


def cause_lines(cause: Cause) -> list[str]:
    """A cause for people."""
    where = f" (job {cause.job}" + (f", attempt {cause.attempt})" if cause.attempt is not None else ")")
    lines = [f"{cause.kind}: {cause.says}{where if cause.job else ''}"]
    if cause.rank is not None:
        lines.append(f"  first: rank {cause.rank}{f' on {cause.host}' if cause.host else ''}")
    lines += [f"  | {line}" for line in cause.evidence]
    lines.append(f"  do: {cause.advice}")
    return lines + [f"  before: {line}" for line in cause.earlier]


def as_json(cause: Cause) -> dict[str, Any]:
    return asdict(cause)


def _plain(folder: RunFolder, kind: str, says: str, now: Standing, earlier: tuple[str, ...]) -> Cause:
    number = now.attempt.attempt if now.attempt is not None and now.attempt.job == now.job else None
    advice = _advice(folder, kind, now.job)
    return Cause(kind, says, advice, now.job, number, source="slurm" if now.ended else "", earlier=earlier)


def _advice(folder: RunFolder, kind: str, job: str) -> str:
    return ADVICE.get(kind, ADVICE["exception"]).format(log=supervisor_log(folder, job))


def _of_attempt(folder: RunFolder, now: Standing, attempt: Attempt, earlier: tuple[str, ...]) -> Cause:
    rank, host, says, source = attempt.failed_rank, attempt.failed_host, attempt.why, "supervisor"
    kind = attempt.ended_as
    failed = attempt
    if now.state == "requeued" and attempt.end_s is None:
        kind = "preempted" if attempt.asked else "node_failure"
        says = (
            "asked to stop and ended before it had" if attempt.asked else "a node was lost, or it was requeued by hand"
        )
    if not kind and attempt.end_s is not None:
        failed = _first_failed(folder, attempt)
        rank, host, says = failed.failed_rank, failed.failed_host or failed.host, failed.why
        kind = failed.ended_as or _class_of_code(failed)
    if not kind and now.ended is not None:
        kind, source = class_of(now.ended), "slurm"
        says = f"SLURM says {now.ended.state}{_detail(now.ended.reason)}"
        if kind == "finished":
            kind, says = "lost", f"{says}, yet its supervisor has not"
    ranks = [rank] if rank is not None else []
    lines = _evidence(folder, attempt, ranks)
    if kind in ("", "exception", "lost") and not attempt.ended_as:
        rank, read_kind, lines = _from_logs(folder, attempt, rank)
        kind = read_kind or kind or "lost"
        says = says if says not in ("", "running") else "its supervisor ended without a word"
        source = "logs" if read_kind and source != "slurm" else source
    if attempt.last_line and attempt.last_line not in says:
        says = f"{says}: {attempt.last_line}"
    if now.live is not None and now.state == "requeued":
        says = f"{says}; goes on as job {now.live.job}: {queue_words(now.live.reason)}"
    shown = tuple(line.text for line in lines[-EVIDENCE_LINES:]) if kind not in ("finished", "stopped") else ()
    advice = "nothing: it goes on by itself" if now.state == "requeued" else _advice(folder, kind, attempt.job)
    return Cause(kind, says, advice, attempt.job, attempt.attempt, rank, host, source, shown, earlier)


def _first_failed(folder: RunFolder, attempt: Attempt) -> Attempt:
    """The record of the node whose rank failed first, where node 0 only saw its ranks end."""
    if attempt.failed_rank is not None or attempt.exit_code in (EXIT_DONE, EXIT_STOPPED):
        return attempt
    records = node_records(folder, attempt.job)
    others = [a for a in records if a.failed_rank is not None and a.attempt == attempt.attempt]
    return min(others, key=lambda other: other.end_s or 0.0, default=attempt)


def _class_of_code(attempt: Attempt) -> str:
    """The class that an exit code alone tells; "" where the log must say."""
    code = attempt.exit_code
    if code is not None and code > 128:
        return "killed_rank" if attempt.failed_rank is not None else "cancelled"
    text_class = _class_of_text([attempt.why])
    if text_class:
        return text_class
    return {EXIT_DONE: "finished", EXIT_STOPPED: "stopped", EXIT_DATA: "bad_data", EXIT_CONFIG: "bad_config"}.get(
        code if code is not None else -1, ""
    )


def _from_logs(folder: RunFolder, attempt: Attempt, rank: int | None) -> tuple[int | None, str, list[Line]]:
    """First rank whose log tells a cause that is no echo of another's end, the class, and the lines."""
    echo: tuple[int | None, str, list[Line]] = (rank, "", [])
    told: list[tuple[str, int, str, list[Line]]] = []
    for candidate in [rank] if rank is not None else log_ranks(folder, attempt.job):
        lines = last_attempt_lines(folder, attempt.job, candidate)
        kind = _class_of_text([line.text for line in lines])
        error = next((line for line in reversed(lines) if _is_error(line.text)), None)
        if error is None and not kind:
            continue
        found = (error.time if error is not None else "", candidate, kind or "exception", lines)
        if error is not None and _ECHO.search(error.text):
            echo = (candidate, "exception", lines)
        else:
            told.append(found)
    if not told:
        return echo
    _, first, kind, lines = min(told, key=lambda found: found[:2])
    return first, kind, lines


def _class_of_text(texts: Sequence[str]) -> str:
    return next((kind for kind, pattern in _PATTERNS if any(pattern.search(text) for text in texts)), "")


def _is_error(text: str) -> bool:
    return text.startswith("error: ") or bool(re.match(r"[A-Za-z_.]*(Error|Exception|Interrupt)\b", text))


def _evidence(folder: RunFolder, attempt: Attempt, ranks: Sequence[int]) -> list[Line]:
    return last_attempt_lines(folder, attempt.job, ranks[0]) if ranks else []


def _line_of(attempt: Attempt) -> str:
    steps = "" if attempt.step_end is None else f", step {attempt.step_start} to {attempt.step_end}"
    return f"job {attempt.job} attempt {attempt.attempt}: {attempt.why or attempt.ended_as or 'no word'}{steps}"


def _detail(reason: str) -> str:
    return "" if reason in ("", "None") else f" ({reason})"


def supervisor_log(folder: RunFolder, job: str) -> Path:
    """What the supervisor of node 0 printed itself."""
    return submitit_folder(folder, job) / f"{job}_0_log.out"


_REASONS = {
    "Resources": "no nodes are free (Resources)",
    "JobArrayTaskLimit": "--parallel runs of the sweep run already (JobArrayTaskLimit)",
    "Priority": "other jobs come first (Priority)",
    "BeginTime": "SLURM starts a requeued job after a moment (BeginTime)",
    "Dependency": "another job must end first (Dependency)",
    "QOSMaxJobsPerUserLimit": "you have as many jobs as your QOS allows (QOSMaxJobsPerUserLimit)",
    "AssocGrpCpuLimit": "your account has as many cores as it may (AssocGrpCpuLimit)",
    "ReqNodeNotAvail": "a node that it needs is down or reserved (ReqNodeNotAvail)",
    "PartitionTimeLimit": "launch.time_minutes is more than the partition allows (PartitionTimeLimit)",
    "PartitionNodeLimit": "launch.nodes is more than the partition has (PartitionNodeLimit)",
    "JobHeldUser": "it is held: scontrol release JOB (JobHeldUser)",
    "JobHeldAdmin": "an administrator holds it (JobHeldAdmin)",
}
