"""The sum of numbered pieces in one fixed order of additions, whoever made which piece.

In: pieces 0 .. V-1, each a list of float32 tensors; rank r makes those with number % ranks == r. Out: their sum, on
every rank, with the same bits on any number of ranks that divides V.

The order, for V = T * (an odd number), T a power of two: first each of T sums runs over the pieces i, i + T, i + 2T ...
one after the other; then sum i and sum i + T/2 become one, those T/4 apart, and so on: numbers that differ in their
highest bit meet first. Pieces of one rank are far apart in number, hence a rank whose group has 1, 2, 4 ... T members
holds whole branches of the tree: it adds them up alone, depth first, while at most log2(V / ranks) + 2 pieces exist,
and the ranks exchange one sum each. On other numbers of ranks all V pieces are exchanged; the bits are the same.

The exchange: each rank gets its stretch of all sums, adds them up, and hands the result to all. That moves as many
bytes as an all-reduce, and the extra memory is twice a bucket.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from ii_dist.runtime.phases import UNTIMED, Phases

Tensors = list[torch.Tensor]
BUCKET_ELEMENTS = 1 << 22


def fold(first: int, stride: int, pieces: int, piece: Callable[[int], Tensors]) -> Tensors:
    """The sum of the pieces first, first + stride, ... below `pieces`; each piece is asked for once and added into.

    stride: a power of two that divides `pieces`.
    """
    if stride < (pieces & -pieces):
        total = fold(first, 2 * stride, pieces, piece)
        torch._foreach_add_(total, fold(first + stride, 2 * stride, pieces, piece))
        return total
    total = piece(first)
    for number in range(first + stride, pieces, stride):
        torch._foreach_add_(total, piece(number))
    return total


class FixedSum:
    """One rank's part in the sum of `pieces` pieces over `world_size` ranks, which divides their number."""

    def __init__(
        self,
        pieces: int,
        rank: int,
        world_size: int,
        bucket_elements: int = BUCKET_ELEMENTS,
        phases: Phases = UNTIMED,
    ) -> None:
        assert pieces % world_size == 0
        self._phases = phases
        self._pieces, self._rank, self._world_size = pieces, rank, world_size
        self._bucket_elements = bucket_elements
        self._buffers: torch.Tensor | None = None
        self._holds_branches = (pieces & -pieces) % world_size == 0

    def over_ranks(self, piece: Callable[[int], Tensors]) -> Tensors:
        """The sum; `piece` makes this rank's pieces, in an order of its own. Collective."""
        if self._holds_branches:
            mine = [fold(self._rank, self._world_size, self._pieces, piece)]
        else:
            mine = [piece(number) for number in range(self._rank, self._pieces, self._world_size)]
        if self._world_size > 1:
            self._phases.begin("allreduce")
            for start, stop in self._buckets(mine[0]):
                self._exchange([tensors[start:stop] for tensors in mine])
        return mine[0]

    def _buckets(self, tensors: Tensors) -> Iterator[tuple[int, int]]:
        start = elements = 0
        for place, tensor in enumerate(tensors):
            if elements and elements + tensor.numel() > self._bucket_elements:
                yield start, place
                start = place
                elements = 0
            elements += tensor.numel()
        yield start, len(tensors)

    @torch.no_grad()
    def _exchange(self, mine: list[Tensors]) -> None:
        """Replace mine[0] by the sum over all ranks' pieces."""
        ranks, count = self._world_size, len(mine)
        stretch = -(-sum(tensor.numel() for tensor in mine[0]) // ranks)
        told, heard = self._two_buffers(count * ranks * stretch, mine[0][0])
        told_PF, heard_RPS = told.view(count, -1), heard.view(ranks, count, stretch)
        told_PF[:, -ranks:] = 0.0  # where the stretches end behind the tensors
        for flat_F, tensors in zip(told_PF, mine, strict=True):
            torch._foreach_copy_(_views(flat_F, tensors), tensors)
        dist.all_to_all_single(heard_RPS, told_PF.view(count, ranks, stretch).transpose(0, 1).contiguous())
        (sum_S,) = fold(0, 1, ranks * count, lambda number: [heard_RPS[number % ranks, number // ranks]])
        answer_RS, sum_RS = told_PF[0].view(ranks, stretch), heard[: ranks * stretch].view(ranks, stretch)
        answer_RS.copy_(sum_S.expand(ranks, stretch))
        dist.all_to_all_single(sum_RS, answer_RS)  # all-gather does the same, on gloo more slowly
        torch._foreach_copy_(mine[0], _views(sum_RS.view(-1), mine[0]))

    def _two_buffers(self, elements: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Kept from step to step: on a CPU fresh memory costs more than what is done with it here."""
        if self._buffers is None or self._buffers.shape[1] < elements:
            self._buffers = like.new_empty(2, elements)
        return self._buffers[0, :elements], self._buffers[1, :elements]


def _views(flat_F: torch.Tensor, tensors: Tensors) -> Tensors:
    """One after the other, in the shapes of `tensors`."""
    sizes = [tensor.numel() for tensor in tensors]
    parts = torch.split(flat_F[: sum(sizes)], sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
