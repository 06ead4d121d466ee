"""The step clock against a written-out day, and against real time."""

import time

import numpy as np
import pytest

from ii_dist.metrics.clock import StepClock, percentile
from ii_dist.metrics.tags import TAGS


class HandClock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.s = 1000.0

    def __call__(self) -> float:
        return self.s


def train_step(clock: StepClock, hand: HandClock, wait_s: float, work_s: float, images: int = 10) -> None:
    with clock.data_wait():
        hand.s += wait_s
    hand.s += work_s
    clock.tick(images)


def test_rates_are_images_over_wall_time_and_not_means_of_rates() -> None:
    hand = HandClock()
    clock = StepClock(world_size=4, now=hand)
    hand.s += 100  # building things before the first batch is not training time
    train_step(clock, hand, wait_s=1, work_s=1)
    train_step(clock, hand, wait_s=0, work_s=6)
    tags = clock.read().tags()
    assert tags["throughput/images_per_s_rank"] == 20 / 8
    assert tags["throughput/images_per_s"] == 4 * 20 / 8
    assert tags["time/data_wait_share"] == 1 / 8
    assert tags["time/step_s"] == 4
    assert tags["time/step_p50_s"] == 4
    assert tags["time/step_p99_s"] == pytest.approx(5.96)
    assert tags.keys() <= TAGS.keys()


def test_pauses_are_not_training_time_wherever_they_stand() -> None:
    hand = HandClock()
    clock = StepClock(now=hand)
    with clock.pause():  # before the first step
        hand.s += 50
    train_step(clock, hand, wait_s=1, work_s=1)
    with clock.pause():  # between two steps
        hand.s += 7
    with clock.saving():
        hand.s += 3
    with clock.data_wait():
        hand.s += 1
    with clock.saving():  # inside a step
        hand.s += 2
    hand.s += 1
    clock.tick(10)
    reading = clock.read()
    assert reading.stretch.seconds == 4
    assert reading.stretch.data_wait_s == 2
    assert reading.checkpoint_stall_s == 5
    totals = clock.totals()
    assert (totals.paused_s, totals.checkpoint_stall_s) == (62, 5)


def test_the_cold_start_is_kept_apart() -> None:
    hand = HandClock()
    clock = StepClock(world_size=2, cold_steps=2, now=hand)
    for wait_s, work_s in ((5, 5), (0, 2), (1, 1), (0, 2)):
        train_step(clock, hand, wait_s, work_s)
        clock.read()  # reading does not touch the totals
    totals = clock.totals()
    assert (totals.cold.steps, totals.cold.images_per_s) == (2, 20 / 12)
    assert (totals.steady.steps, totals.steady.seconds) == (2, 4)
    assert totals.images_per_s == 2 * 20 / 4
    assert totals.data_wait_share == 1 / 4


def test_a_run_that_never_gets_warm_shows_its_cold_rate() -> None:
    hand = HandClock()
    clock = StepClock(cold_steps=100, now=hand)
    train_step(clock, hand, wait_s=1, work_s=4)
    assert clock.totals().images_per_s == 2


def test_nothing_to_read_is_no_tags() -> None:
    clock = StepClock()
    assert clock.read().tags() == {}
    assert clock.totals().images_per_s == 0


def test_a_part_that_fails_is_timed_and_can_be_entered_again() -> None:
    hand = HandClock()
    clock = StepClock(now=hand)

    def read_a_broken_image() -> None:
        with clock.data_wait():
            hand.s += 2
            raise KeyError

    with pytest.raises(KeyError):
        read_a_broken_image()
    train_step(clock, hand, wait_s=1, work_s=1)
    assert clock.read().stretch.data_wait_s == 3


def test_percentiles_equal_numpy() -> None:
    values = sorted(np.random.default_rng(1).random(37).tolist())
    for share in (0.0, 0.5, 0.99, 1.0):
        assert percentile(values, share) == pytest.approx(np.percentile(values, 100 * share), rel=1e-12)


def test_real_time_is_seen() -> None:
    clock = StepClock()
    for _ in range(3):
        with clock.data_wait():
            time.sleep(0.02)
        time.sleep(0.01)
        clock.tick(8)
    with clock.pause():
        time.sleep(0.05)
    stretch = clock.read().stretch
    assert 0.09 <= stretch.seconds < 5
    assert 0.06 <= stretch.data_wait_s <= stretch.seconds - 0.03
