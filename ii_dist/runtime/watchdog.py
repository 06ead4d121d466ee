"""A hang becomes an event: each rank dumps its stacks and ends when no step came for too long.

In: a beat a step. Out: after `timeout_s` without one, the Python stacks of all threads on stderr and exit code 1.
`faulthandler` keeps the time in a C thread, so it fires even while another thread holds the interpreter lock.
"""

import faulthandler
import math
import time
from typing import TextIO


class Watchdog:
    """Armed by `beat`, quiet after `rest` or `close`. timeout_s 0 = never armed."""

    def __init__(self, timeout_s: float, out: TextIO) -> None:
        self._timeout_s = timeout_s
        self._out = out
        self._armed_s = -math.inf

    def beat(self) -> None:
        """A step was made: wait `timeout_s` (and up to a second more) for the next.

        Arming starts a thread (about 100 us), so it is done at most once a second.
        """
        if self._timeout_s and (now := time.monotonic()) - self._armed_s > 1.0:
            self._armed_s = now
            faulthandler.dump_traceback_later(self._timeout_s + 1.0, exit=True, file=self._out)

    def close(self) -> None:
        """Stop watching."""
        if self._timeout_s:
            faulthandler.cancel_dump_traceback_later()
