"""The jobs of a run read back: attempts, the starts of ranks inside them, the time that each had.

In: ``jobs/*.json`` of a run folder, of any version; what a record does not say is left open. Out: `Attempt`s in order
of their start, the `Piece`s of allocated time that goodput is counted over, and words.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ii_dist.config.errors import CheckpointError
from ii_dist.config.run_folder import RunFolder
from ii_dist.metrics import Row, Start
from ii_dist.metrics.goodput import Piece, pieces_of_starts

Facts = Mapping[str, Any]
IN_WORDS = {
    "finished": "finished",
    "stopped": "stopped as asked",
    "time_limit": "stopped at the time limit",
    "preempted": "preempted",
    "node_failure": "a node was lost",
    "out_of_memory": "out of memory",
    "killed_rank": "a rank was killed",
    "hang": "a rank hung",
    "nan": "the loss was no number",
    "disk_full": "the disk was full",
    "bad_data": "bad data",
    "bad_config": "a setting was refused",
    "bad_checkpoint": "a checkpoint could not be read",
    "exception": "a rank raised an error",
    "environment": "the environment was not right",
    "launch": "the ranks were never started",
    "cancelled": "cancelled",
}
_IN_GOOD_ORDER = (0, 75)


@dataclass(frozen=True, slots=True)
class Ending:
    """How one start of the ranks, or a whole attempt, ended. Times are Unix seconds, None where not known."""

    start_s: float | None
    end_s: float | None
    exit_code: int | None
    ended_as: str
    why: str
    failed_rank: int | None
    failed_host: str
    step_start: int | None
    step_end: int | None

    @property
    def failed(self) -> bool:
        """Ended otherwise than done, or stopped with everything saved."""
        return self.end_s is not None and self.exit_code not in (*_IN_GOOD_ORDER, None)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of a job by SLURM or on this machine."""

    job: str
    attempt: int
    nodes: tuple[str, ...]
    ranks: int
    whole: Ending
    rounds: tuple[Ending, ...]
    """Each start of its ranks that has ended; the last one's end is the attempt's."""
    restarts: int
    asked: str


def read_attempts(folder: RunFolder) -> list[Attempt]:
    """From the records that the first node of each job wrote. Raises CheckpointError for a file that is not JSON."""
    found: list[Attempt] = []
    for path in sorted(folder.jobs.glob("*.json")) if folder.jobs.is_dir() else ():
        record = _read_json(path)
        if record.get("node_rank", 0) == 0 and "job" in record:
            found += [_attempt(facts) for facts in (*(record.get("earlier") or ()), record)]
    return sorted(found, key=lambda attempt: attempt.whole.start_s or 0.0)


def read_submitted(folder: RunFolder) -> dict[str, float]:
    """When each job was submitted to SLURM, by job."""
    try:
        lines = folder.submitted.read_text().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        try:
            entry = json.loads(line)
            if entry["executor"] == "slurm" and (when := _unix(entry["submitted"])):
                found[str(entry["job"])] = when
        except (ValueError, KeyError, TypeError):
            continue
    return found


def pieces_of(
    attempts: Sequence[Attempt], starts: Sequence[Start], rows: Sequence[Row], silent_s: float
) -> list[Piece]:
    """The allocated time of a run in order, without overlap: from job records, and from the numbers themselves where
    ranks were started without `launch`. silent_s: after how much silence a rank was ended."""
    pieces: list[Piece] = []
    for k, attempt in enumerate(attempts):
        after = attempts[k + 1].whole.start_s if k + 1 < len(attempts) else None
        pieces += _pieces_of_attempt(attempt, after, rows, silent_s)
    covered = [(piece.start_s, piece.end_s) for piece in pieces]
    alone = [start for start in starts if not any(a <= start.time_s <= b for a, b in covered)]
    between = [row for row in rows if not any(a < row.time_s <= b for a, b in covered)]
    pieces = sorted([*pieces, *pieces_of_starts(alone, between)], key=lambda piece: piece.start_s)
    return [
        Piece(p.start_s, p.end_s, p.ranks, k > 0, p.failed, p.committed_step, p.silent_s) for k, p in enumerate(pieces)
    ]


def queue_s(attempts: Sequence[Attempt], submitted: Mapping[str, float]) -> float:
    """Wall time in which SLURM had given nothing: from a submission, or the attempt before, to each start."""
    waited, before_s = 0.0, None
    for attempt in attempts:
        since_s = submitted.get(attempt.job) if attempt.attempt == 0 else before_s
        if attempt.job in submitted and since_s is not None and attempt.whole.start_s is not None:
            waited += max(0.0, attempt.whole.start_s - max(since_s, before_s or 0.0))
        before_s = attempt.whole.end_s
    return waited


def ending_words(ending: Ending) -> str:
    """How it ended, and where it began to."""
    said = IN_WORDS.get(ending.ended_as, "") or ending.why or "?"
    if not ending.failed:
        return said
    if ending.why and ending.why != said:
        said += f": {ending.why}"
    return f"{said} (on {ending.failed_host})" if ending.failed_host else said


def minute(time_s: float | None) -> str:
    return "?" if time_s is None else datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _pieces_of_attempt(attempt: Attempt, after_s: float | None, rows: Sequence[Row], silent_s: float) -> list[Piece]:
    """From its start to the end of each round; the last round takes what is left."""
    start_s, end_s = attempt.whole.start_s, attempt.whole.end_s
    if start_s is None or not attempt.ranks:
        return []
    lost = end_s is None and after_s is not None  # its supervisor never wrote the end
    if end_s is None:
        last_s = [row.time_s for row in rows if start_s < row.time_s < (after_s or float("inf"))]
        end_s = max(last_s, default=start_s)
    pieces = []
    for ending in attempt.rounds[: attempt.restarts]:  # those that another start followed
        if ending.end_s is None:
            continue
        silent = silent_s if ending.ended_as == "hang" else 0.0
        pieces.append(Piece(start_s, ending.end_s, attempt.ranks, False, ending.failed, ending.step_end, silent))
        start_s = ending.end_s
    silent = silent_s if attempt.whole.ended_as == "hang" else 0.0
    failed = attempt.whole.failed or lost
    pieces.append(Piece(start_s, end_s, attempt.ranks, False, failed, attempt.whole.step_end, silent))
    return [piece for piece in pieces if piece.end_s > piece.start_s]


def _attempt(facts: Facts) -> Attempt:
    return Attempt(
        job=str(facts.get("job", "?")),
        attempt=int(facts.get("attempt") or 0),
        nodes=tuple(map(str, facts.get("nodes") or ())),
        ranks=int(facts.get("ranks") or 0),
        whole=_ending(facts),
        rounds=tuple(_ending(each) for each in facts.get("rounds") or ()),
        restarts=int(facts.get("restarts") or 0),
        asked=str(facts.get("asked") or ""),
    )


def _ending(facts: Facts) -> Ending:
    return Ending(
        start_s=_unix(facts.get("start")),
        end_s=_unix(facts.get("end")),
        exit_code=facts.get("exit_code"),
        ended_as=str(facts.get("ended_as") or ""),
        why=str(facts.get("why") or ""),
        failed_rank=facts.get("failed_rank"),
        failed_host=str(facts.get("failed_host") or ""),
        step_start=facts.get("step_start"),
        step_end=facts.get("step_end"),
    )


def _read_json(path: Path) -> Facts:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        raise CheckpointError(f"{path}: cannot be read as JSON; copy it back or remove it") from None
    return values if isinstance(values, Mapping) else {}


def _unix(text: Any) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError):
        return None
