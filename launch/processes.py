"""Which process of this machine is which: a number may be given to another one.

In: a process id. Out: when that process started.
"""

from pathlib import Path


def started_ticks(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot; None if it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *rest = text.rpartition(")")[2].split()  # the program's name, before it, may hold anything
    return None if state in "ZX" else int(rest[18])
