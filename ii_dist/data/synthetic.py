"""Images made of numbers: no files, the same contract, cheap, and learnable.

In: a `Request`. Out: batches whose images are a pure function of (seed, split, row): a coarse coloured pattern of the
class, plus noise cut from one fixed strip at a place drawn for the image. The class of row i is i modulo classes.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from ii_dist.data.counter import bits, key, uniform
from ii_dist.data.positions import Rows
from ii_dist.data.source import Batch, Request

_GRID = 4
_PATTERN_STREAM, _NOISE_STREAM, _PLACE_STREAM = 11, 12, 13
F32 = NDArray[np.float32]


class SyntheticProducer:
    """Makes each batch when it is asked for: there is nothing to wait for, so nothing is made ahead."""

    def __init__(self, request: Request) -> None:
        self._request, self._number = request, 0
        values = request.side * request.side * 3
        strip = uniform(key(request.seed, _NOISE_STREAM), np.arange(2 * values, dtype=np.uint64))
        self._noise_strip: F32 = ((strip - 0.5) * 2).astype(np.float32)
        self._cells = np.arange(request.side) * _GRID // request.side  # pixel -> cell of the pattern

    def start(self, number: int) -> None:
        self._number = number

    def next(self) -> Batch:
        rows = self._request.schedule.rows(self._number)
        self._number += 1
        labels_N = rows.index_N % self._request.cfg.synthetic_classes
        images_NCHW = torch.from_numpy(self._images(rows, labels_N)).permute(0, 3, 1, 2)
        if not self._request.channels_last:
            images_NCHW = images_NCHW.contiguous()
        arrays = (labels_N, rows.weight_N, rows.index_N)
        device = self._request.device
        return Batch(images_NCHW.to(device), *(torch.from_numpy(array).to(device) for array in arrays))

    def close(self) -> None:
        pass

    def _images(self, rows: Rows, labels_N: NDArray[np.int64]) -> F32:
        side, cells = self._request.side, self._cells
        images_NHWC = np.empty((len(labels_N), side, side, 3), dtype=np.float32)
        place_key = key(self._request.seed, _PLACE_STREAM, int(self._request.train))
        place_N = bits(place_key, rows.index_N.astype(np.uint64)) % np.uint64(self._noise_strip.size // 2)
        for image_HWC, label, place in zip(images_NHWC, labels_N, place_N, strict=True):
            noise = self._noise_strip[int(place) : int(place) + image_HWC.size].reshape(image_HWC.shape)
            np.add(self._pattern(int(label))[cells[:, None], cells], noise, out=image_HWC)
        return images_NHWC

    def _pattern(self, label: int) -> F32:
        """Colours of the class's cells, grid x grid x 3, in [-1, 1)."""
        counter = np.arange(_GRID * _GRID * 3, dtype=np.uint64)
        values = 2 * uniform(key(self._request.seed, _PATTERN_STREAM, label), counter) - 1
        return values.astype(np.float32).reshape(_GRID, _GRID, 3)
