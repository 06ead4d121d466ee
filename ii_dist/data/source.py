"""The seam between data and the loop: batches in order, and a place in them that is free of the number of ranks.

In: a `Schedule` (which images each batch holds) and a `Producer` (makes those images: DALI, PIL or synthetic). Out: a
`BatchSource`. What a producer is told stands in `Request`; it draws and decides nothing itself, so that every producer
is exact for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ii_dist.config.schema import DataConfig
from ii_dist.data.augment import EvalWindows, TrainWindows, eval_windows, train_windows
from ii_dist.data.bad_files import BadFiles
from ii_dist.data.digests import Outlook
from ii_dist.data.mix import Mixing, draw_mixing, partners_of
from ii_dist.data.positions import Position, Rows, Schedule
from ii_dist.data.substitute import Picks

if TYPE_CHECKING:  # annotations only: a config check or a tool imports this room without torch
    import torch

    from ii_dist.data.index import Index


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch of one rank, on its device.

    images_NCHW: normalized, of `data.image_dtype`; strides are channels-last where that was asked for. labels_N: int64.
    weight_N: float32, 1 counts and 0 is padding (evaluation only). index_N: int64, row in the index.
    partner_labels_N: int64, labels of the images mixed in. label_share_N: float32, share of the own label, 1 where an
    image is not mixed; the partner's label has the rest. Both None where nothing is mixed.
    """

    images_NCHW: torch.Tensor
    labels_N: torch.Tensor
    weight_N: torch.Tensor
    index_N: torch.Tensor
    partner_labels_N: torch.Tensor | None = None
    label_share_N: torch.Tensor | None = None


class BatchSource(Protocol):
    """Batches of one rank. Every rank makes its own source and gets equally many batches; no rank waits for another."""

    bad_files: BadFiles
    """What could not be read in the batches handed out so far."""

    def __iter__(self) -> Iterator[Batch]:
        """From `position()` on. Training: micro-batches without end, from epoch to epoch. Evaluation: the rest of one
        pass; the next `iter` starts a new pass. Raises DataError where the data set changed or is out of reach; a
        single file that cannot be read or decoded gives way to another one (`ii_dist.data.substitute`)."""

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
    """What a producer is to make. device: "cpu" or "cuda:N". index: None for synthetic images. mix_epochs: epochs from
    the first on in which images are mixed; in evaluation none."""

    cfg: DataConfig
    schedule: Schedule
    train: bool
    seed: int
    device: str
    channels_last: bool
    threads: int
    index: Index | None = None
    mix_epochs: int = 0
    bad_files: BadFiles = field(default_factory=BadFiles)

    def side(self, epoch: int) -> int:
        """Height and width of the images of an epoch, pixels."""
        return self.cfg.side_of_epoch(epoch) if self.train else self.cfg.eval_image_size

    @property
    def dtype(self) -> str:
        """torch's name of the images' type; whoever knows the engine's precision has decided what auto is."""
        return "float32" if self.cfg.image_dtype == "auto" else self.cfg.image_dtype

    def mixing(self, rows: Rows) -> Mixing | None:
        """How the images of one batch are mixed, if they are."""
        if rows.epoch >= self.mix_epochs:
            return None
        return draw_mixing(self.seed, rows.epoch, rows.index_N, self.side(rows.epoch), self.cfg.augment)

    def picks(self, number: int) -> Picks:
        """The rows of batch `number`, of which some may turn out to be bad."""
        assert self.index is not None
        index = self.index
        return Picks(self.schedule.rows(number), self.seed, len(index), self.train, index.told)

    def windows(self, rows: Rows) -> TrainWindows | EvalWindows:
        """What is cut out of the images of one batch."""
        assert self.index is not None
        width_N, height_N = self.index.width[rows.index_N], self.index.height[rows.index_N]
        if self.train:
            return train_windows(self.seed, rows.epoch, rows.index_N, width_N, height_N, self.cfg.augment)
        return eval_windows(width_N, height_N, self.cfg.eval_resize, self.cfg.eval_image_size)


def beside_images(labels_N: NDArray[np.int64], rows: Rows, mixing: Mixing | None) -> tuple[NDArray[Any], ...]:
    """What a `Batch` holds after its images, in its order; without an end where nothing is mixed."""
    whole = (labels_N, rows.weight_N, rows.index_N)
    return whole if mixing is None else (*whole, partners_of(labels_N), mixing.label_share_N)


def pinned(batch: Batch) -> Batch:
    """`batch` in memory from which a GPU copies while the host goes on."""
    return _each(batch, lambda tensor: tensor.pin_memory())


def moved(batch: Batch, device: str) -> Batch:
    """`batch`, which is pinned, on its way to `device`."""
    return _each(batch, lambda tensor: tensor.to(device, non_blocking=True))


def _each(batch: Batch, do: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    tensors: dict[str, torch.Tensor | None] = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: do(tensor) for name, tensor in tensors.items() if tensor is not None})


class NumberedSource:
    """A `BatchSource`: counts batches and leaves their making to a producer. `also_close`: closed after that."""

    def __init__(self, request: Request, producer: Producer, also_close: Callable[[], None] | None = None) -> None:
        self._request, self._schedule, self.bad_files = request, request.schedule, request.bad_files
        self._producer, self._also_close = producer, also_close
        self._number = 0
        producer.start(0)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = self._producer.next()
            self.bad_files.handed_out(self._number)
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
        self.bad_files.forget()

    def outlook(self) -> Outlook:
        return Outlook(self._request, self._number)

    def close(self) -> None:
        self._producer.close()
        if self._also_close:
            self._also_close()
