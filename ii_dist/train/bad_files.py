"""What a run does about images that cannot be read: counts them over all ranks, lists them, stops when they are many.

In: the records of the sources. Out: tags for the boards, lines in ``quarantine.jsonl``, and a DataError that every
rank raises at the same step.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from ii_dist.config import DataError, Plan, RunConfig, RunFolder
from ii_dist.data import BatchSource
from ii_dist.data.quarantine import BadFile, append_quarantine, read_quarantine
from ii_dist.data.substitute import allowed
from ii_dist.runtime.group import sum_over_ranks

logger = logging.getLogger(__name__)

_NAMED = 3  # files that an error names


class BadFileLedger:
    """The bad files of one attempt. A run that is resumed inside an epoch counts that epoch's from 0 again."""

    def __init__(self, cfg: RunConfig, plan: Plan, folder: RunFolder, step: int, train_source: BatchSource) -> None:
        """step: steps done before."""
        self._cfg, self._plan, self._list = cfg, plan, folder.quarantine
        self._record = train_source.bad_files
        self._step = step
        self._replaced: Counter[int] = Counter()  # epoch -> images of all ranks

    def row(self, step: int) -> list[int]:
        """Counts of this rank for the steps up to `step` since the last call, to be added up over ranks."""
        counts = self._record.take()
        write_down(self._list, counts.new)
        return [*(counts.replaced[epoch] for epoch in self._epochs(step)), counts.retries]

    def tags(self, step: int, sums: Sequence[int]) -> dict[str, float]:
        """What the sums over all ranks of `row(step)` come to."""
        *replaced, retries = sums
        self._replaced.update(dict(zip(self._epochs(step), replaced, strict=True)))
        self._step = step
        return {"data/substituted_images": float(sum(replaced)), "data/read_retries": float(retries)}

    def check(self) -> None:
        """Raise DataError, on every rank alike, where an epoch had more bad images than are allowed."""
        for epoch, bad in self._replaced.items():
            refuse_many(self._cfg, bad, self._plan.train_images, f"epoch {epoch}", self._list)
        for epoch in [epoch for epoch in self._replaced if epoch < self._epoch(self._step)]:
            del self._replaced[epoch]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Write down what came up since the last line of numbers."""
        write_down(self._list, self._record.take().new)

    def _epochs(self, step: int) -> range:
        """Since the last call. All ranks are at this step, so these and the length of a row are the same for all."""
        return range(self._epoch(self._step + 1), self._epoch(step) + 1)

    def _epoch(self, step: int) -> int:
        """The epoch of the images that step number `step`, from 1, trains on."""
        return (step - 1) // self._plan.steps_per_epoch


def count_left_out(source: BatchSource, quarantine: Path | None = None) -> int:
    """Evaluation images of all ranks that could not be read since the last call, written down. Collective."""
    counts = source.bad_files.take()
    if quarantine is not None:
        write_down(quarantine, counts.new)
    return sum_over_ranks([counts.replaced.total()])[0]


def refuse_many(cfg: RunConfig, bad: int, images: int, where: str, quarantine: Path | None = None) -> None:
    """Raise DataError where `bad` of `images` are more than data.max_bad_share allows."""
    most = allowed(images, cfg.data.max_bad_share)
    if bad <= most:
        return
    listed = _first_names(quarantine)
    raise DataError(
        f"{where}: {bad:,} images could not be read or decoded, {bad / images:.2%} of {images:,}; "
        f"data.max_bad_share {cfg.data.max_bad_share:g} allows {most:,}{listed}; "
        f"look at the data set with: python -m tools.scan_dataset {cfg.data.root}"
    )


def write_down(quarantine: Path, entries: Sequence[BadFile]) -> None:
    """Add new entries to the run's list. A list that cannot be written does not end the run."""
    if not entries:
        return
    try:
        append_quarantine(quarantine, entries)
    except (OSError, DataError) as error:
        logger.warning("%s: %d bad files could not be listed (%s)", quarantine, len(entries), error)


def _first_names(quarantine: Path | None) -> str:
    if quarantine is None:
        return ""
    try:
        paths = [f"{entry.split}/{entry.path}" for entry in read_quarantine(quarantine)[:_NAMED]]
    except DataError:  # it was not to be written either
        return ""
    return f" (the first ones: {', '.join(paths)}; all in {quarantine})" if paths else ""
