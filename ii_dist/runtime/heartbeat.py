"""Signs of life of a rank for the supervisor of its node, and its stacks when that asks for them.

In: what the rank does now. Out: one line in a small file of this node, overwritten each time (about 2 us): how many
signs so far, how many of this phase, the step, the longest save in seconds, the phase. `launch` reads it.
"""

import contextlib
import faulthandler
import os
import signal
from typing import Literal, TextIO

Phase = Literal["start", "data", "step", "evaluate", "save", "finish"]
STACKS_SIGNAL = signal.SIGUSR1


class Heartbeat:
    """Writes signs of life to `path`; without one (no supervisor) it does nothing."""

    def __init__(self, path: str) -> None:
        self._file = -1
        if path:
            with contextlib.suppress(OSError):  # a supervisor that has gone takes its folder with it
                self._file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        self._signs = 0
        self._of_phase: dict[str, int] = {}
        self._longest_save_s = 0.0

    def sign(self, phase: Phase, step: int) -> None:
        """This rank lives, and is about to do `phase`."""
        if self._file < 0:
            return
        self._signs += 1
        of_phase = self._of_phase[phase] = self._of_phase.get(phase, 0) + 1
        line = f"{self._signs:012d} {of_phase:012d} {step:012d} {self._longest_save_s:012.3f} {phase:<10}\n"
        with contextlib.suppress(OSError):
            os.pwrite(self._file, line.encode(), 0)

    def saved(self, seconds: float) -> None:
        """A save took so long, from its call until it was on disk."""
        self._longest_save_s = max(self._longest_save_s, seconds)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def stacks_on_request(out: TextIO) -> None:
    """From now on SIGUSR1 writes the stacks of all threads to `out`, whatever holds the interpreter lock."""
    faulthandler.register(STACKS_SIGNAL, file=out, all_threads=True)
