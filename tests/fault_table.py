"""The table of what faults cost, docs/launch-faults.md: written only where II_DIST_FAULT_TABLE names it.

`make fault-table` does; a test run otherwise measures the same and writes nothing.
"""

import os
from pathlib import Path

HEAD = """# What faults cost

Written by `make fault-table`: real processes and a real SLURM of two nodes on one machine, a tiny network on CPU.
Seconds include the start of Python and torch on that machine.

| fault | noticed after | steps again after | steps lost | goal |
| --- | --- | --- | --- | --- |
"""


def note(fault: str, noticed_s: float | None, again_s: float | None, lost_steps: int | None, goal: str) -> None:
    """Put one row into the table, over the one of the same fault."""
    path = os.environ.get("II_DIST_FAULT_TABLE")
    if not path:
        return
    table = Path(path)
    text = table.read_text() if table.exists() else HEAD
    shown = ["-" if value is None else f"{value:.1f} s" for value in (noticed_s, again_s)]
    row = f"| {fault} | {shown[0]} | {shown[1]} | {'-' if lost_steps is None else lost_steps} | {goal} |"
    lines = [line for line in text.splitlines() if not line.startswith(f"| {fault} |")]
    table.write_text("\n".join([*lines, row]) + "\n")
