"""Why the ranks ended, as a class, and what follows: done, once more, or the end. Pure but for counters of the kernel.

In: exit codes, last lines of logs, signs of life. Out: an `Ending` a node, one `Ending` for the job, and whether a
restart of the ranks can help.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ii_dist.config.errors import (
    EXIT_BUG,
    EXIT_CHECKPOINT,
    EXIT_CONFIG,
    EXIT_DATA,
    EXIT_DONE,
    EXIT_ENVIRONMENT,
    EXIT_STOPPED,
)
from launch.beats import first_silent
from launch.records import EndedAs, Facts

ERROR_PREFIX = "error: "
"""What every command of the project puts before an error that the user can mend."""
_OUT_OF_MEMORY = re.compile(r"OutOfMemoryError|out of memory|MemoryError|std::bad_alloc|Cannot allocate memory", re.I)
_DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded|disk (is )?full", re.I)
_LOST_PEER = re.compile(r"lost another rank|rendezvous")
_NOT_FINITE = re.compile(r"non-finite|\bnan\b", re.I)
_BY_CODE: dict[int, EndedAs] = {
    EXIT_CONFIG: "bad_config",
    EXIT_DATA: "bad_data",
    EXIT_CHECKPOINT: "bad_checkpoint",
    EXIT_ENVIRONMENT: "environment",
}


@dataclass(frozen=True, slots=True)
class Ending:
    """How the ranks of a node, or of the job, ended."""

    exit_code: int
    why: str
    ended_as: EndedAs = ""
    """"" = only an echo: ended because ranks of another node had."""
    failed_rank: int | None = None
    failed_host: str = ""
    last_line: str = ""
    asked: str = ""
    stepped: bool = False
    """Whether any rank came to its first steps."""
    hang: dict[str, Facts] = field(default_factory=dict)
    """Facts of the ranks' lives at the time of a hang, by rank."""


def classify(exit_code: int, lines: Sequence[str], killed_for_memory: bool) -> EndedAs:
    """The class of a failed rank's end, from its code (above 128: a signal) and its last lines."""
    text = "\n".join(lines)
    if killed_for_memory or (exit_code in (EXIT_BUG, 128 + 6) and _OUT_OF_MEMORY.search(text)):
        return "out_of_memory"
    if exit_code > 128:
        return "killed_rank"
    if exit_code in (EXIT_BUG, EXIT_CHECKPOINT, EXIT_DATA) and _DISK_FULL.search(text):
        return "disk_full"
    if exit_code == EXIT_CONFIG and _NOT_FINITE.search(text):
        return "nan"
    return _BY_CODE.get(exit_code, "exception")


def last_words(lines: Sequence[str]) -> str:
    """The line of a rank's log that says why it failed: its one-line error, else the last line that says anything."""
    errors = [line.removeprefix(ERROR_PREFIX) for line in lines if line.startswith(ERROR_PREFIX)]
    said = [line.strip() for line in lines if line.strip()]
    return errors[-1] if errors else said[-1] if said else ""


def blame(rank: int, exit_code: int) -> tuple[int, int]:
    """Of ranks that failed together: a killed one, then a user's error, a cluster's (a lost peer), a traceback."""
    order = {EXIT_ENVIRONMENT: 2, EXIT_BUG: 3}
    return (0 if exit_code < 0 or exit_code > 128 else order.get(exit_code, 1), rank)


def merge(endings: Sequence[Ending]) -> Ending:
    """One ending for the job from those of its nodes: the cause, not its echoes."""
    asked = next((ending.asked for ending in endings if ending.asked), "")
    stepped = any(ending.stepped for ending in endings)
    failed = [e for e in endings if e.ended_as not in ("", "finished", "stopped", "hang")]
    hung = [e for e in endings if e.ended_as == "hang"]
    if failed:
        chosen = min(failed, key=lambda e: (e.ended_as == "node_failure", *blame(e.failed_rank or 0, e.exit_code)))
    elif hung:
        chosen = _name_first_silent(endings, hung)
    elif any(ending.ended_as == "stopped" for ending in endings):
        chosen = next(ending for ending in endings if ending.ended_as == "stopped")
    else:
        chosen = endings[0]
    return replace(chosen, asked=asked, stepped=stepped)


def can_restart(ending: Ending) -> bool:
    """Whether starting the ranks once more may help: not where the same words would come again."""
    if ending.ended_as in ("killed_rank", "hang"):
        return True
    if ending.ended_as == "out_of_memory":
        return ending.exit_code > 128 or ending.stepped
    if ending.ended_as == "environment":
        return ending.stepped or bool(_LOST_PEER.search(ending.last_line))
    return ending.ended_as == "exception" and ending.stepped


def memory_kills(cgroups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> int:
    """Processes of this job step that the kernel has killed for their memory so far; 0 where nothing counts them."""
    try:
        lines = cgroups.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        place = mounted / controllers / path.lstrip("/")
        for name in ("memory.events", "memory.oom_control"):
            try:
                words = dict(row.split() for row in (place / name).read_text(encoding="ascii").splitlines())
                return int(words.get("oom_kill", 0))
            except (OSError, ValueError):
                continue
    return 0


def ended_well(ending: Ending) -> bool:
    return ending.exit_code in (EXIT_DONE, EXIT_STOPPED)


def _name_first_silent(endings: Sequence[Ending], hung: Sequence[Ending]) -> Ending:
    lives = {rank: facts for ending in endings for rank, facts in ending.hang.items()}
    if not lives:
        return hung[0]
    rank = first_silent(lives)
    facts = lives[str(rank)]
    host = next(ending.failed_host for ending in endings if str(rank) in ending.hang)
    stopped = ", stopped by a signal" if facts["state"] == "T" else ""
    what = f"step {facts['step']}, {facts['phase']}{stopped}"
    why = f"rank {rank} fell silent first ({facts['silent_s']:.0f} s ago, {what})"
    return Ending(hung[0].exit_code, why, "hang", rank, host, why)
