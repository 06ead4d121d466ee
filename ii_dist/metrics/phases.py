"""Where the time of a step goes: data wait, copy, forward, backward, optimizer ..., measured on some steps of a line.

In: `begin(phase)` at each border (see `runtime.phases`), `end_step` after each step. Out: `PhaseReading`: means per
measured step.

Steps are measured a few times between two lines of numbers and cost next to nothing otherwise. On a CPU a border is a
look at the clock. On a GPU, where the host runs ahead, it is a CUDA event in the stream: nobody waits for it, and a
step is read only when the device has passed its last event.
"""

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ii_dist.runtime.phases import Phase, Phases

SAMPLES_A_LINE = 4
TOLD: tuple[Phase, ...] = ("data_wait", "copy", "forward", "backward", "allreduce", "optimizer", "metrics", "other")
"""In the order of a step. What lies between steps (log, pause) is measured like the rest and told by nobody."""
_MOST_PENDING_STEPS = 16


@dataclass(frozen=True, slots=True)
class PhaseReading:
    """Sums of the measured steps by phase; backward without the wait for others, which is allreduce."""

    steps: int = 0
    sums_s: Mapping[Phase, float] = field(default_factory=dict)

    def mean_s(self, phase: Phase) -> float:
        return self.sums_s.get(phase, 0.0) / self.steps if self.steps else 0.0

    def means_s(self) -> dict[str, float]:
        """Seconds a step by phase, in the order of a step; they add up to it. Empty where nothing was measured."""
        return {phase: self.mean_s(phase) for phase in TOLD} if self.steps else {}


class Stamps(Protocol):
    """A kind of time: the host's or a device's."""

    def take(self) -> Any:
        """The time now."""

    def passed(self, stamp: Any) -> bool:
        """Whether that time has come; never waits."""

    def seconds(self, start: Any, end: Any) -> float: ...

    def give_back(self, stamp: Any) -> None:
        """It will not be asked about again."""


class HostStamps:
    """The host's own clock."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.take = now

    def passed(self, stamp: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def give_back(self, stamp: float) -> None:
        pass


class EventStamps:
    """CUDA events in the current stream, used again and again."""

    def __init__(self) -> None:
        import torch

        self._make: Callable[[], Any] = lambda: torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._free: list[Any] = []

    def take(self) -> Any:
        event = self._free.pop() if self._free else self._make()
        event.record()
        return event

    def passed(self, stamp: Any) -> bool:
        return bool(stamp.query())

    def seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1000

    def give_back(self, stamp: Any) -> None:
        self._free.append(stamp)


class PhaseTimer(Phases):
    """Measures one in `every_steps` steps, 0 = none. `stamps` None = the host's clock."""

    def __init__(self, every_steps: int, stamps: Stamps | None = None) -> None:
        self._every = every_steps
        self._stamps: Stamps = HostStamps() if stamps is None else stamps
        self._index = 0  # of the step within its line
        self._borders: list[tuple[Phase, Any]] = []
        self._pending: list[list[tuple[Phase, Any]]] = []
        self._total_steps, self._total_s = 0, dict[Phase, float]()

    def begin(self, phase: Phase) -> None:
        if self.sampling:
            self._borders.append((phase, self._stamps.take()))
        if self.listener is not None:
            self.listener(phase)

    def start(self) -> None:
        """The first step begins now."""
        self._index = 0
        self._decide()

    def end_step(self) -> None:
        """A step ended and the next one begins."""
        if self.sampling:
            self.begin("other")  # ends the last phase; of no length itself
            self._pending.append(self._borders)
        self._index += 1
        self._decide()

    def read(self) -> PhaseReading:
        """The steps measured since the last read, as far as the device has passed them; a new line begins."""
        steps, sums_s = 0, dict[Phase, float]()
        while self._pending and self._stamps.passed(self._pending[0][-1][1]):
            self._add_up(self._pending.pop(0), sums_s)
            steps += 1
        self._total_steps += steps
        for phase, seconds in sums_s.items():
            self._total_s[phase] = self._total_s.get(phase, 0.0) + seconds
        self._index = 0
        return PhaseReading(steps, sums_s)

    def total(self) -> PhaseReading:
        """Of all steps read so far."""
        return PhaseReading(self._total_steps, dict(self._total_s))

    def _decide(self) -> None:
        # The middle of each stretch: the first step after a line may find a device that had run empty.
        due = self._every > 0 and self._index % self._every == self._every // 2
        self.sampling = due and len(self._pending) < _MOST_PENDING_STEPS
        if self.sampling:
            self._borders = []
            self.begin("other")

    def _add_up(self, step: list[tuple[Phase, Any]], sums_s: dict[Phase, float]) -> None:
        for (phase, start), (_, end) in itertools.pairwise(step):
            sums_s[phase] = sums_s.get(phase, 0.0) + self._stamps.seconds(start, end)
        for _, stamp in step:
            self._stamps.give_back(stamp)


def make_phase_timer(device_type: str, log_every_steps: int) -> PhaseTimer:
    """A timer for steps on "cpu" or "cuda", which measures some steps of every line."""
    return PhaseTimer(max(1, log_every_steps // SAMPLES_A_LINE), EventStamps() if device_type == "cuda" else None)
