"""What takes the place of an image that cannot be read or decoded: a pure rule, and one batch that follows it.

In: the rows that a batch asks for, and word of a place that failed. Out: the rows that it is made of instead.

Training: candidate k (1, 2, ...) for row i in epoch e is row ``hash(seed, e, i, k) mod N``; the first candidate that
decodes takes the place, with its own label and its own augmentation. Nothing else enters: not the batch, the number of
ranks or threads, nor what failed before, so every resume and every world size sees the same images. Evaluation: no
substitute; the place keeps its row, is filled with a blank image and weighs 0.
"""

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ii_dist.config.errors import DataError
from ii_dist.data.counter import key
from ii_dist.data.positions import Rows

CANDIDATES = 64
"""How many images are tried in a bad one's place."""
ALWAYS_ALLOWED = 3
"""Bad files that stop no run, however small its data set, unless its share is set to 0."""
_STREAM = 0x73756273746974  # "substit": keeps these keys apart from those of the order and of the augmentation

# An 1x1 black PNG: what an evaluation batch holds where there is no image. Both readers make one size of any size.
BLANK_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c49444154789c63606060000000040001f61738550000000049454e44ae426082"
)


def candidate(seed: int, epoch: int, row: int, turn: int, images: int) -> int:
    """The row that is tried, as number `turn` (1 is the first), in the place of `row`."""
    return key(_STREAM, seed, epoch, row, turn) % images


def allowed(images: int, max_bad_share: float) -> int:
    """How many of `images` may be bad before the run stops; a share of 0 allows none."""
    return max(ALWAYS_ALLOWED, int(max_bad_share * images)) if max_bad_share else 0


@dataclass(frozen=True, slots=True)
class Refused:
    """A file that could not be read or decoded. sha256: hex, of the bytes that were read; None for no bytes."""

    row: int
    epoch: int
    reason: str
    sha256: str | None


class Picks:
    """The rows of one batch; `refuse` puts the next candidate into a place. Threads may refuse different places."""

    def __init__(self, asked: Rows, seed: int, images: int, train: bool, name: Callable[[int], str]) -> None:
        """name(row): what a person calls the row's file."""
        self.rows = asked
        self.refused: list[Refused] = []
        self.blank: set[int] = set()
        """Places without an image (evaluation only)."""
        self._asked, self._seed, self._images, self._train, self._name = asked, seed, images, train, name
        self._turns: dict[int, int] = {}
        self._lost = 0
        self._lock = threading.Lock()

    @property
    def replaced(self) -> int:
        """Images that another one stands for, or, in evaluation, that no longer count."""
        return len(self._turns) if self._train else self._lost

    def refuse(self, place: int, reason: str, content: NDArray[np.uint8] | None = None) -> None:
        """Give up the file at `place`. Raises DataError where all its candidates were given up before."""
        with self._lock:
            row = int(self.rows.index_N[place])
            digest = None if content is None else hashlib.sha256(content.data).hexdigest()
            self.refused.append(Refused(row, self.rows.epoch, reason, digest))
            if self._train:
                self._turn(place)
            else:
                self._leave_out(place)

    def _turn(self, place: int) -> None:
        turn = self._turns[place] = self._turns.get(place, 0) + 1
        asked = int(self._asked.index_N[place])
        if turn > CANDIDATES:
            raise DataError(
                f"{self._name(asked)}: neither it nor any of {CANDIDATES} other images tried in its place can be read "
                f"({self.refused[-1].reason}); look at the data set with: python -m tools.scan_dataset"
            )
        index_N = self.rows.index_N.copy()
        index_N[place] = candidate(self._seed, self.rows.epoch, asked, turn, self._images)
        self.rows = replace(self.rows, index_N=index_N)

    def _leave_out(self, place: int) -> None:
        self.blank.add(place)
        self._lost += int(self.rows.weight_N[place])  # padding did not count before either
        weight_N = self.rows.weight_N.copy()
        weight_N[place] = 0
        self.rows = replace(self.rows, weight_N=weight_N)
