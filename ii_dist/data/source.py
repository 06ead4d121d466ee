"""The seam between data and the loop: batches in order, and a place in them that is free of the number of ranks.

In: a `Schedule` (which images each batch holds) and a `Producer` (makes those images: DALI, PIL or synthetic). Out: a
`BatchSource`. What a producer is told stands in `Request`; it draws and decides nothing itself, so that every producer
is exact for the same reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ii_dist.config.schema import DataConfig
from ii_dist.data.augment import EvalWindows, TrainWindows, eval_windows, train_windows
from ii_dist.data.digests import Outlook
from ii_dist.data.positions import Position, Rows, Schedule

if TYPE_CHECKING:  # annotations only: a config check or a tool imports this room without torch
    import torch

    from ii_dist.data.index import Index


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch of one rank, on its device.

    images_NCHW: float32, normalized; strides are channels-last where that was asked for. labels_N: int64.
    weight_N: float32, 1 counts and 0 is padding (evaluation only). index_N: int64, row in the index.
    """

    images_NCHW: torch.Tensor
    labels_N: torch.Tensor
    weight_N: torch.Tensor
    index_N: torch.Tensor


class BatchSource(Protocol):
    """Batches of one rank. Every rank makes its own source and gets equally many batches; no rank waits for another."""

    def __iter__(self) -> Iterator[Batch]:
        """From `position()` on. Training: micro-batches without end, from epoch to epoch. Evaluation: the rest of one
        pass; the next `iter` starts a new pass. Raises DataError where an image cannot be read."""

    def position(self) -> Position:
        """Where the next batch not yet handed out begins. Prefetched batches do not count. Costs nothing."""

    def seek(self, position: Position) -> None:
        """Go on from `position`, which any number of ranks may have saved. Decodes nothing. Raises ConfigError where
        no batch begins there (another global batch)."""

    def outlook(self) -> Outlook:
        """What comes next, without reading it: for a check between ranks. Costs nothing."""

    def close(self) -> None:
        """Stop threads and free buffers; call it last, twice does no harm. Batches handed out stay valid."""


class Producer(Protocol):
    """Makes the images of numbered batches, some ahead of their use."""

    def start(self, number: int) -> None:
        """Make `number` the next batch and forget what was prepared. Called before the first `next` and by a seek."""

    def next(self) -> Batch:
        """Wait for the next batch."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Request:
    """What a producer is to make. device: "cpu" or "cuda:N". index: None for synthetic images."""

    cfg: DataConfig
    schedule: Schedule
    train: bool
    seed: int
    device: str
    channels_last: bool
    threads: int
    index: Index | None = None

    @property
    def side(self) -> int:
        """Height and width of the images, pixels."""
        return self.cfg.image_size if self.train else self.cfg.eval_image_size

    def windows(self, rows: Rows) -> TrainWindows | EvalWindows:
        """What is cut out of the images of one batch."""
        assert self.index is not None
        width_N, height_N = self.index.width[rows.index_N], self.index.height[rows.index_N]
        if self.train:
            return train_windows(self.seed, rows.epoch, rows.index_N, width_N, height_N, self.cfg.augment)
        return eval_windows(width_N, height_N, self.cfg.eval_resize, self.cfg.eval_image_size)


class NumberedSource:
    """A `BatchSource`: counts batches and leaves their making to a producer."""

    def __init__(self, request: Request, producer: Producer) -> None:
        self._request, self._schedule, self._producer = request, request.schedule, producer
        self._number = 0
        producer.start(0)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = self._producer.next()
            self._number += 1
            last = self._number % self._schedule.batches_per_pass == 0
            yield batch
            if last and not self._schedule.endless:
                return

    def position(self) -> Position:
        return self._schedule.position(self._number)

    def seek(self, position: Position) -> None:
        self._number = self._schedule.number(position)
        self._producer.start(self._number)

    def outlook(self) -> Outlook:
        return Outlook(self._request, self._number)

    def close(self) -> None:
        self._producer.close()
