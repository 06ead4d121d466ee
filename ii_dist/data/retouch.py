"""Colour jitter, policies and random erasing, applied to images: one by one on the CPU, a batch together on a GPU.

In: uint8 images at their final size, and the rows of the index that they are. Out: uint8 images, and after these were
normalized the same with rectangles erased. What happens to an image is drawn by `policies` and `augment` for its row
alone, and computed by `image_ops` as if it stood alone: a batch's composition changes no bit.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from ii_dist.config.augment import AugmentConfig
from ii_dist.data import image_ops
from ii_dist.data.augment import NOISE_PLACES, EraseWindows, erase_windows, noise_strip
from ii_dist.data.image_ops import normalizing, pieces
from ii_dist.data.policies import Op, Operations, draw_operations, operands
from ii_dist.data.positions import Rows
from ii_dist.data.source import Request


def is_retouched(request: Request) -> bool:
    """False where nothing but windows and flips is asked for, as in evaluation."""
    cfg = request.cfg.augment
    return request.train and (any(cfg.colour_jitter) or cfg.policy != "none" or cfg.erase_probability > 0)


def make_retouch(request: Request, device: str) -> "Retouch | None":
    """None where there is nothing to do."""
    return Retouch(request, device) if is_retouched(request) else None


class Retouch:
    """Draws what happens to the images of each batch, and owns what does not change between batches."""

    def __init__(self, request: Request, device: str) -> None:
        self._seed, self._cfg, self._device = request.seed, request.cfg.augment, device
        fill = np.zeros(3) if self._cfg.policy_fill == "zero" else np.rint(np.array(request.cfg.mean) * 255)
        self._fill_C = torch.tensor(fill, dtype=torch.float32, device=device)
        self._mean_C11, self._scale_C11 = (
            of_C11.to(device) for of_C11 in normalizing(request.cfg.mean, request.cfg.std)
        )
        self._layout = torch.channels_last if request.channels_last else torch.contiguous_format
        self._noise: torch.Tensor | None = None

    def finished(self, images_NCHW: torch.Tensor, rows: Rows) -> torch.Tensor:
        """A whole batch on its device, uint8 and mirrored already, as `Finisher` makes it on the CPU: normalized."""
        touches = self.draw(rows, images_NCHW.shape[-1])
        changed_NCHW = touches.changed_all(images_NCHW).to(torch.float32, memory_format=self._layout)
        normalized_NCHW = changed_NCHW.sub_(self._mean_C11).mul_(self._scale_C11)
        touches.erase_all(normalized_NCHW)
        return normalized_NCHW

    def draw(self, rows: Rows, side: int) -> "Touches":
        """For images of `side` x `side` pixels."""
        drawn = draw_operations(self._seed, rows.epoch, rows.index_N, self._cfg, side)
        erased = None
        if self._cfg.erase_probability > 0:
            erased = erase_windows(self._seed, rows.epoch, rows.index_N, side, self._cfg)
        return Touches(drawn, erased, self._fill_C, self._noise_for(side, self._cfg))

    def _noise_for(self, side: int, cfg: AugmentConfig) -> torch.Tensor | None:
        """Noise from which each erased image takes 3 x side x side numbers in a row; longer for larger images."""
        if cfg.erase_probability == 0 or cfg.erase_fill == "zero":
            return None
        needed = NOISE_PLACES + 3 * side * side
        if self._noise is None or len(self._noise) < needed:
            self._noise = torch.from_numpy(noise_strip(self._seed, needed)).to(self._device)
        return self._noise


class Touches:
    """What happens to the images of one batch. Methods that take `i` work on the CPU, in any thread; `changed_all` and
    `erase_all` work on any device."""

    def __init__(
        self, drawn: Operations, erased: EraseWindows | None, fill_C: torch.Tensor, noise: torch.Tensor | None
    ) -> None:
        self._drawn, self._erased, self._fill_C, self._noise = drawn, erased, fill_C, noise

    def changes(self, i: int) -> bool:
        """Whether `changed` would change anything but the direction."""
        return bool(self._drawn.op_KN[:, i].any())

    def changed(self, i: int, image_HWC: torch.Tensor, mirrored: bool) -> torch.Tensor:
        """The i-th image, mirrored first where asked for, then changed: uint8, height x width x 3."""
        height, width, _ = image_HWC.shape
        image_1CHW = torch.empty((1, 3, height, width), dtype=torch.uint8)
        for out, part_HWC in zip(pieces(image_1CHW), pieces(image_HWC, 0), strict=True):
            out[0].copy_((part_HWC.flip(1) if mirrored else part_HWC).permute(2, 0, 1))
        op_K = self._drawn.op_KN[:, i]
        one = Operations(op_K[:, None], self._drawn.value_KN[:, i : i + 1])
        operand_K16 = torch.from_numpy(operands(one, height).astype(np.float32))
        for op, operand_16 in zip(op_K, operand_K16, strict=True):
            image_1CHW = image_ops.apply(Op(op), image_1CHW, operand_16, self._fill_C)
        return image_1CHW[0].permute(1, 2, 0)

    def erase(self, i: int, image_CHW: torch.Tensor) -> None:
        """Erase the i-th image's rectangle, if it has one, in place. `image_CHW`: normalized."""
        if self._erased is None or not self._erased.width_N[i]:
            return
        x, y = int(self._erased.x_N[i]), int(self._erased.y_N[i])
        window = (..., slice(y, y + int(self._erased.height_N[i])), slice(x, x + int(self._erased.width_N[i])))
        if self._noise is None:
            for part in pieces(image_CHW[window]):
                part.zero_()
            return
        first = int(self._erased.noise_N[i])
        noise_CHW = self._noise[first : first + image_CHW.numel()].view(image_CHW.shape)
        for part, noise in zip(pieces(image_CHW[window]), pieces(noise_CHW[window]), strict=True):
            part.copy_(noise)

    def changed_all(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """All images, mirrored already, after their operations; in each step an operation runs once, for those that get
        it. The argument stays as it was."""
        if not self._drawn.op_KN.any():
            return images_NCHW
        images_NCHW = images_NCHW.clone()
        order_KN = np.argsort(self._drawn.op_KN, axis=1, kind="stable")
        operand_KN6 = operands(self._drawn, images_NCHW.shape[-1])
        operand_KN6 = np.take_along_axis(operand_KN6, order_KN[..., None], axis=1)
        places_KN, values_KN6 = _sent(order_KN, images_NCHW), _sent(operand_KN6.astype(np.float32), images_NCHW)
        for op_N, place_N, value_N6 in zip(self._drawn.op_KN, places_KN, values_KN6, strict=True):
            first = 0
            for code, count in enumerate(np.bincount(op_N, minlength=len(Op))):
                group, first = slice(first, first + int(count)), first + int(count)
                if count and code != Op.IDENTITY:
                    chosen = images_NCHW.index_select(0, place_N[group])
                    chosen = image_ops.apply(Op(code), chosen, value_N6[group], self._fill_C)
                    images_NCHW.index_copy_(0, place_N[group], chosen)
        return images_NCHW

    def erase_all(self, images_NCHW: torch.Tensor) -> None:
        """Erase the rectangles of all images, in place. `images_NCHW`: normalized."""
        if self._erased is None or not (found := np.flatnonzero(self._erased.width_N)).size:
            return
        of = self._erased
        numbers = np.stack([found, *(n_N[found] for n_N in (of.x_N, of.y_N, of.width_N, of.height_N, of.noise_N))])
        place_M, x, y, width, height, first = _sent(numbers.astype(np.int64), images_NCHW).unbind(0)
        chosen_MCHW = images_NCHW.index_select(0, place_M)
        _, channels, rows, columns = images_NCHW.shape
        across = torch.arange(columns, device=images_NCHW.device) - x[:, None]
        down = torch.arange(rows, device=images_NCHW.device) - y[:, None]
        is_across, is_down = (across >= 0) & (across < width[:, None]), (down >= 0) & (down < height[:, None])
        is_inside = (is_down[:, :, None] & is_across[:, None, :])[:, None]
        values: torch.Tensor | int = 0
        if self._noise is not None:
            pixel = torch.arange(channels * rows * columns, device=images_NCHW.device).view(channels, rows, columns)
            values = self._noise[first[:, None, None, None] + pixel].to(images_NCHW.dtype)
        images_NCHW.index_copy_(0, place_M, torch.where(is_inside, values, chosen_MCHW))


def _sent(array: NDArray[np.int64] | NDArray[np.float32], like: torch.Tensor) -> torch.Tensor:
    """On the device of `like`, without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor if like.device.type == "cpu" else tensor.pin_memory().to(like.device, non_blocking=True)
