"""Phases of measured steps against a written-out day, on the host's time and on a device's that comes later."""

import pytest

from ii_dist.metrics.clock import StepClock
from ii_dist.metrics.phases import HostStamps, PhaseTimer, make_phase_timer
from ii_dist.metrics.tags import TAGS
from ii_dist.runtime.phases import UNTIMED, Phase


class HandClock:
    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s


class LateStamps:
    """A device's events: a stamp is known only when the device has passed it. Stamps are handed out again."""

    def __init__(self, hand: HandClock) -> None:
        self.hand, self.passed_s, self.made, self.free = hand, 0.0, 0, list[list[float]]()

    def take(self) -> list[float]:
        if not self.free:
            self.made += 1
            self.free.append([0.0])
        stamp = self.free.pop()
        stamp[0] = self.hand.s
        return stamp

    def passed(self, stamp: list[float]) -> bool:
        return stamp[0] <= self.passed_s

    def seconds(self, start: list[float], end: list[float]) -> float:
        assert self.passed(end), "it would have waited"
        return end[0] - start[0]

    def give_back(self, stamp: list[float]) -> None:
        self.free.append(stamp)


STEP: tuple[tuple[Phase, float], ...] = (
    *(("data_wait", 1.0), ("other", 0.5), ("copy", 0.25), ("forward", 2.0), ("backward", 4.0), ("metrics", 0.125)),
    *(("copy", 0.25), ("forward", 2.0), ("backward", 4.0), ("allreduce", 3.0), ("metrics", 0.125)),
    *(("optimizer", 1.5), ("other", 0.5)),
)


def one_step(timer: PhaseTimer, hand: HandClock) -> None:
    for phase, seconds in STEP:
        timer.begin(phase)
        hand.s += seconds
    timer.end_step()


def test_a_measured_step_is_cut_at_its_borders_and_adds_up() -> None:
    hand = HandClock()
    timer = PhaseTimer(1, HostStamps(hand))
    timer.start()
    one_step(timer, hand)
    hand.s += 0.5  # still the beginning of the next step
    one_step(timer, hand)
    reading = timer.read()
    assert reading.steps == 2
    assert reading.means_s() == {
        "data_wait": 1.0,
        "copy": 0.5,
        "forward": 4.0,
        "backward": 8.0,
        "allreduce": 3.0,
        "optimizer": 1.5,
        "metrics": 0.25,
        "other": 1.25,
    }
    assert timer.read().means_s() == {}
    assert timer.total() == reading


def test_what_lies_between_steps_is_in_none() -> None:
    hand = HandClock()
    timer = PhaseTimer(1, HostStamps(hand))
    timer.start()
    for phase in ("log", "pause"):
        timer.begin(phase)
        hand.s += 100
        timer.begin("other")
    one_step(timer, hand)
    assert sum(timer.read().means_s().values()) == sum(seconds for _, seconds in STEP)


@pytest.mark.parametrize(("log_every", "measured"), [(1, 1), (4, 4), (7, 7), (50, 4), (8, 4), (1000, 4)])
def test_a_few_steps_of_every_line_are_measured_and_not_its_first(log_every: int, measured: int) -> None:
    timer = make_phase_timer("cpu", log_every)
    timer.start()
    for _line in range(3):
        sampled = []
        for step in range(log_every):
            if timer.sampling:
                sampled.append(step)
            timer.end_step()
        assert timer.read().steps == len(sampled) == measured
        assert log_every < 8 or sampled[0] > 0


def test_a_device_is_read_when_it_has_passed_and_never_waited_for() -> None:
    hand = HandClock()
    stamps = LateStamps(hand)
    timer = PhaseTimer(1, stamps)
    timer.start()
    one_step(timer, hand)
    first_end_s = hand.s
    one_step(timer, hand)
    stamps.passed_s = first_end_s
    assert timer.read().steps == 1
    assert timer.read().steps == 0
    stamps.passed_s = hand.s
    assert timer.read().means_s()["backward"] == 8.0
    made = stamps.made
    for _ in range(3):
        one_step(timer, hand)
        stamps.passed_s = hand.s
        timer.read()
    assert stamps.made == made  # events are used again


def test_a_device_that_lags_behind_is_not_buried_under_events() -> None:
    hand = HandClock()
    stamps = LateStamps(hand)
    timer = PhaseTimer(1, stamps)
    timer.start()
    for _ in range(1000):
        one_step(timer, hand)
    assert stamps.made < 400
    stamps.passed_s = hand.s
    assert 1 < timer.read().steps < 50


def test_a_timer_that_measures_nothing_keeps_nothing() -> None:
    hand = HandClock()
    timer = PhaseTimer(0, LateStamps(hand))
    timer.start()
    one_step(timer, hand)
    assert not timer.sampling
    assert timer.read().means_s() == {}
    UNTIMED.begin("forward")


def test_the_clock_tells_phases_start_up_and_goodput() -> None:
    hand = HandClock()
    timer = PhaseTimer(1, HostStamps(hand))
    clock = StepClock(world_size=2, now=hand, phases=timer, age_s=lambda: 10.0)
    lines = []
    for _ in range(2):
        with clock.data_wait():
            hand.s += 1
        for phase, seconds in STEP[1:]:
            timer.begin(phase)
            hand.s += seconds
        clock.tick(10)
        with clock.saving():
            hand.s += 5
        with clock.pause():
            hand.s += 20
        lines.append(clock.read())
        with clock.logging():
            hand.s += 2
    tags = [line.tags() for line in lines]
    whole_s = sum(seconds for _, seconds in STEP)
    for each, written_s in zip(tags, (0.0, 2.0), strict=True):
        assert each.keys() <= TAGS.keys()
        assert each["time/backward_s"] == 11.0  # with the wait for others
        assert each["time/allreduce_s"] == 3.0
        assert each["time/data_wait_s"] == 1.0
        assert each["time/metrics_s"] == 0.25 + written_s
        phases = sum(value for tag, value in each.items() if tag in PHASE_TAGS) - each["time/allreduce_s"]
        assert phases == each["time/step_s"] == whole_s + written_s
    assert tags[0]["time/startup_s"] == 10.0
    assert "time/startup_s" not in tags[1]
    assert tags[0]["run/goodput_share"] == whole_s / (10 + whole_s + 25)
    assert tags[1]["run/goodput_share"] == (2 * whole_s + 2) / (10 + 2 * whole_s + 2 + 50)
    assert clock.totals().phases.steps == 2


PHASE_TAGS = {
    f"time/{phase}_s"
    for phase in ("data_wait", "copy", "forward", "backward", "allreduce", "optimizer", "metrics", "other")
}


def test_without_others_there_is_no_wait_for_them() -> None:
    hand = HandClock()
    timer = PhaseTimer(1, HostStamps(hand))
    clock = StepClock(now=hand, phases=timer)
    with clock.data_wait():
        hand.s += 1
    clock.tick(1)
    assert "time/allreduce_s" not in clock.read().tags()
