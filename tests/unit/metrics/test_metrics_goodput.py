"""Goodput over hand-made pieces with known answers: parts, sums, the interval of Young's formula."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ii_dist.metrics import Row, Start
from ii_dist.metrics.goodput import PARTS, Goodput, Piece, account, pieces_of_starts, young_interval_s


def line(step: int, time_s: float, step_s: float = 1.0, **more: float) -> Row:
    return Row(step, time_s, {"time/step_s": step_s, **{k.replace("__", "/"): v for k, v in more.items()}})


def seconds(found: Goodput, ranks: int = 1) -> dict[str, float]:
    return {part: pytest.approx(value / ranks) for part, value in found.parts.items() if abs(value) > 1e-9}


def test_one_start_in_good_order() -> None:
    """100 s: 20 to the first step, 3 x 20 steps, 10 of evaluation, 2 of saves, 5 unexplained, 3 to the end."""
    rows = [
        line(20, 40.0),
        line(40, 62.0, time__checkpoint_stall_s=2.0),
        line(60, 87.0, eval__seconds=10.0),  # 5 s longer than its steps
    ]
    found = account([Piece(0.0, 100.0, ranks=4)], rows, [Start(0, 15.0, 0, 4, "h")])
    assert found.allocated == 400.0
    assert seconds(found, 4) == {
        "training": 60.0,
        "evaluation": 10.0,
        "saves": 2.0,
        "start-up": 20.0,
        "shut-down": 3.0,
        "other": 5.0,
    }
    assert found.share == 0.6


def test_slow_first_lines_are_warm_up_up_to_the_first_at_pace() -> None:
    rows = [line(10, 30.0, 3.0), line(20, 45.0, 1.5), line(30, 55.0), line(40, 65.0), line(50, 78.0, 1.3)]
    found = account([Piece(0.0, 78.0, ranks=1)], rows, [Start(0, 0.0, 0, 1, "h")])
    assert found.parts["warm-up"] == pytest.approx(20.0 - 1.5 + 5.0 - 0.0, abs=2.0)
    assert found.parts["warm-up"] + found.parts["training"] == pytest.approx(78.0)


def test_a_failure_loses_what_came_after_the_last_save_and_the_restart() -> None:
    """The next start has cut the lines after step 20 away: 13 s are lost, then 7 s go into starting."""
    rows = [line(10, 20.0), line(20, 30.0), line(30, 60.0), line(40, 70.0)]
    starts = [Start(0, 8.0, 0, 2, "h"), Start(20, 49.0, 0, 2, "h")]
    pieces = [
        Piece(0.0, 43.0, 2, failed=True, committed_step=20),
        Piece(43.0, 71.0, 2, restart=True, committed_step=40),
    ]
    found = account(pieces, rows, starts)
    expected = {"training": 40.0, "start-up": 10.0, "restarts": 7.0, "lost steps": 13.0, "shut-down": 1.0}
    assert seconds(found, 2) == expected
    assert (found.failures, found.lost_steps) == (1, 13.0)


def test_a_hang_is_told_from_lost_work() -> None:
    piece = Piece(0.0, 60.0, 1, failed=True, committed_step=10, silent_s=30.0)
    found = account([piece], [line(10, 20.0)], [Start(0, 9.0, 0, 1, "h")])
    assert seconds(found) == {"start-up": 10.0, "training": 10.0, "hang": 30.0, "lost steps": 10.0}


def test_lines_that_nobody_has_cut_yet_are_lost_when_they_were_not_saved() -> None:
    rows = [line(10, 10.0), line(20, 20.0), line(30, 30.0)]
    found = account([Piece(0.0, 35.0, 1, failed=True, committed_step=10)], rows, [Start(0, 0.0, 0, 1, "h")])
    assert seconds(found) == {"training": 10.0, "lost steps": 25.0}
    rows = [line(10, 10.0), line(20, 45.0)]  # 25 s between them were something else
    found = account([Piece(0.0, 60.0, 1, failed=True, committed_step=10)], rows, [Start(0, 0.0, 0, 1, "h")])
    assert seconds(found) == {"training": 10.0, "lost steps": 25.0, "other": 25.0}


def test_a_start_that_never_came_to_a_line() -> None:
    found = account([Piece(0.0, 30.0, 1)], [], [])
    assert seconds(found) == {"start-up": 30.0}
    found = account([Piece(0.0, 30.0, 1, restart=True, failed=True)], [], [Start(0, 12.0, 0, 1, "h")])
    assert seconds(found) == {"restarts": 12.0, "lost steps": 18.0}


def test_without_job_records_attempts_are_taken_from_their_lines() -> None:
    rows = [line(10, 20.0, time__startup_s=6.0), line(20, 30.0, eval__seconds=4.0), line(30, 130.0)]
    starts = [Start(0, 8.0, 0, 2, "h"), Start(20, 110.0, 0, 4, "h")]
    pieces = pieces_of_starts(starts, rows)
    # The first step began at 10 and the process 6 s before it; between 34 and 110 nothing was allocated.
    assert [(p.start_s, p.end_s, p.ranks, p.restart) for p in pieces] == [
        (4.0, 34.0, 2, False),
        (110.0, 130.0, 4, True),
    ]
    found = account(pieces, rows, starts)
    assert found.allocated == 2 * 30.0 + 4 * 20.0
    assert found.parts["training"] == 2 * 20.0 + 4 * 10.0


ROWS = st.lists(
    st.tuples(
        st.integers(1, 50),
        st.floats(0, 200),
        st.floats(0, 50) | st.just(math.nan),
        st.floats(0, 50) | st.just(math.nan),
        st.floats(0, 20),
    ),
    max_size=8,
)


@given(ROWS, st.floats(1, 300), st.integers(1, 8), st.booleans(), st.floats(0, 60), st.integers(0, 60))
def test_parts_always_add_up(
    raw: list[tuple[int, float, float, float, float]],
    length_s: float,
    ranks: int,
    failed: bool,
    silent_s: float,
    committed: int,
) -> None:
    """Whatever the lines say, also what contradicts the clock."""
    rows, step = [], 0
    for steps, time_s, step_s, evaluation_s, stall_s in sorted(raw, key=lambda each: each[1]):
        step += steps
        tags = {"time/step_s": step_s, "eval/seconds": evaluation_s, "time/checkpoint_stall_s": stall_s}
        rows.append(Row(step, time_s, tags))
    pieces = [
        Piece(0.0, length_s, ranks, failed=failed, committed_step=committed, silent_s=silent_s),
        Piece(length_s, 250 + length_s, ranks, restart=True),
    ]
    found = account(pieces, rows, [Start(0, 0.5, 0, ranks, "h")])
    assert sum(found.parts.values()) == pytest.approx(found.allocated)
    assert found.allocated == pytest.approx(ranks * (250 + length_s))
    assert min(found.parts.values()) >= -1e-9
    assert set(found.parts) == set(PARTS)


def test_young_interval_loses_the_least() -> None:
    """Against the loss itself: a save each interval, and half an interval with every failure."""
    save_s, between_s = 4.0, 7200.0

    def lost(interval_s: float) -> float:
        return save_s / interval_s + interval_s / 2 / between_s

    best = young_interval_s(save_s, between_s)
    assert best == 240.0
    assert all(lost(best) <= lost(best * factor) for factor in (0.3, 0.9, 0.99, 1.01, 1.1, 3.0))
