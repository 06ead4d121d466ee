"""How fast: the wall time of steps, of waiting for data, and of what is not training.

In: ``with clock.data_wait()``, ``clock.tick(images)`` a step, ``with clock.pause()`` or ``clock.saving()`` round
evaluation and saves, ``with clock.logging()`` round what writes numbers. Out: `ClockReading` (since the last read) and
`Totals` (the whole attempt). What the phases within a step take is measured by its `PhaseTimer`, on some steps.

A step lasts from one tick to the next, less the pauses in between. With a GPU the host runs ahead of it within a step;
over a window that ends with a read of the device's means, images over wall time is the device's own rate.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from ii_dist.metrics.phases import PhaseReading, PhaseTimer
from ii_dist.metrics.process import process_age_s


@dataclass(slots=True)
class Stretch:
    """Training time of one rank: its steps, images, wall time, and the part of it spent waiting for data."""

    steps: int = 0
    images: float = 0
    seconds: float = 0.0
    data_wait_s: float = 0.0

    @property
    def images_per_s(self) -> float:
        """Sum of images over wall time; 0 before the first step."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def data_wait_share(self) -> float:
        return self.data_wait_s / self.seconds if self.seconds else 0.0

    def add(self, images: float, seconds: float, data_wait_s: float) -> None:
        self.steps += 1
        self.images += images
        self.seconds += seconds
        self.data_wait_s += data_wait_s


@dataclass(frozen=True, slots=True)
class ClockReading:
    """One rank since the last read."""

    stretch: Stretch
    step_p50_s: float
    step_p99_s: float
    checkpoint_stall_s: float
    world_size: int
    phases: PhaseReading
    log_s: float
    """What writing numbers took, in all."""
    startup_s: float | None
    """From the start of the process to the first step; only in the first reading."""
    goodput_share: float
    """Of the time since the start of the process."""

    @property
    def step_s(self) -> float:
        """Wall time of a step, mean; 0 where there was none."""
        return self.stretch.seconds / self.stretch.steps if self.stretch.steps else 0.0

    def phase_seconds(self) -> dict[str, float]:
        """Seconds a step by phase, in the order of a step; empty where no step was measured.

        backward with the wait for others (allreduce); metrics with the writing, spread over all steps.
        """
        seconds = self.phases.means_s()
        if seconds:
            seconds["backward"] += seconds["allreduce"]
            seconds["metrics"] += self.log_s / self.stretch.steps if self.stretch.steps else 0.0
        return seconds

    def tags(self) -> dict[str, float]:
        """The reading under its tags; the global rate is this rank's times the ranks (equal shares of each step)."""
        if not self.stretch.steps:
            return {}
        rate = self.stretch.images_per_s
        tags = {f"time/{phase}_s": seconds for phase, seconds in self.phase_seconds().items()}
        if self.world_size == 1 or not tags.get("time/allreduce_s"):  # nobody to wait for, or it cannot be told apart
            tags.pop("time/allreduce_s", None)
        if self.startup_s is not None:
            tags["time/startup_s"] = self.startup_s
        return tags | {
            "throughput/images_per_s": rate * self.world_size,
            "throughput/images_per_s_rank": rate,
            "time/step_s": self.step_s,
            "time/step_p50_s": self.step_p50_s,
            "time/step_p99_s": self.step_p99_s,
            "time/data_wait_share": self.stretch.data_wait_share,
            "time/checkpoint_stall_s": self.checkpoint_stall_s,
            "run/goodput_share": self.goodput_share,
        }


@dataclass(frozen=True, slots=True)
class Totals:
    """One attempt on one rank: the cold steps at its start and the steady ones after them, kept apart."""

    cold: Stretch
    steady: Stretch
    paused_s: float
    """Evaluation and saves; not part of cold or steady."""
    checkpoint_stall_s: float
    world_size: int
    phases: PhaseReading

    @property
    def images_per_s(self) -> float:
        """All ranks, steady steps (cold ones where there are no others)."""
        return self._best.images_per_s * self.world_size

    @property
    def data_wait_share(self) -> float:
        return self._best.data_wait_share

    @property
    def _best(self) -> Stretch:
        return self.steady if self.steady.steps else self.cold


class _Timed:
    """A ``with`` block whose wall time goes to a function. Made once: entering costs no allocation."""

    def __init__(
        self, now: Callable[[], float], ended: Callable[[float], None], opened: Callable[[float], None]
    ) -> None:
        self._now = now
        self._ended = ended
        self._opened = opened
        self._start_s = -1.0

    def __enter__(self) -> None:
        assert self._start_s < 0, "this part of the clock is running already"
        self._start_s = self._now()
        self._opened(self._start_s)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds, self._start_s = self._now() - self._start_s, -1.0
        self._ended(seconds)


