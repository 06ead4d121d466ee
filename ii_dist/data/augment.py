"""Random and fixed windows of images as pure functions.

In: seed, epoch, index rows and image sizes. Out: crop windows, flips and erased rectangles for training; resize and
crop sizes for evaluation. The readers execute these and draw nothing themselves. What changes colours and shapes within
the window stands in `policies`.

Semantics are torchvision's: RandomResizedCrop (ten tries of an area and a width/height ratio, then the largest centre
window of an allowed ratio), RandomHorizontalFlip, RandomErasing (ten tries as well, then nothing), Resize(shorter side)
+ CenterCrop. All of it uses only operations
that IEEE 754 rounds exactly (+ - * / sqrt), never the machine's exp or log, so that mixed machines agree bit by bit.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ii_dist.config.augment import AugmentConfig
from ii_dist.data.counter import bits, key, uniform
from ii_dist.data.exact_math import exp, log

I32 = NDArray[np.int32]
F64 = NDArray[np.float64]
Range = tuple[float, float]

TRIES = 10
# Streams keep the kinds of draws apart; numbers are part of what a seed means and never change.
CROP_STREAM, FLIP_STREAM, ERASE_STREAM, NOISE_STREAM = 1, 2, 23, 24
_DRAWS = 256  # places for draws of one image in one stream
NOISE_PLACES = 1 << 16  # where in the strip of noise an erased rectangle may begin


@dataclass(frozen=True, slots=True)
class TrainWindows:
    """What happens to each image of a training batch: cut a window (pixels), resize it, perhaps flip it."""

    x_N: I32
    y_N: I32
    width_N: I32
    height_N: I32
    flip_N: I32


@dataclass(frozen=True, slots=True)
class EraseWindows:
    """What is erased of each image (pixels after the resize; width 0 = nothing), and its place in the noise."""

    x_N: I32
    y_N: I32
    width_N: I32
    height_N: I32
    noise_N: I32


@dataclass(frozen=True, slots=True)
class EvalWindows:
    """What happens to each image of an evaluation batch: resize it whole, cut a square at (x, y)."""

    resized_width_N: I32
    resized_height_N: I32
    x_N: I32
    y_N: I32


def train_windows(
    seed: int, epoch: int, index_N: NDArray[np.int64], width_N: I32, height_N: I32, cfg: AugmentConfig
) -> TrainWindows:
    """Crop windows and flips of images `index_N` in `epoch`."""
    x_N, y_N, w_N, h_N = crop_windows(seed, epoch, index_N, width_N, height_N, cfg)
    return TrainWindows(x_N, y_N, w_N, h_N, flips(seed, epoch, index_N, cfg))


def crop_windows(
    seed: int, epoch: int, index_N: NDArray[np.int64], width_N: I32, height_N: I32, cfg: AugmentConfig
) -> tuple[I32, I32, I32, I32]:
    """Left, top, width, height of each window, pixels inside the image."""
    draw_TDN = draws(seed, epoch, CROP_STREAM, index_N, TRIES * 4).reshape(TRIES, 4, -1)
    w_TN, h_TN = _tried_sizes(draw_TDN, width_N.astype(np.float64) * height_N, cfg.crop_scale, cfg.crop_ratio)
    fits_TN = (w_TN > 0) & (w_TN <= width_N) & (h_TN > 0) & (h_TN <= height_N)
    found_N, x_N, y_N, w_N, h_N = _first_fit(draw_TDN, fits_TN, w_TN, h_TN, width_N, height_N)
    centre = _centre_windows(width_N, height_N, cfg)
    x_N, y_N, w_N, h_N = (np.where(found_N, a, b) for a, b in zip((x_N, y_N, w_N, h_N), centre, strict=True))
    return x_N.astype(np.int32), y_N.astype(np.int32), w_N.astype(np.int32), h_N.astype(np.int32)


def flips(seed: int, epoch: int, index_N: NDArray[np.int64], cfg: AugmentConfig) -> I32:
    """1 where the image is mirrored left to right, else 0."""
    flip_N: I32 = (draws(seed, epoch, FLIP_STREAM, index_N, 1)[0] < cfg.flip).astype(np.int32)
    return flip_N


def erase_windows(seed: int, epoch: int, index_N: NDArray[np.int64], side: int, cfg: AugmentConfig) -> EraseWindows:
    """Erased rectangles of images `index_N`, `side` x `side` pixels, in `epoch`."""
    draw_DN = draws(seed, epoch, ERASE_STREAM, index_N, TRIES * 4 + 2)
    draw_TDN, side_N = draw_DN[: TRIES * 4].reshape(TRIES, 4, -1), np.full(len(index_N), side, np.int32)
    w_TN, h_TN = _tried_sizes(draw_TDN, side_N.astype(np.float64) * side, cfg.erase_scale, cfg.erase_ratio)
    fits_TN = (w_TN > 0) & (w_TN < side) & (h_TN > 0) & (h_TN < side)  # a whole row or column is never erased
    found_N, x_N, y_N, w_N, h_N = _first_fit(draw_TDN, fits_TN, w_TN, h_TN, side_N, side_N)
    erased_N = found_N & (draw_DN[TRIES * 4] < cfg.erase_probability)
    noise_N = np.floor(draw_DN[TRIES * 4 + 1] * NOISE_PLACES)
    columns = (np.where(erased_N, of_N, 0).astype(np.int32) for of_N in (x_N, y_N, w_N, h_N, noise_N))
    return EraseWindows(*columns)


def noise_strip(seed: int, count: int) -> NDArray[np.float32]:
    """`count` numbers as good as normal (mean 0, deviation 1): sums of twelve uniform ones of 16 bits each."""
    words = bits(key(seed, NOISE_STREAM), np.arange(3 * count, dtype=np.uint64)).view(np.uint16)
    strip: NDArray[np.float32] = (words.reshape(count, 12).sum(axis=1) * 2.0**-16 - (6 - 6 * 2.0**-16)).astype(
        np.float32
    )
    return strip


def eval_windows(width_N: I32, height_N: I32, resize: int, crop: int) -> EvalWindows:
    """Sizes after the shorter side became `resize`, and the corner of the centre square of side `crop`, pixels."""
    width, height = width_N.astype(np.int64), height_N.astype(np.int64)
    # The longer side is cut to whole pixels, the margins are rounded half to even: as torchvision does.
    w_N = np.where(width <= height, resize, resize * width // height)
    h_N = np.where(height <= width, resize, resize * height // width)
    x_N, y_N = np.rint((w_N - crop) / 2), np.rint((h_N - crop) / 2)
    return EvalWindows(w_N.astype(np.int32), h_N.astype(np.int32), x_N.astype(np.int32), y_N.astype(np.int32))


def _tried_sizes(draw_TDN: F64, area_N: F64, scale: Range, ratio: Range) -> tuple[F64, F64]:
    """Width and height of the windows of all tries, whole pixels."""
    area_TN = _between(draw_TDN[:, 0], *scale) * area_N
    ratio_TN = exp(_between(draw_TDN[:, 1], log(ratio[0]), log(ratio[1])))
    return np.rint(np.sqrt(area_TN * ratio_TN)), np.rint(np.sqrt(area_TN / ratio_TN))


def _first_fit(
    draw_TDN: F64, fits_TN: NDArray[np.bool_], w_TN: F64, h_TN: F64, width_N: I32, height_N: I32
) -> tuple[NDArray[np.bool_], F64, F64, F64, F64]:
    """Whether any try fits; left, top, width and height of the first that does."""
    first_N, column_N = fits_TN.argmax(axis=0), np.arange(fits_TN.shape[1])
    w_N, h_N = w_TN[first_N, column_N], h_TN[first_N, column_N]
    x_N = np.floor(draw_TDN[first_N, 2, column_N] * (width_N - w_N + 1))
    y_N = np.floor(draw_TDN[first_N, 3, column_N] * (height_N - h_N + 1))
    found_N: NDArray[np.bool_] = fits_TN[first_N, column_N]
    return found_N, x_N, y_N, w_N, h_N


def draws(seed: int, epoch: int, stream: int, index_N: NDArray[np.int64], count: int) -> F64:
    """`count` x N uniform numbers; row d belongs to draw d of the image, whatever else stands in the batch."""
    counter = index_N.astype(np.uint64) * np.uint64(_DRAWS) + np.arange(count, dtype=np.uint64)[:, None]
    return uniform(key(seed, epoch, stream), counter)


def _centre_windows(width_N: I32, height_N: I32, cfg: AugmentConfig) -> tuple[F64, F64, F64, F64]:
    smallest, largest = cfg.crop_ratio
    width, height = width_N.astype(np.float64), height_N.astype(np.float64)
    ratio = width / height
    w_N = np.where(ratio > largest, np.rint(height * largest), width)
    h_N = np.where(ratio < smallest, np.rint(width / smallest), height)
    w_N, h_N = np.maximum(w_N, 1), np.maximum(h_N, 1)
    return (width - w_N) // 2, (height - h_N) // 2, w_N, h_N


def _between(draw: F64, low: float, high: float) -> F64:
    return low + draw * (high - low)
