"""The same batches without DALI: PIL decodes, cuts, resizes and flips in threads.

In: a `Request`. Out: batches on the rank's device. Windows and flips are those of the DALI pipeline; pixels differ a
little, because two libraries resample in different precision.
"""

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ii_dist.config.errors import DataError
from ii_dist.data.ahead import Ahead, Chunks
from ii_dist.data.augment import EvalWindows, TrainWindows
from ii_dist.data.source import Batch, Request


class TorchProducer:
    """Decodes `prefetch_batches` batches ahead, each split over `threads` threads."""

    def __init__(self, request: Request) -> None:
        assert request.index is not None
        self._request, self._index = request, request.index
        self._chunks = Chunks(request.threads)
        self._ahead: Ahead[Batch] | None = None
        self._first = 0
        self._mean_C = np.array(request.cfg.mean, dtype=np.float32) * 255
        self._scale_C = 1 / (np.array(request.cfg.std, dtype=np.float32) * 255)

    def start(self, number: int) -> None:
        self._stop()
        self._first = number

    def next(self) -> Batch:
        if self._ahead is None:
            self._ahead = Ahead(self._make, self._first, self._request.cfg.prefetch_batches)
        batch = self._ahead.next()
        if self._request.device == "cpu":
            return batch
        tensors = (batch.images_NCHW, batch.labels_N, batch.weight_N, batch.index_N)
        return Batch(*(tensor.to(self._request.device, non_blocking=True) for tensor in tensors))

    def close(self) -> None:
        self._stop()
        self._chunks.close()

    def _stop(self) -> None:
        if self._ahead:
            self._ahead.close()
            self._ahead = None

    def _make(self, number: int) -> Batch:
        request = self._request
        rows = request.schedule.rows(number)
        windows = request.train_windows(rows) if request.train else request.eval_windows(rows)
        side, count = request.side, len(rows.index_N)
        images = np.empty((count, side, side, 3) if request.channels_last else (count, 3, side, side), np.float32)

        def make_image(i: int) -> None:
            pixels_HWC = self._pixels(int(rows.index_N[i]), i, windows).astype(np.float32)
            pixels_HWC -= self._mean_C
            pixels_HWC *= self._scale_C
            images[i] = pixels_HWC if request.channels_last else pixels_HWC.transpose(2, 0, 1)

        self._chunks.each(make_image, count)
        images_NCHW = torch.from_numpy(images)
        if request.channels_last:
            images_NCHW = images_NCHW.permute(0, 3, 1, 2)
        if request.device != "cpu":
            images_NCHW = images_NCHW.pin_memory()
        arrays = (self._index.label[rows.index_N].astype(np.int64), rows.weight_N, rows.index_N)
        return Batch(images_NCHW, *(torch.from_numpy(array) for array in arrays))

    def _pixels(self, row: int, i: int, windows: TrainWindows | EvalWindows) -> NDArray[np.uint8]:
        """Image `row` cut as the i-th windows say: uint8, height x width x 3."""
        content = self._index.read_bytes(row)
        try:
            with Image.open(io.BytesIO(content.data)) as file:
                image = file.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error).splitlines()[0]
            raise DataError(f"{self._index.place(row)[0]}: cannot be decoded ({reason})") from None
        side = self._request.side
        if isinstance(windows, TrainWindows):
            x, y = int(windows.x_N[i]), int(windows.y_N[i])
            cut = image.crop((x, y, x + int(windows.width_N[i]), y + int(windows.height_N[i])))
            cut = cut.resize((side, side), Image.Resampling.BILINEAR)
            return np.asarray(cut)[:, ::-1] if windows.flip_N[i] else np.asarray(cut)
        size = int(windows.resized_width_N[i]), int(windows.resized_height_N[i])
        x, y = int(windows.x_N[i]), int(windows.y_N[i])
        return np.asarray(image.resize(size, Image.Resampling.BILINEAR).crop((x, y, x + side, y + side)))
