"""Where a step stands: what the loop and an engine say while they work.

In: `Phases.begin` at each border between two phases. Out: nothing here: `metrics.phases` measures, and an engine need
not know whether anybody does.
"""

from collections.abc import Callable
from typing import Literal

Phase = Literal[
    "data_wait", "copy", "forward", "backward", "allreduce", "optimizer", "metrics", "other", "log", "pause"
]
"""copy = host to device. allreduce = gradients are computed and the rank waits for those of others. metrics = counting
right answers. log, pause = writing numbers, evaluating and saving: between two steps, and in neither."""


class Phases:
    """Keeps nothing. What measures is an heir of this."""

    listener: Callable[[Phase], None] | None = None
    """Hears of every border, of all steps: while a trace is recorded."""
    sampling = False
    """Whether this step is measured: a border that costs something by itself need not be told otherwise."""

    def begin(self, phase: Phase) -> None:
        """From here on, until the next call, the step does `phase`."""


UNTIMED = Phases()
