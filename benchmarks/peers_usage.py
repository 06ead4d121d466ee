"""CPU time and memory of this process with all its workers, from Linux's /proc."""

import os
import time
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_SETTLE_S, _IDLE_S, _LONGEST_S = 0.2, 0.03, 20.0


def family(pid: int | None = None) -> list[int]:
    """A process and everything that descends from it."""
    pid = pid or os.getpid()
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children += map(int, task.read_text().split())
        except OSError:
            continue
    return [pid, *(descendant for child in children for descendant in family(child))]


def cpu_s() -> float:
    """Of the whole family so far, those that have ended included."""
    return sum(map(_cpu_ticks, family())) / _TICKS_PER_S


def memory_bytes() -> int:
    """What the family occupies, memory that several of them share counted once (proportional set size)."""
    return sum(map(_pss_bytes, family()))


def settle() -> None:
    """Wait until what was begun ahead is done, so that every turn pays for as many images as it takes."""
    before_s, give_up_s = cpu_s(), time.monotonic() + _LONGEST_S
    while time.monotonic() < give_up_s:
        time.sleep(_SETTLE_S)
        now_s = cpu_s()
        if now_s - before_s < _IDLE_S:
            return
        before_s = now_s


def _cpu_ticks(pid: int) -> int:
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended: its parent has its time
        return 0
    return sum(map(int, after_name[11:15]))  # own and ended children's, user and system


def _pss_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
