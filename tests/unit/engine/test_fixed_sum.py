"""The order of additions: that of the tree written out, whoever holds which piece, with few pieces alive at a time."""

import math

import pytest
import torch

from ii_dist.engine.fixed_sum import FixedSum, fold


def pieces(count: int) -> list[torch.Tensor]:
    """Numbers whose sum depends on the order."""
    g = torch.Generator().manual_seed(count)
    return [torch.randn(50, generator=g) * 10 ** torch.randint(-6, 6, (50,), generator=g) for _ in range(count)]


def tree(values: list[torch.Tensor]) -> torch.Tensor:
    """Level by level, from the leaves: first runs over an odd number of pieces, then halves laid on each other."""
    twos = math.gcd(len(values), 1 << 20)
    sums = []
    for first in range(twos):
        total = values[first]
        for value in values[first + twos :: twos]:
            total = total + value
        sums.append(total)
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [one + other for one, other in zip(sums[:half], sums[half:], strict=True)]
    return sums[0]


@pytest.mark.parametrize("count", range(1, 25))
def test_branches_of_ranks_make_the_same_tree(count: int) -> None:
    values = pieces(count)
    expected = tree(values)
    assert torch.equal(fold(0, 1, count, lambda n: [values[n].clone()])[0], expected)
    for ranks in (n for n in (1, 2, 4, 8) if count % n == 0):
        branches = [fold(rank, ranks, count, lambda n: [values[n].clone()])[0] for rank in range(ranks)]
        assert torch.equal(fold(0, 1, ranks, lambda rank, held=branches: [held[rank]])[0], expected)  # type: ignore[misc]


def test_another_order_has_other_bits() -> None:
    values = pieces(8)
    assert not torch.equal(tree(values), torch.stack(values).cumsum(0)[-1])


@pytest.mark.parametrize(("count", "most"), [(1, 1), (2, 2), (8, 4), (64, 7), (24, 5)])
def test_few_pieces_are_alive_at_once(count: int, most: int) -> None:
    alive, peak, made = 0, 0, []

    class Piece(torch.Tensor):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def piece(number: int) -> list[torch.Tensor]:
        nonlocal alive, peak
        alive += 1
        peak = max(peak, alive)
        made.append(number)
        return [torch.ones(1).as_subclass(Piece)]

    (total,) = FixedSum(count, 0, 1).over_ranks(piece)
    assert float(total) == count
    assert sorted(made) == list(range(count))
    assert peak <= most
