"""Decoded pixels to normalized batches on the CPU: all that the readers of files have in common, but the decoder.

In: uint8 pixels of one image, its window. Out: float32 values in its place of a batch.

    resize, cut     one image: uint8 to uint8
    Normalizer      one image, perhaps mirrored: uint8 into its float32 slot
    Finisher        a whole batch, in threads

Everything works on one image in one thread, so the number of threads changes no bit. The resize is torch's for uint8:
linear with antialiasing, at most 1/255 from PIL's BILINEAR, several times as fast.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional

from ii_dist.data.ahead import Chunks
from ii_dist.data.augment import EvalWindows, TrainWindows
from ii_dist.data.positions import Rows
from ii_dist.data.source import Batch, Request

# torch starts threads of its own, for each thread of ours, where an elementwise operation has more values than this.
_SERIAL_VALUES = 32768


def resize(image_HWC: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`image_HWC` (uint8) at another size, uint8; linear, antialiased where it shrinks."""
    # The batch axis comes first, then the turn: only so does torch see channels-last memory and take its fast kernel.
    image_NCHW = image_HWC[None].permute(0, 3, 1, 2)
    resized_NCHW = functional.interpolate(image_NCHW, (height, width), mode="bilinear", antialias=True)
    return resized_NCHW[0].permute(1, 2, 0)


def cut(image_HWC: torch.Tensor, windows: TrainWindows | EvalWindows, i: int, side: int) -> torch.Tensor:
    """The i-th image of a batch at its final size, uint8, not yet mirrored. `image_HWC`: as `Finisher` gets it."""
    if isinstance(windows, TrainWindows):
        return resize(image_HWC, side, side)
    whole_HWC = resize(image_HWC, int(windows.resized_height_N[i]), int(windows.resized_width_N[i]))
    x, y = int(windows.x_N[i]), int(windows.y_N[i])
    return whole_HWC[y : y + side, x : x + side]


class Normalizer:
    """Writes (pixel / 255 - mean) / std of square uint8 images, mirrored or not, into slots of a batch.

    A slot is side x side x 3 where channels_last, else 3 x side x side. Subtraction and multiplication are rounded one
    after the other, never fused, so that both layouts hold the same bits.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], side: int, channels_last: bool) -> None:
        self._channels_last = channels_last
        mean_C = (torch.tensor(mean, dtype=torch.float64) * 255).float()
        scale_C = (1 / (torch.tensor(std, dtype=torch.float64) * 255)).float()
        # A whole row of each: three values to broadcast would be too short for vector instructions.
        self._mean, self._scale = (
            each_C.repeat(side, 1) if channels_last else each_C[:, None, None].repeat(1, 1, side)
            for each_C in (mean_C, scale_C)
        )
        rows_at_once = max(1, _SERIAL_VALUES // (3 * side))
        self._pieces = -(-side // rows_at_once)

    def write(self, image_HWC: torch.Tensor, mirrored: bool, slot: torch.Tensor) -> None:
        """Fill `slot`, some rows at a time: they stay in the cache from one operation to the next."""
        parts = slot.chunk(self._pieces, 0 if self._channels_last else 1)
        for part, piece_HWC in zip(parts, image_HWC.chunk(self._pieces), strict=True):
            # As bytes the mirrored rows cost little; a view that runs backwards would cost the vector instructions.
            pixels_HWC = piece_HWC.flip(1) if mirrored else piece_HWC
            pixels = pixels_HWC if self._channels_last else pixels_HWC.permute(2, 0, 1)
            part.copy_(pixels).sub_(self._mean).mul_(self._scale)


class Finisher:
    """Makes batches of decoded images, the images shared out among `request.threads` threads."""

    def __init__(self, request: Request) -> None:
        assert request.index is not None
        self._request, self._label = request, request.index.label
        self._chunks = Chunks(request.threads, quick_s=0)
        self._normalizer = Normalizer(request.cfg.mean, request.cfg.std, request.side, request.channels_last)

    def batch(self, rows: Rows, windows: TrainWindows | EvalWindows, decoded: Callable[[int], torch.Tensor]) -> Batch:
        """A batch on the CPU, its memory its own. decoded(i): uint8 pixels (height x width x 3) of the i-th image:
        its window for training, the whole for evaluation; called once for each i, in any thread."""
        side, count = self._request.side, len(rows.index_N)
        shape = (count, side, side, 3) if self._request.channels_last else (count, 3, side, side)
        # numpy asks the system for huge pages; torch's own memory would cost more in page faults than the writing.
        slots = torch.from_numpy(np.empty(shape, dtype=np.float32))

        def finish(i: int) -> None:
            mirrored = isinstance(windows, TrainWindows) and bool(windows.flip_N[i])
            self._normalizer.write(cut(decoded(i), windows, i, side), mirrored, slots[i])

        self._chunks.each(finish, count)
        images_NCHW = slots.permute(0, 3, 1, 2) if self._request.channels_last else slots
        arrays = (self._label[rows.index_N].astype(np.int64), rows.weight_N, rows.index_N)
        return Batch(images_NCHW, *(torch.from_numpy(array) for array in arrays))

    def close(self) -> None:
        self._chunks.close()
