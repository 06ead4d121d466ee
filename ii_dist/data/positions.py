"""Which positions of which epoch a rank reads in its n-th batch. Pure.

In: a `Plan` and a rank. Out: `Rows` (index rows and weights) for any batch number, and the exchange between batch
numbers and `Position`. Training: global step g takes positions g*B .. (g+1)*B; its micro-batch k takes the k-th of A
equal parts; rank r the r-th of W equal parts of that. Evaluation: positions in index order, rank r the r-th part of
W*b; positions past the end are filled with the last image at weight 0, so that all ranks make equally many batches.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ii_dist.config.errors import ConfigError
from ii_dist.config.plan import Plan
from ii_dist.data.order import epoch_indices


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the data that is free of the number of ranks: `offset` global images of `epoch` were handed out."""

    epoch: int
    offset: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Index rows of one batch of one rank. weight 0 marks padding."""

    epoch: int
    index_N: NDArray[np.int64]
    weight_N: NDArray[np.float32]


class Schedule(Protocol):
    """Numbers a rank's batches 0, 1, 2, ... and says what each of them holds."""

    endless: bool
    """False: one pass of `batches_per_pass`, then a stop."""
    batches_per_pass: int
    batch: int
    """Images a batch of one rank."""

    def rows(self, number: int) -> Rows: ...

    def position(self, number: int) -> Position: ...

    def number(self, position: Position) -> int: ...


class TrainSchedule:
    """Endless micro-batches of one rank, epoch after epoch; the tail that fills no global batch is left out."""

    endless = True

    def __init__(self, plan: Plan, rank: int, seed: int) -> None:
        self.batch = plan.micro_batch
        self.batches_per_pass = plan.steps_per_epoch * plan.accumulate_steps
        self._images, self._seed, self._rank = plan.train_images, seed, rank
        self._global_micro = plan.global_batch // plan.accumulate_steps

    def rows(self, number: int) -> Rows:
        epoch, in_epoch = divmod(number, self.batches_per_pass)
        first = in_epoch * self._global_micro + self._rank * self.batch
        positions = np.arange(first, first + self.batch, dtype=np.int64)
        index_N = epoch_indices(self._images, self._seed, epoch, positions)
        return Rows(epoch, index_N, np.ones(self.batch, dtype=np.float32))

    def position(self, number: int) -> Position:
        epoch, in_epoch = divmod(number, self.batches_per_pass)
        return Position(epoch, in_epoch * self._global_micro)

    def number(self, position: Position) -> int:
        in_epoch, rest = divmod(position.offset, self._global_micro)
        if rest or in_epoch > self.batches_per_pass or min(position.epoch, position.offset) < 0:
            raise ConfigError(
                f"train.global_batch: image {position.offset} of epoch {position.epoch} is no border of micro-batches "
                f"of {self._global_micro}; resume with the global batch that the position was saved with"
            )
        return position.epoch * self.batches_per_pass + in_epoch


class EvalSchedule:
    """One pass over all images in index order, the same number of batches on every rank."""

    endless = False

    def __init__(self, plan: Plan, rank: int, batch_per_rank: int) -> None:
        self.batch, self._rank = batch_per_rank, rank
        self._images, self._world_batch = plan.eval_images, plan.world_size * batch_per_rank
        self.batches_per_pass = -(-plan.eval_images // self._world_batch)

    def rows(self, number: int) -> Rows:
        first = number % self.batches_per_pass * self._world_batch + self._rank * self.batch
        positions = np.arange(first, first + self.batch, dtype=np.int64)
        weight_N = (positions < self._images).astype(np.float32)
        return Rows(0, np.minimum(positions, self._images - 1), weight_N)

    def position(self, number: int) -> Position:
        return Position(0, number % self.batches_per_pass * self._world_batch)

    def number(self, position: Position) -> int:
        number, rest = divmod(position.offset, self._world_batch)
        if rest or position.epoch or not 0 <= number < self.batches_per_pass:
            raise ConfigError(
                f"train.eval_batch_per_rank: image {position.offset} is no border of evaluation batches of "
                f"{self._world_batch}; start the evaluation anew"
            )
        return number
