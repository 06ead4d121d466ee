"""Images made of numbers: no files, the same contract, cheap, and learnable.

In: a `Request`. Out: batches whose images are a pure function of (seed, split, row): a coarse coloured pattern of the
class, plus noise cut from one fixed strip at a place drawn for the image. The class of row i is i modulo classes.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from ii_dist.data.counter import bits, key, uniform
from ii_dist.data.mix_images import mix_pair
from ii_dist.data.positions import Rows
from ii_dist.data.source import Batch, Request, beside_images

_GRID = 4
_PATTERN_STREAM, _NOISE_STREAM, _PLACE_STREAM = 11, 12, 13
F32 = NDArray[np.float32]


class SyntheticProducer:
    """Makes each batch when it is asked for: there is nothing to wait for, so nothing is made ahead."""

    def __init__(self, request: Request) -> None:
        self._request, self._number = request, 0
        self._noise_strip: F32 = np.empty(0, np.float32)

    def start(self, number: int) -> None:
        self._number = number

    def next(self) -> Batch:
        rows = self._request.schedule.rows(self._number)
        self._number += 1
        labels_N = rows.index_N % self._request.cfg.synthetic_classes
        mixing, images_NHWC = self._request.mixing(rows), self._images(rows, labels_N)
        if mixing is not None:
            for pair in range(len(labels_N) // 2):
                mix_pair(images_NHWC, mixing, pair, channels_last=True)
        device, dtype = self._request.device, getattr(torch, self._request.dtype)
        images_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).to(device, dtype)
        if not self._request.channels_last:
            images_NCHW = images_NCHW.contiguous()
        beside = beside_images(labels_N, rows, mixing)
        return Batch(images_NCHW, *(torch.from_numpy(array).to(device) for array in beside))

    def close(self) -> None:
        pass

    def _images(self, rows: Rows, labels_N: NDArray[np.int64]) -> F32:
        side = self._request.side(rows.epoch)
        cells = np.arange(side) * _GRID // side  # pixel -> cell of the pattern
        self._lay_out_noise(2 * 3 * side * side)
        images_NHWC = np.empty((len(labels_N), side, side, 3), dtype=np.float32)
        place_key = key(self._request.seed, _PLACE_STREAM, int(self._request.train))
        place_N = bits(place_key, rows.index_N.astype(np.uint64)) % np.uint64(3 * side * side)
        for image_HWC, label, place in zip(images_NHWC, labels_N, place_N, strict=True):
            noise = self._noise_strip[int(place) : int(place) + image_HWC.size].reshape(image_HWC.shape)
            np.add(self._pattern(int(label))[cells[:, None], cells], noise, out=image_HWC)
        return images_NHWC

    def _lay_out_noise(self, values: int) -> None:
        """Make the strip long enough; what is there stays."""
        if self._noise_strip.size < values:
            strip = uniform(key(self._request.seed, _NOISE_STREAM), np.arange(values, dtype=np.uint64))
            self._noise_strip = ((strip - 0.5) * 2).astype(np.float32)

    def _pattern(self, label: int) -> F32:
        """Colours of the class's cells, grid x grid x 3, in [-1, 1)."""
        counter = np.arange(_GRID * _GRID * 3, dtype=np.uint64)
        values = 2 * uniform(key(self._request.seed, _PATTERN_STREAM, label), counter) - 1
        return values.astype(np.float32).reshape(_GRID, _GRID, 3)