class StepClock:
    """Times the steps of one rank. It starts with the first wait for data, so that building things does not count."""

    def __init__(
        self,
        *,
        world_size: int = 1,
        cold_steps: int = 0,
        now: Callable[[], float] = time.monotonic,
        phases: PhaseTimer | None = None,
        age_s: Callable[[], float] = process_age_s,
    ) -> None:
        """phases: None = they are not measured. age_s: of this process."""
        self._now, self._age_s = now, age_s
        self.phases = PhaseTimer(0) if phases is None else phases
        self._world_size = world_size
        self._cold_steps = cold_steps
        self._begun_s = -1.0
        self._startup_s = 0.0
        self._startup_told = False
        self._step_start_s: float | None = None
        self._step_wait_s = 0.0
        self._step_paused_s = 0.0
        self._cold, self._steady = Stretch(), Stretch()
        self._paused_s = 0.0
        self._stall_s = 0.0
        self._total_stall_s = 0.0
        self._log_s = 0.0
        self._window, self._window_steps_s = Stretch(), list[float]()
        self._wait_timer = _Timed(now, self._end_wait, self._begin_wait)
        self._pause_timer = _Timed(now, self._end_pause, self._begin_pause)
        self._save_timer = _Timed(now, self._end_save, self._begin_pause)
        self._log_timer = _Timed(now, self._end_log, self._begin_log)

    def data_wait(self) -> _Timed:
        """Round taking the next batch."""
        return self._wait_timer

    def pause(self) -> _Timed:
        """Round evaluation: this is not training time."""
        return self._pause_timer

    def saving(self) -> _Timed:
        """Round what a save makes the step wait for: not training time, and counted as checkpoint stall."""
        return self._save_timer

    def logging(self) -> _Timed:
        """Round writing numbers: training time, and what metrics cost."""
        return self._log_timer

    def tick(self, images: int) -> None:
        """A step with `images` of this rank ended."""
        now = self._now()
        start = now if self._step_start_s is None else self._step_start_s
        seconds = now - start - self._step_paused_s
        self._window_steps_s.append(seconds)
        self._window.add(images, seconds, self._step_wait_s)
        total = self._cold if self._cold.steps < self._cold_steps else self._steady
        total.add(images, seconds, self._step_wait_s)
        self._step_start_s, self._step_wait_s, self._step_paused_s = now, 0.0, 0.0
        self.phases.end_step()

    def read(self) -> ClockReading:
        """What came since the last read. Of the phases: the measured steps that the device has passed."""
        steps_s = sorted(self._window_steps_s)
        trained_s = self._cold.seconds + self._steady.seconds
        reading = ClockReading(
            stretch=self._window,
            step_p50_s=percentile(steps_s, 0.50),
            step_p99_s=percentile(steps_s, 0.99),
            checkpoint_stall_s=self._stall_s,
            world_size=self._world_size,
            phases=self.phases.read(),
            log_s=self._log_s,
            startup_s=None if self._startup_told else self._startup_s,
            goodput_share=trained_s / (self._now() - self._begun_s + self._startup_s) if trained_s else 0.0,
        )
        self._startup_told = self._startup_told or bool(reading.stretch.steps)
        self._window, self._window_steps_s, self._stall_s, self._log_s = Stretch(), [], 0.0, 0.0
        return reading

    def totals(self) -> Totals:
        """The whole attempt so far."""
        return Totals(
            *(self._cold, self._steady, self._paused_s, self._total_stall_s, self._world_size), self.phases.total()
        )

    def _begin_wait(self, now: float) -> None:
        if self._step_start_s is None:
            self._step_start_s = self._begun_s = now
            self._startup_s = self._age_s()
            self.phases.start()
        self.phases.begin("data_wait")

    def _begin_pause(self, now: float) -> None:
        self.phases.begin("pause")

    def _begin_log(self, now: float) -> None:
        self.phases.begin("log")

    def _end_wait(self, seconds: float) -> None:
        self._step_wait_s += seconds
        self._resume()

    def _end_pause(self, seconds: float) -> None:
        self._paused_s += seconds
        if self._step_start_s is not None:  # before the first step nothing runs that a pause could stop
            self._step_paused_s += seconds
        self._resume()

    def _end_save(self, seconds: float) -> None:
        self._end_pause(seconds)
        self._stall_s += seconds
        self._total_stall_s += seconds

    def _end_log(self, seconds: float) -> None:
        self._log_s += seconds
        self._resume()

    def _resume(self) -> None:
        self.phases.begin("other")


def percentile(ascending: list[float], share: float) -> float:
    """The value below which `share` of a sorted list lies, interpolated linearly; 0 for an empty list."""
    if not ascending:
        return 0.0
    place = share * (len(ascending) - 1)
    low = int(place)
    high = min(low + 1, len(ascending) - 1)
    return ascending[low] + (place - low) * (ascending[high] - ascending[low])
