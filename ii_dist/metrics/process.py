"""How long this process has lived. In: nothing. Out: seconds since the operating system started it."""

import os
import time
from pathlib import Path

_STAT = Path("/proc/self/stat")
_START_FIELD = 19  # of the fields after the name, which may hold spaces; clock ticks since the machine started


def process_age_s() -> float:
    """Wall seconds since the process started, imports included; 0 where the system does not tell."""
    try:
        fields = _STAT.read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    started_s = int(fields[_START_FIELD]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
