"""Which images are mixed with which, and how much: Mixup and CutMix as pure functions.

In: seed, epoch, index rows, the side of the images. Out: `Mixing`, executed by `mix_images`.

The partner of position 2j of an epoch's order is position 2j + 1, and the other way round: neighbours of a random
permutation are a random pair, other pairs in every epoch. Micro-batches hold whole pairs (`config.plan` sees to it), so
a rank never needs another rank's images, and pairs are the same on any number of ranks. Each image of a pair draws for
itself: whether it is mixed, by what, its share, its box.

Mixup: Zhang et al. 2017, arXiv 1710.09412. CutMix: Yun et al. 2019, arXiv 1905.04899.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ii_dist.config.augment import AugmentConfig
from ii_dist.data.counter import key, uniform
from ii_dist.data.exact_math import F64, power, quarter_cosine

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]

MIX_STREAM = 21  # apart from every other stream of draws; part of what a seed means, never changed
_DRAWS = 16  # places for draws of one image


@dataclass(frozen=True, slots=True)
class Mixing:
    """What happens to the images of one batch, whose neighbours 2j and 2j + 1 are partners.

    own_N: weight of the image's own pixels, the partner's have the rest (Mixup). box_N4: left, top, right, bottom of
    the box that shows the partner alone (CutMix); empty where there is none. label_share_N: share of the own label.
    """

    own_N: F32
    box_N4: I32
    label_share_N: F32


def draw_mixing(seed: int, epoch: int, index_N: NDArray[np.int64], side: int, cfg: AugmentConfig) -> Mixing:
    """How images `index_N` of `side` x `side` pixels are mixed in `epoch`."""
    counter = index_N.astype(np.uint64) * np.uint64(_DRAWS) + np.arange(7, dtype=np.uint64)[:, None]
    mixed, switch, first, second, sign, centre_x, centre_y = uniform(key(seed, epoch, MIX_STREAM), counter)
    cuts_N = switch < _cutmix_probability(cfg)
    shares = [symmetric_beta(alpha, first, second, sign) for alpha in (cfg.cutmix_alpha, cfg.mixup_alpha)]
    share_N = np.where(mixed < cfg.mix_probability, np.where(cuts_N, *shares), 1.0)
    box_N4 = _boxes(np.where(cuts_N, share_N, 1.0), centre_x, centre_y, side)
    own_N = np.where(cuts_N, 1.0, share_N).astype(np.float32)
    area_N = (box_N4[:, 2] - box_N4[:, 0]) * (box_N4[:, 3] - box_N4[:, 1])
    # Part of a box may lie outside the image: the label follows what is seen.
    label_share_N = np.where(cuts_N, 1 - area_N / (side * side), share_N).astype(np.float32)
    return Mixing(own_N, box_N4, label_share_N)


def symmetric_beta(alpha: float, first: F64, second: F64, sign: F64) -> F64:
    """Numbers of the distribution Beta(alpha, alpha), each from three uniform ones; all 1 for alpha 0.

    If X is Beta(a, a), (X - 1/2) / sqrt(X (1 - X)) is, but for a factor, Student's t with 2a degrees of freedom, which
    a polar rule draws without rejection (Bailey 1994; Devroye 1996, "Random variate generation in one line of code").
    """
    if alpha == 0:
        return np.ones_like(first)
    tail, cosine = power(1 - first, 1 / alpha), quarter_cosine(second)
    square = (1 - tail) * cosine * cosine
    distance = np.sqrt(square / np.maximum(tail + square, 1e-300))  # 0 in the middle, 1 at both ends
    return 0.5 + np.where(sign < 0.5, -0.5, 0.5) * distance


def partners_of(values_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """The value of each image's partner."""
    return np.ascontiguousarray(values_N.reshape(-1, 2)[:, ::-1]).reshape(-1)


def _cutmix_probability(cfg: AugmentConfig) -> float:
    if not cfg.mixup_alpha or not cfg.cutmix_alpha:
        return 1.0 if cfg.cutmix_alpha else 0.0
    return cfg.mix_switch_probability


def _boxes(share_N: F64, centre_x: F64, centre_y: F64, side: int) -> I32:
    """Squares of 1 - share of the area around any pixel, cut at the image's edge."""
    length_N = np.floor(side * np.sqrt(1 - share_N))
    before_N = np.floor(length_N / 2)
    low_2N = np.floor(np.stack([centre_x, centre_y]) * side) - before_N
    box_4N = np.concatenate([low_2N, low_2N + length_N]).clip(0, side)
    return np.ascontiguousarray(box_4N.T.astype(np.int32))
