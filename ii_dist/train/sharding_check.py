"""Before the first step: do all ranks together read every image once, in equally many steps, each its own share?

In: the sources that the run will read from, at the position where it starts or goes on. Out: nothing, or the same one
line and exit code on every rank. First the ranks compare a row of facts of fixed length; only when these agree do they
tell their index rows of the batches looked at, for then all rows are of one length. Rank 0 judges and tells all.
"""

import dataclasses
import logging
import struct
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ii_dist.config import ClusterError, DataError, Plan, RunConfig, recipe_sha256
from ii_dist.data import BatchSource
from ii_dist.data.digests import (
    I64,
    PADDING,
    U64,
    Outlook,
    batches_to_look_at,
    describe_difference,
    describe_equal_parameters,
    expected_rows,
)
from ii_dist.runtime import World
from ii_dist.runtime.group import all_gather_bytes
from ii_dist.train.agree import on_rank0

logger = logging.getLogger(__name__)

_HASHED = 64  # images of each rank whose parameters it tells
_HASHED_AGAIN = 8  # images of each rank whose parameters rank 0 computes again
_START = "start the ranks with launch or torchrun, all with the same config"


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What all ranks must agree on. Names are told to the user with '_' read as ' '."""

    number_of_ranks: int
    seed: int
    images_a_batch: int
    batches_an_epoch: int
    start_epoch: int
    start_image: int
    index: str
    recipe: str

    _FORMAT = "<6q32s32s"

    def pack(self) -> bytes:
        numbers = [getattr(self, name) for name in _NUMBERS]
        return struct.pack(self._FORMAT, *numbers, bytes.fromhex(self.index), bytes.fromhex(self.recipe))

    @classmethod
    def unpack(cls, row: bytes) -> "Facts":
        *numbers, index, recipe = struct.unpack(cls._FORMAT, row)
        values: list[Any] = [*numbers, index.hex(), recipe.hex()]
        return cls(*values)


_NUMBERS = [field.name for field in dataclasses.fields(Facts) if field.type is int]


def check_sharding(cfg: RunConfig, plan: Plan, world: World, *sources: BatchSource) -> None:
    """Compare what all ranks are about to read from `sources` (training, evaluation). Collective.

    Raises ClusterError or DataError on all ranks alike: other facts, a missing image, one read twice, a share that
    belongs to another rank, other augmentations, or the same for different images.
    """
    started_s = time.monotonic()
    looked_at = 0
    for source in sources:
        outlook = source.outlook()
        _compare_facts(_facts(cfg, plan, outlook), world, outlook.request.train)
        looked_at += _compare_rows(cfg, plan, world, outlook)
    logger.info(
        "sharding check: %d ranks look ahead at %d images, each rank at its own, each image once (%.0f ms)",
        *(world.world_size, looked_at, 1000 * (time.monotonic() - started_s)),
    )


def _facts(cfg: RunConfig, plan: Plan, outlook: Outlook) -> Facts:
    schedule = outlook.request.schedule
    return Facts(
        number_of_ranks=plan.world_size,
        seed=outlook.request.seed,
        images_a_batch=schedule.batch,
        batches_an_epoch=schedule.batches_per_pass,
        start_epoch=outlook.position.epoch,
        start_image=outlook.position.offset,
        index=outlook.index_sha256 or "0" * 64,
        recipe=recipe_sha256(cfg),
    )


def _compare_facts(mine: Facts, world: World, train: bool) -> None:
    """Collective. Every rank sees the same rows, so that every rank raises the same error."""
    facts = [Facts.unpack(row) for row in all_gather_bytes(mine.pack())]
    ranks = len(facts)
    for field in dataclasses.fields(Facts):
        values = [getattr(fact, field.name) for fact in facts]
        other = next((rank for rank in range(ranks) if values[rank] != values[0]), None)
        if other is None:
            continue
        name, kind = field.name.replace("_", " "), "training" if train else "evaluation"
        said = [value[:12] if isinstance(value, str) else f"{value}" for value in (values[0], values[other])]
        text = (
            f"ranks do not agree on what they read in {kind}: {name} is {said[0]} on rank 0, {said[1]} on rank {other}"
        )
        if field.name == "index":
            split = "train" if train else "val"
            raise DataError(f"{text}; data.root must hold the same {split}.index on every node")
        raise ClusterError(f"{text}; {_START}")
    if facts[0].number_of_ranks != ranks:
        raise ClusterError(f"the plan is for {facts[0].number_of_ranks} ranks, but {ranks} have met; {_START}")


def _compare_rows(cfg: RunConfig, plan: Plan, world: World, outlook: Outlook) -> int:
    """Collective. Returns the number of images looked at."""
    numbers = batches_to_look_at(outlook.request.schedule, plan.world_size, outlook.number)
    gathered = all_gather_bytes(tell(outlook, numbers))
    return int(on_rank0(world, lambda: judge(plan, cfg.seed, outlook, numbers, gathered)))


def tell(outlook: Outlook, numbers: Sequence[int]) -> bytes:
    """What a rank says: its index rows in the batches `numbers` (int64), then, in training, what is done to the first
    of these images (64 bits each)."""
    rows_MN, epoch_M = outlook.rows(numbers), _epochs(outlook, numbers)
    told = rows_MN.astype("<i8").tobytes()
    if not outlook.request.train:
        return told
    first = int(epoch_M[0])
    return told + outlook.parameter_hashes(first, rows_MN[epoch_M == first].ravel()[:_HASHED]).astype("<u8").tobytes()


def judge(plan: Plan, seed: int, outlook: Outlook, numbers: Sequence[int], gathered: Sequence[bytes]) -> str:
    """Rank 0: the number of images, if what all ranks say, in the order of the group, is what the plan says.

    Raises ClusterError where it is not.
    """
    batch, epoch_M = outlook.request.schedule.batch, _epochs(outlook, numbers)
    told = np.frombuffer(b"".join(gathered), dtype="<i8").reshape(len(gathered), -1)
    rows = len(numbers) * batch
    found_WMN: I64 = told[:, :rows].astype(np.int64).reshape(len(gathered), len(numbers), batch)
    expected_WMN = expected_rows(plan, seed, numbers, eval_batch=0 if outlook.request.train else batch)
    if wrong := describe_difference(found_WMN, expected_WMN, epoch_M):
        raise ClusterError(
            f"{wrong}; a rank reads by its number in the whole run (RANK), never by that in its node (LOCAL_RANK): "
            f"{_START}"
        )
    if outlook.request.train and (
        wrong := _compare_hashes(outlook, found_WMN, epoch_M, told[:, rows:].view(np.uint64))
    ):
        raise ClusterError(wrong)
    return str(int((found_WMN != PADDING).sum()))


def _epochs(outlook: Outlook, numbers: Sequence[int]) -> I64:
    return np.array(numbers, dtype=np.int64) // outlook.request.schedule.batches_per_pass


def _compare_hashes(outlook: Outlook, found_WMN: I64, epoch_M: I64, hashes_WN: U64) -> str:
    """Rank 0: do equal images get equal parameters on every rank, and different ones their own?"""
    if equal := describe_equal_parameters(hashes_WN):
        return f"{equal}; parameters must be drawn by image, not by place: this is a fault of the augmentation"
    told_WN, epoch = hashes_WN[:, :_HASHED_AGAIN], int(epoch_M[0])
    rows_WN = found_WMN[:, epoch_M == epoch].reshape(len(found_WMN), -1)[:, :_HASHED_AGAIN]
    again_WN = outlook.parameter_hashes(epoch, rows_WN.ravel()).reshape(told_WN.shape)
    other = np.flatnonzero((again_WN != told_WN).any(axis=1))
    if other.size:
        return (
            f"rank {int(other[0])} augments its images otherwise than rank 0 would: its node has another version of "
            "ii_dist or numpy; install the same on all nodes"
        )
    return ""
