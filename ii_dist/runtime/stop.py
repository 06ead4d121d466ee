"""An agreed stop: a signal on any rank becomes a decision of all ranks at a step boundary.

In: SIGTERM, SIGINT or SIGUSR2 on any rank. Out: `StopVote.cast()` answers the same on every rank for the same step.

The handler only sets a flag. Each step the ranks add up their flags in a small gloo all-reduce that runs while the
next step computes and is read one step later: no rank waits for the vote, and no device is asked anything.
"""

import logging
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from ii_dist.runtime.group import new_cpu_group

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_Handler = Callable[[int, FrameType | None], Any] | int | None


class StopRequest:
    """Set by a signal or by `ask`; read by the vote. A second SIGINT or SIGTERM ends the process at once."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._before: dict[signal.Signals, _Handler] = {}

    def ask(self, reason: str) -> None:
        """Ask to stop, as a signal would."""
        self.reason = self.reason or reason

    def listen(self) -> None:
        """Take over the stop signals. Call in the main thread, before the first step."""
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.reason is not None and number != signal.SIGUSR2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.ask(signal.Signals(number).name)


class StopVote:
    """The running vote. Making one is collective; `cast` must be called by every rank at every step."""

    def __init__(self, request: StopRequest) -> None:
        self._request = request
        self._group = new_cpu_group()
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None
        self.stopping = False

    def cast(self) -> bool:
        """Cast this step's vote; True on all ranks once any rank asked to stop one call before or earlier."""
        asked = self._request.reason is not None
        if self._group is None:
            self.stopping = asked
            return self.stopping
        if self._pending is not None:
            self._pending.wait()
            self.stopping = self.stopping or bool(self._flag.item())
        self._flag = torch.tensor([int(asked)], dtype=torch.int32)
        self._pending = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return self.stopping

    def close(self) -> None:
        """Wait for the vote that is still under way, so that the group can be left cleanly."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.wait()
            except RuntimeError as error:  # on the way out after another rank was lost
                logger.debug("last vote not counted: %s", error)
