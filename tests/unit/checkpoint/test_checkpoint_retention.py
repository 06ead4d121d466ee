"""Retention is a pure rule on step numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ii_dist.checkpoint import steps_to_delete


@pytest.mark.parametrize(
    ("steps", "last", "every", "gone"),
    [
        ([], 3, 0, []),
        ([5], 2, 0, []),
        ([1, 2, 3, 4], 2, 0, [1, 2]),
        ([100, 150, 200, 250, 300], 2, 100, [150]),
        ([300, 100, 200], 2, 0, [100]),
        ([1, 2, 3], 0, 0, [1, 2]),
        ([0, 5, 10], 1, 5, []),
    ],
)
def test_examples(steps: list[int], last: int, every: int, gone: list[int]) -> None:
    assert steps_to_delete(steps, last, every) == gone


@given(st.lists(st.integers(0, 10**6)), st.integers(-1, 5), st.integers(0, 50))
def test_newest_is_never_deleted(steps: list[int], last: int, every: int) -> None:
    gone = steps_to_delete(steps, last, every)
    assert set(gone) <= set(steps)
    assert not steps or max(steps) not in gone
    # Asking again after the deletion deletes no more.
    assert steps_to_delete(set(steps) - set(gone), last, every) == []
