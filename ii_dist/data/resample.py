"""Decoded pixels to normalized batches on the CPU: all that the readers of files have in common, but the decoder.

In: uint8 pixels of one image, its window. Out: normalized values in its place of a batch, mixed with its partner's
where that is asked for.

    resize, cut     one image: uint8 to uint8
    Normalizer      one image, perhaps mirrored: uint8 into its float32 slot
    Finisher        a whole batch, in threads; `retouch` changes colours and shapes in between, where that is asked for

Everything works on one image (or pair) in one thread, so the number of threads changes no bit. The resize is torch's
for uint8: linear with antialiasing, at most 1/255 from PIL's BILINEAR, several times as fast.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional

from ii_dist.data.ahead import Chunks
from ii_dist.data.augment import EvalWindows, TrainWindows
from ii_dist.data.image_ops import SERIAL_VALUES, normalizing
from ii_dist.data.mix_images import F32, mix_pair
from ii_dist.data.positions import Rows
from ii_dist.data.retouch import make_retouch
from ii_dist.data.source import Batch, Request, beside_images


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
        # A whole row of each: three values to broadcast would be too short for vector instructions.
        self._mean, self._scale = (
            each_C11.view(3).repeat(side, 1) if channels_last else each_C11.repeat(1, 1, side)
            for each_C11 in normalizing(mean, std)
        )
        rows_at_once = max(1, SERIAL_VALUES // (3 * side))
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
    """Makes batches of decoded images, the images shared out among `request.threads` threads; one batch at a time."""

    def __init__(self, request: Request) -> None:
        assert request.index is not None
        self._request, self._label = request, request.index.label
        self._chunks = Chunks(request.threads, quick_s=0)
        self._normalizers: dict[int, Normalizer] = {}
        self._retouch = make_retouch(request, "cpu")
        self._dtype: torch.dtype = getattr(torch, request.dtype)
        self._kept = np.empty(0, dtype=np.float32)

    def batch(self, rows: Rows, windows: TrainWindows | EvalWindows, decoded: Callable[[int], torch.Tensor]) -> Batch:
        """A batch on the CPU, its memory its own. decoded(i): uint8 pixels (height x width x 3) of the i-th image:
        its window for training, the whole for evaluation; called once for each i, in any thread."""
        side, count, last = self._request.side(rows.epoch), len(rows.index_N), self._request.channels_last
        slots = self._room((count, side, side, 3) if last else (count, 3, side, side))
        normalizer, mixing = self._normalizer(side), self._request.mixing(rows)

        touches = self._retouch.draw(rows, side) if self._retouch else None

        def finish(i: int) -> None:
            image_HWC = cut(decoded(i), windows, i, side)
            mirrored = isinstance(windows, TrainWindows) and bool(windows.flip_N[i])
            if touches and touches.changes(i):
                image_HWC, mirrored = touches.changed(i, image_HWC, mirrored), False
            slot = torch.from_numpy(slots[i])
            normalizer.write(image_HWC, mirrored, slot)
            if touches:
                touches.erase(i, slot.permute(2, 0, 1) if last else slot)

        self._chunks.each(finish, count)
        if mixing is not None:
            self._chunks.each(lambda pair: mix_pair(slots, mixing, pair, last), count // 2)
        images = self._converted(slots)
        beside = beside_images(self._label[rows.index_N].astype(np.int64), rows, mixing)
        images_NCHW = images.permute(0, 3, 1, 2) if last else images
        return Batch(images_NCHW, *(torch.from_numpy(array) for array in beside))

    def _normalizer(self, side: int) -> Normalizer:
        """One for each side that the images have had."""
        if side not in self._normalizers:
            cfg = self._request.cfg
            self._normalizers[side] = Normalizer(cfg.mean, cfg.std, side, self._request.channels_last)
        return self._normalizers[side]

    def _room(self, shape: tuple[int, ...]) -> F32:
        """Where a batch is finished: memory of its own, or for images of another type memory that is used again."""
        # numpy asks the system for huge pages; torch's own memory would cost more in page faults than the writing.
        if self._dtype == torch.float32:
            return np.empty(shape, dtype=np.float32)
        if self._kept.shape != shape:
            self._kept = np.empty(shape, dtype=np.float32)
        return self._kept

    def _converted(self, slots: F32) -> torch.Tensor:
        """The finished batch in the type that was asked for."""
        finished = torch.from_numpy(slots)
        if self._dtype == torch.float32:
            return finished
        images = torch.from_numpy(np.empty(slots.shape, dtype=np.int16)).view(self._dtype)

        def convert(i: int) -> None:
            pieces = -(-finished[i].numel() // SERIAL_VALUES)
            for to, piece in zip(images[i].view(-1).chunk(pieces), finished[i].view(-1).chunk(pieces), strict=True):
                to.copy_(piece)

        self._chunks.each(convert, len(images))
        return images

    def close(self) -> None:
        self._chunks.close()
