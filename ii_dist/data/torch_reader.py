"""The same batches without DALI: PIL decodes in threads.

In: a `Request`. Out: batches on the rank's device. Everything but the decoder is what the DALI reader does on the CPU.
"""

import io

import numpy as np
import torch
from PIL import Image

from ii_dist.config.errors import DataError
from ii_dist.data.ahead import Ahead
from ii_dist.data.augment import TrainWindows
from ii_dist.data.resample import Finisher
from ii_dist.data.source import Batch, Request, moved, pinned

Box = tuple[int, int, int, int]  # left, top, right, bottom


class TorchProducer:
    """Decodes `prefetch_batches` batches ahead, each split over `threads` threads."""

    def __init__(self, request: Request) -> None:
        assert request.index is not None
        self._request, self._index = request, request.index
        self._finisher = Finisher(request)
        self._ahead: Ahead[Batch] | None = None
        self._first = 0

    def start(self, number: int) -> None:
        self._stop()
        self._first = number

    def next(self) -> Batch:
        if self._ahead is None:
            self._ahead = Ahead(self._make, self._first, self._request.cfg.prefetch_batches)
        batch = self._ahead.next()
        if self._request.device == "cpu":
            return batch
        return moved(batch, self._request.device)

    def close(self) -> None:
        self._stop()
        self._finisher.close()

    def _stop(self) -> None:
        if self._ahead:
            self._ahead.close()
            self._ahead = None

    def _make(self, number: int) -> Batch:
        rows = self._request.schedule.rows(number)
        windows = self._request.windows(rows)

        def decoded(i: int) -> torch.Tensor:
            return self._decode(int(rows.index_N[i]), _box(windows, i) if isinstance(windows, TrainWindows) else None)

        batch = self._finisher.batch(rows, windows, decoded)
        if self._request.device == "cpu":
            return batch
        return pinned(batch)

    def _decode(self, row: int, box: Box | None) -> torch.Tensor:
        """Image `row`, or what lies in `box`: uint8, height x width x 3."""
        content = self._index.read_bytes(row)
        try:
            with Image.open(io.BytesIO(content.data)) as file:
                # Cut first: the conversion works pixel by pixel, and copies even what is RGB already.
                image = (file.crop(box) if box else file).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error).splitlines()[0]
            raise DataError(f"{self._index.place(row)[0]}: cannot be decoded ({reason})") from None
        return torch.from_numpy(np.array(image))


def _box(windows: TrainWindows, i: int) -> Box:
    x, y = int(windows.x_N[i]), int(windows.y_N[i])
    return x, y, x + int(windows.width_N[i]), y + int(windows.height_N[i])
