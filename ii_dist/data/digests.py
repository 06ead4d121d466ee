"""What a source is about to read, told without reading it, and whether all ranks together read what they should. Pure.

In: the `Request` that a source's producer works from, the number of its next batch. Out: `Outlook`, one rank's side;
what the plan says (`expected_rows`); the difference between what all ranks tell and that, in words.

The index rows come from the schedule in use, not from the plan, so that a rank that was given another rank's number,
seed or place is seen. An epoch too large to look at whole is looked at where it begins, in its middle and at its end:
a schedule is one formula for all batches, and formulas go wrong at the borders.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ii_dist.config.plan import Plan
from ii_dist.data.order import epoch_indices
from ii_dist.data.positions import Position, Rows, Schedule

if TYPE_CHECKING:
    from ii_dist.data.source import Request

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]

LOOK_AT_IMAGES = 65_536
PADDING = -1
_VARIED = 16  # fewer different parameters than this on a rank prove nothing: augmentation may be off or coarse


@dataclass(frozen=True, slots=True)
class Outlook:
    """What the source of one rank hands out from batch `number` on."""

    request: "Request"
    number: int

    @property
    def position(self) -> Position:
        return self.request.schedule.position(self.number)

    @property
    def index_sha256(self) -> str:
        """Hex digest of the index that the source reads; "" for synthetic images."""
        return "" if self.request.index is None else self.request.index.digest

    def rows(self, numbers: Sequence[int]) -> I64:
        """Index rows of the batches `numbers`, as many rows as numbers, PADDING where an image weighs nothing."""
        each = [self.request.schedule.rows(number) for number in numbers]
        return np.stack([np.where(rows.weight_N > 0, rows.index_N, PADDING) for rows in each])

    def parameter_hashes(self, epoch: int, index_N: I64) -> U64:
        """64 bits for each image of `index_N`: what is done to it in `epoch`; zeros for synthetic ones, which stay."""
        if self.request.index is None:
            return np.zeros(len(index_N), dtype=np.uint64)
        parameters = self.request.windows(Rows(epoch, index_N, np.ones(len(index_N), dtype=np.float32)))
        columns = _columns(parameters, len(index_N))
        rows = zip(*columns, strict=True)
        return np.array([_hash64(b"".join(parts)) for parts in rows], dtype=np.uint64)


def batches_to_look_at(schedule: Schedule, world_size: int, first: int, limit: int = LOOK_AT_IMAGES) -> list[int]:
    """Numbers of batches from `first` on: the next, as many as `limit` images of all ranks allow, the one in the middle
    of the rest, the last of the epoch, and the first of the next where there is one."""
    end = (first // schedule.batches_per_pass + 1) * schedule.batches_per_pass
    near = range(first, min(end, first + max(1, limit // (world_size * schedule.batch))))
    far = {(near.stop + end) // 2, end - 1, end}
    return sorted(number for number in {*near, *far} if schedule.endless or number < end)


def expected_rows(plan: Plan, seed: int, numbers: Sequence[int], eval_batch: int = 0) -> I64:
    """What the plan gives each rank in the batches `numbers`: ranks x numbers x batch. eval_batch 0: training."""
    at_once = plan.world_size * (eval_batch or plan.micro_batch)
    number_M = np.array(numbers, dtype=np.int64)
    if eval_batch:
        rows_MN = number_M[:, None] * at_once + np.arange(at_once)
        rows_MN[rows_MN >= plan.eval_images] = PADDING
    else:
        epoch_M, in_epoch_M = np.divmod(number_M, plan.steps_per_epoch * plan.accumulate_steps)
        position_MN = in_epoch_M[:, None] * at_once + np.arange(at_once)
        rows_MN = np.empty_like(position_MN)
        for epoch in np.unique(epoch_M):
            here = epoch_M == epoch
            rows = epoch_indices(plan.train_images, seed, int(epoch), position_MN[here].ravel())
            rows_MN[here] = rows.reshape(-1, at_once)
    return rows_MN.reshape(len(numbers), plan.world_size, -1).transpose(1, 0, 2)


def describe_difference(found_WMN: I64, expected_WMN: I64, epoch_M: I64) -> str:
    """What is wrong with the rows that the ranks tell (ranks x batches x images, batch m in epoch `epoch_M[m]`), in
    words; "" where nothing is."""
    shared = _shared_images(found_WMN, epoch_M)
    wrong = [rank for rank in range(len(found_WMN)) if not np.array_equal(found_WMN[rank], expected_WMN[rank])]
    if not wrong and not shared:
        return ""
    said = []
    if shared:
        first, second, count = shared
        if first == second:
            said.append(f"rank {first} reads an image twice in one epoch ({count:,} read more than once)")
        else:
            said.append(f"ranks {first} and {second} read the same images ({count:,} read more than once)")
    said += [_whose_share(found_WMN[rank], expected_WMN, rank) for rank in wrong[:3]]
    if len(wrong) > 3:
        said.append(f"and {len(wrong) - 3} more ranks read what is not theirs")
    return "; ".join(said)


def describe_equal_parameters(hashes_WN: U64) -> str:
    """Ranks whose images, different ones, all get the same crops and flips; "" where there are none. Where few images
    are looked at or few parameters vary, equality is chance, and nothing is said."""
    seen: dict[bytes, int] = {}
    for rank, hash_N in enumerate(hashes_WN):
        if len(np.unique(hash_N)) < _VARIED:
            continue
        first = seen.setdefault(hash_N.tobytes(), rank)
        if first != rank:
            return f"ranks {first} and {rank} augment their images with the same random numbers"
    return ""


def _shared_images(found_WMN: I64, epoch_M: I64) -> tuple[int, int, int] | None:
    """Two ranks (or one, twice) that read the same image in one epoch, and how many images are read more than once."""
    world_size, batches, batch = found_WMN.shape
    rank_K = np.repeat(np.arange(world_size), batches * batch)
    epoch_K = np.tile(np.repeat(epoch_M, batch), world_size)
    row_K = found_WMN.ravel()
    counted = row_K != PADDING
    rank_K, epoch_K, row_K = rank_K[counted], epoch_K[counted], row_K[counted]
    order = np.lexsort((rank_K, row_K, epoch_K))
    rank_K, epoch_K, row_K = rank_K[order], epoch_K[order], row_K[order]
    again = np.flatnonzero((row_K[1:] == row_K[:-1]) & (epoch_K[1:] == epoch_K[:-1]))
    if not again.size:
        return None
    # Two different ranks say more than one rank twice.
    between = again[rank_K[again] != rank_K[again + 1]]
    pairs = between if between.size else again
    at = int(pairs[np.lexsort((rank_K[pairs + 1], rank_K[pairs]))[0]])
    images = len(np.unique(np.stack([epoch_K[again], row_K[again]]), axis=1).T)
    return int(rank_K[at]), int(rank_K[at + 1]), images


def _whose_share(found_MN: I64, expected_WMN: I64, rank: int) -> str:
    owners = np.flatnonzero((expected_WMN == found_MN).all(axis=(1, 2)))
    if owners.size:
        return f"rank {rank} reads the share of rank {int(owners[0])}"
    strangers = int((found_MN != expected_WMN[rank]).sum())
    return f"{strangers:,} of {found_MN.size:,} images of rank {rank} are not those of its share"


def _columns(parameters: object, count: int) -> list[list[bytes]]:
    """The bytes of each image's entry in every array of a (nested) dataclass of arrays."""
    columns: list[list[bytes]] = []
    for field in dataclasses.fields(parameters):  # type: ignore[arg-type]  # a dataclass of the augmentation
        value = getattr(parameters, field.name)
        if dataclasses.is_dataclass(value):
            columns += _columns(value, count)
        elif isinstance(value, np.ndarray) and value.ndim and len(value) == count:
            columns.append([entry.tobytes() for entry in value])
    return columns


def _hash64(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
