"""The cores and the processes of this node.

In: a number of ranks, a process id. Out: cores for each, when a process started.
"""

import os
from pathlib import Path


def cores_of_a_rank(ranks_per_node: int) -> int:
    """Cores that this process may use, shared among the ranks of the node; at least one."""
    return max(1, len(os.sched_getaffinity(0)) // ranks_per_node)


def started_ticks(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot; None if it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *rest = text.rpartition(")")[2].split()  # the program's name, before it, may hold anything
    return None if state in "ZX" else int(rest[18])
