"""The order of an epoch: a permutation, random access, the same for ever."""

from itertools import pairwise

import numpy as np
import pytest

from ii_dist.data.counter import bits, key, uniform
from ii_dist.data.order import epoch_indices

GOLDEN_1797 = [1433, 99, 480, 1215, 1480, 1326]
GOLDEN_IMAGENET = [1061668, 914281, 1236384, 1096760, 21189, 988944]


@pytest.mark.parametrize("images", [1, 2, 3, 4, 5, 7, 8, 9, 64, 65, 100, 1797, 60_000, 65_536, 65_537])
def test_every_row_comes_exactly_once(images: int) -> None:
    for epoch in (0, 1):
        rows = epoch_indices(images, 3, epoch, np.arange(images))
        assert np.array_equal(np.sort(rows), np.arange(images))


def test_any_position_alone_gives_what_all_positions_give() -> None:
    whole = epoch_indices(1797, 3, 2, np.arange(1797))
    some = np.array([1796, 0, 5, 5, 900])
    assert np.array_equal(epoch_indices(1797, 3, 2, some), whole[some])
    assert epoch_indices(1797, 3, 2, np.arange(0)).size == 0


def test_epochs_and_seeds_differ() -> None:
    orders = [epoch_indices(1797, seed, epoch, np.arange(1797)) for seed in (0, 1) for epoch in (0, 1, 2)]
    for i, a in enumerate(orders):
        for b in orders[i + 1 :]:
            # Two independent orders agree at a place with chance 1/1797: about once.
            assert int((a == b).sum()) < 10


def test_a_position_holds_any_row_equally_often() -> None:
    images, epochs = 100, 4000
    count = np.zeros((3, images))
    for epoch in range(epochs):
        for i, row in enumerate(epoch_indices(images, 11, epoch, np.array([0, 50, 99]))):
            count[i, row] += 1
    expected = epochs / images
    for chi_square in ((count - expected) ** 2 / expected).sum(axis=1):
        assert 50 < chi_square < 165  # 99 degrees of freedom: outside once in 10,000


def test_neighbours_are_not_neighbours_afterwards() -> None:
    rows = epoch_indices(60_000, 0, 0, np.arange(60_000))
    near = sum(abs(int(a) - int(b)) < 60 for a, b in pairwise(rows))
    assert 60 < near < 180  # chance 2 * 60 / 60,000 each: about 120
    assert abs(np.corrcoef(rows, np.arange(60_000))[0, 1]) < 0.02


def test_the_order_never_changes_by_accident() -> None:
    assert epoch_indices(1797, 0, 0, np.arange(6)).tolist() == GOLDEN_1797
    assert epoch_indices(1_281_167, 42, 89, np.arange(1_281_161, 1_281_167)).tolist() == GOLDEN_IMAGENET


def test_a_billion_images_cost_no_memory() -> None:
    rows = epoch_indices(10**9, 1, 1, np.arange(10**9 - 4, 10**9))
    assert len(set(rows.tolist())) == 4
    assert rows.min() >= 0
    assert rows.max() < 10**9


def test_bits_are_those_of_splitmix64() -> None:
    # First outputs for state 1234567 as published with the reference implementation.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert bits(1234567, np.arange(1, 5, dtype=np.uint64)).tolist() == published


def test_keys_depend_on_every_part_and_its_place() -> None:
    keys = {key(*parts) for parts in [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (2**63 - 1, 5), (2**63 - 2, 5)]}
    assert len(keys) == 8
    assert all(0 <= k < 2**64 for k in keys)


def test_uniform_numbers_fill_the_interval() -> None:
    draws = uniform(key(1, 2), np.arange(100_000, dtype=np.uint64))
    assert draws.dtype == np.float64
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    assert abs(draws.mean() - 0.5) < 0.005
    counts = np.histogram(draws, bins=100, range=(0, 1))[0]
    assert 50 < ((counts - 1000) ** 2 / 1000).sum() < 165
