"""Which operations change the pixels of an image, and how strongly, as pure functions.

In: seed, epoch, index rows, side of the images. Out: `Operations`: for each image a list of operations with one value
each, in the order in which they are applied: colour jitter, then the policy. `image_ops` executes them.

    jitter          torchvision's ColorJitter (timm's too)
    randaugment     timm's: n of 15 operations, each with a probability, at one magnitude
    trivialaugment  torchvision's TrivialAugmentWide: one of 14 operations, at one of 31 magnitudes
    autoaugment     torchvision's AutoAugment: one of the 25 pairs found for ImageNet (Cubuk et al. 2019)

As in `augment`, only operations that IEEE 754 rounds exactly are used, so that mixed machines draw the same.
"""

from dataclasses import dataclass
from enum import IntEnum, auto

import numpy as np
from numpy.typing import NDArray

from ii_dist.config.augment import AugmentConfig
from ii_dist.data.augment import F64, draws
from ii_dist.data.exact_math import sin_cos

I8 = NDArray[np.int8]

JITTER_STREAM, POLICY_STREAM = 21, 22


class Op(IntEnum):
    """An operation; behind it what its value means."""

    IDENTITY = 0
    SHEAR_X = auto()  # tangent of the angle
    SHEAR_Y = auto()
    TRANSLATE_X = auto()  # pixels to the right
    TRANSLATE_Y = auto()  # pixels down
    ROTATE = auto()  # degrees, counter-clockwise
    BRIGHTNESS = auto()  # factor; 1 changes nothing
    COLOUR = auto()
    CONTRAST = auto()
    SHARPNESS = auto()
    HUE = auto()  # turns; 0 changes nothing
    POSTERIZE = auto()  # bits that are kept
    SOLARIZE = auto()  # values from this on are inverted
    SOLARIZE_ADD = auto()  # is added to values below 128
    AUTOCONTRAST = auto()  # no value
    EQUALIZE = auto()
    INVERT = auto()


GEOMETRIC = (Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE)
ENHANCING = (Op.BRIGHTNESS, Op.COLOUR, Op.CONTRAST, Op.SHARPNESS)
_PLAIN = (Op.AUTOCONTRAST, Op.EQUALIZE)
JITTER_OPS = (Op.BRIGHTNESS, Op.CONTRAST, Op.COLOUR, Op.HUE)  # as in `colour_jitter`
RAND_OPS = (*GEOMETRIC, *ENHANCING, Op.POSTERIZE, Op.SOLARIZE, Op.SOLARIZE_ADD, *_PLAIN, Op.INVERT)
TRIVIAL_OPS = (Op.IDENTITY, *GEOMETRIC, *ENHANCING, Op.POSTERIZE, Op.SOLARIZE, *_PLAIN)
AUTO_OPS = (*TRIVIAL_OPS, Op.INVERT)

RAND_LEVELS = 10.0  # magnitudes of randaugment are of this
AUTO_BINS, TRIVIAL_BINS = 10, 31
AUTO_PAIRS = (  # operation, probability, magnitude
    ((Op.POSTERIZE, 0.4, 8), (Op.ROTATE, 0.6, 9)),
    ((Op.SOLARIZE, 0.6, 5), (Op.AUTOCONTRAST, 0.6, 0)),
    ((Op.EQUALIZE, 0.8, 0), (Op.EQUALIZE, 0.6, 0)),
    ((Op.POSTERIZE, 0.6, 7), (Op.POSTERIZE, 0.6, 6)),
    ((Op.EQUALIZE, 0.4, 0), (Op.SOLARIZE, 0.2, 4)),
    ((Op.EQUALIZE, 0.4, 0), (Op.ROTATE, 0.8, 8)),
    ((Op.SOLARIZE, 0.6, 3), (Op.EQUALIZE, 0.6, 0)),
    ((Op.POSTERIZE, 0.8, 5), (Op.EQUALIZE, 1.0, 0)),
    ((Op.ROTATE, 0.2, 3), (Op.SOLARIZE, 0.6, 8)),
    ((Op.EQUALIZE, 0.6, 0), (Op.POSTERIZE, 0.4, 6)),
    ((Op.ROTATE, 0.8, 8), (Op.COLOUR, 0.4, 0)),
    ((Op.ROTATE, 0.4, 9), (Op.EQUALIZE, 0.6, 0)),
    ((Op.EQUALIZE, 0.0, 0), (Op.EQUALIZE, 0.8, 0)),
    ((Op.INVERT, 0.6, 0), (Op.EQUALIZE, 1.0, 0)),
    ((Op.COLOUR, 0.6, 4), (Op.CONTRAST, 1.0, 8)),
    ((Op.ROTATE, 0.8, 8), (Op.COLOUR, 1.0, 2)),
    ((Op.COLOUR, 0.8, 8), (Op.SOLARIZE, 0.8, 7)),
    ((Op.SHARPNESS, 0.4, 7), (Op.INVERT, 0.6, 0)),
    ((Op.SHEAR_X, 0.6, 5), (Op.EQUALIZE, 1.0, 0)),
    ((Op.COLOUR, 0.4, 0), (Op.EQUALIZE, 0.6, 0)),
    ((Op.EQUALIZE, 0.4, 0), (Op.SOLARIZE, 0.2, 4)),
    ((Op.SOLARIZE, 0.6, 5), (Op.AUTOCONTRAST, 0.6, 0)),
    ((Op.INVERT, 0.6, 0), (Op.EQUALIZE, 1.0, 0)),
    ((Op.COLOUR, 0.6, 4), (Op.CONTRAST, 1.0, 8)),
    ((Op.EQUALIZE, 0.8, 0), (Op.EQUALIZE, 0.6, 0)),
)

# What each draw of a step of a policy is for.
_CHOICE, _APPLY, _SIGN, _LEVEL, _NORMAL, _STEP_DRAWS = 0, 1, 2, 3, 4, 16


@dataclass(frozen=True, slots=True)
class Operations:
    """What is done to each of N images, one step after the other: an `Op` and its value. K x N each."""

    op_KN: I8
    value_KN: F64


def draw_operations(seed: int, epoch: int, index_N: NDArray[np.int64], cfg: AugmentConfig, side: int) -> Operations:
    """Jitter and policy of images `index_N`, `side` x `side` pixels, in `epoch`."""
    nothing = np.zeros((0, len(index_N)))
    parts: list[tuple[I8, F64]] = [(nothing.astype(np.int8), nothing)]
    if any(cfg.colour_jitter):
        parts.append(_jitter(draws(seed, epoch, JITTER_STREAM, index_N, 9), cfg))
    steps = {"none": 0, "randaugment": cfg.policy_ops, "trivialaugment": 1, "autoaugment": 2}[cfg.policy]
    if steps:
        draw_KDN = draws(seed, epoch, POLICY_STREAM, index_N, steps * _STEP_DRAWS).reshape(steps, _STEP_DRAWS, -1)
        if cfg.policy == "randaugment":
            parts.append(_randaugment(draw_KDN, cfg, side))
        else:
            parts.append((_trivialaugment if cfg.policy == "trivialaugment" else _autoaugment)(draw_KDN, side))
    op_KN, value_KN = (np.concatenate(of_parts) for of_parts in zip(*parts, strict=True))
    return Operations(op_KN, value_KN)


def operands(drawn: Operations, side: int) -> F64:
    """What the operations compute with, K x N x 6: their value first; for a geometric one the six numbers a .. f that
    give the place (a x + b y + c, d x + e y + f) in the image from which pixel (x, y) of the result is taken."""
    operand_KN6 = np.zeros((*drawn.op_KN.shape, 6))
    operand_KN6[..., 0] = drawn.value_KN
    for op in GEOMETRIC:
        is_op_KN = drawn.op_KN == op
        operand_KN6[is_op_KN] = _taken_from(op, drawn.value_KN[is_op_KN], side)
    return operand_KN6


def _jitter(draw_DN: F64, cfg: AugmentConfig) -> tuple[I8, F64]:
    strength = np.array(cfg.colour_jitter)[:, None]
    middle = np.array([1.0, 1.0, 1.0, 0.0])[:, None]
    low = np.maximum(middle - strength, [[0.0], [0.0], [0.0], [-0.5]])
    value_4N = low + draw_DN[5:9] * (middle + strength - low)
    is_on_4N = (strength > 0) & (draw_DN[0] < cfg.colour_jitter_probability)
    op_4N = np.where(is_on_4N, np.array(JITTER_OPS)[:, None], Op.IDENTITY).astype(np.int8)
    order_4N = np.argsort(draw_DN[1:5], axis=0, kind="stable")
    return np.take_along_axis(op_4N, order_4N, 0), np.take_along_axis(value_4N, order_4N, 0)


def _randaugment(draw_KDN: F64, cfg: AugmentConfig, side: int) -> tuple[I8, F64]:
    op_KN = _choose(RAND_OPS, draw_KDN[:, _CHOICE])
    op_KN = np.where(draw_KDN[:, _APPLY] < cfg.policy_probability, op_KN, Op.IDENTITY).astype(np.int8)
    if cfg.policy_magnitude_std > 100:
        level_KN = cfg.policy_magnitude * draw_KDN[:, _LEVEL]
    else:
        # Twelve uniform numbers make a sum of deviation 1 that is as good as normal, without the machine's logarithm.
        # Cut to 32 bits their sum is exact, in whatever order numpy adds them for a batch of this size.
        normal_KN = np.floor(draw_KDN[:, _NORMAL:] * 2.0**32).sum(axis=1) * 2.0**-32 - 6
        level_KN = cfg.policy_magnitude + cfg.policy_magnitude_std * normal_KN
    share_KN = np.clip(level_KN, 0, RAND_LEVELS) / RAND_LEVELS
    sign_KN = np.where(draw_KDN[:, _SIGN] < 0.5, -1.0, 1.0)
    value_KN = np.zeros(op_KN.shape)
    for op, found_KN in rand_values(share_KN, sign_KN, cfg.policy_increasing, side).items():
        value_KN = np.where(op_KN == op, found_KN, value_KN)
    return op_KN, value_KN


def rand_values(share: F64, sign: F64, increasing: bool, side: int) -> dict[Op, F64]:
    """timm's tables: the value of each operation at `share` (0 .. 1) of the largest magnitude."""
    values = {Op.SHEAR_X: 0.3, Op.SHEAR_Y: 0.3, Op.TRANSLATE_X: 0.45 * side, Op.TRANSLATE_Y: 0.45 * side}
    found = {op: sign * (share * largest) for op, largest in (values | {Op.ROTATE: 30.0}).items()}
    factor = np.maximum(0.1, 1 + sign * (share * 0.9)) if increasing else share * 1.8 + 0.1
    bits, threshold = np.floor(share * 4), np.floor(share * 256)
    found |= dict.fromkeys(ENHANCING, factor)
    found[Op.POSTERIZE] = 4 - bits if increasing else bits
    found[Op.SOLARIZE] = 256 - threshold if increasing else threshold
    found[Op.SOLARIZE_ADD] = np.floor(share * 110)
    return found


def _trivialaugment(draw_KDN: F64, side: int) -> tuple[I8, F64]:
    op_KN = _choose(TRIVIAL_OPS, draw_KDN[:, _CHOICE])
    bin_KN = np.floor(draw_KDN[:, _LEVEL] * TRIVIAL_BINS).astype(np.int64)
    return op_KN, _signed(op_KN, trivial_table()[op_KN, bin_KN], draw_KDN[:, _SIGN])


def _autoaugment(draw_KDN: F64, side: int) -> tuple[I8, F64]:
    pairs = np.array(AUTO_PAIRS)  # pair x step x (operation, probability, magnitude)
    pair_N = np.floor(draw_KDN[0, _CHOICE] * len(pairs)).astype(np.int64)
    op_KN, probability_KN, bin_KN = pairs[pair_N].transpose(2, 1, 0)
    op_KN = np.where(draw_KDN[:, _APPLY] < probability_KN, op_KN, Op.IDENTITY).astype(np.int8)
    return op_KN, _signed(op_KN, auto_table(side)[op_KN, bin_KN.astype(np.int64)], draw_KDN[:, _SIGN])


def auto_table(side: int) -> F64:
    """Magnitude of each operation at each of 10 levels, as in torchvision's AutoAugment; operation x level."""
    return _table(AUTO_BINS, shear=0.3, translate_px=150 / 331 * side, degrees=30.0, enhance=0.9, bits=4)


def trivial_table() -> F64:
    """Magnitude of each operation at each of 31 levels, as in torchvision's TrivialAugmentWide; operation x level."""
    return _table(TRIVIAL_BINS, shear=0.99, translate_px=32.0, degrees=135.0, enhance=0.99, bits=6)


def _table(bins: int, shear: float, translate_px: float, degrees: float, enhance: float, bits: int) -> F64:
    share = np.arange(bins) / (bins - 1)
    table = np.zeros((len(Op), bins))
    largest = (shear, shear, translate_px, translate_px, degrees)
    for op, value in (*zip(GEOMETRIC, largest, strict=True), *((op, enhance) for op in ENHANCING)):
        table[op] = share * value
    table[[Op.TRANSLATE_X, Op.TRANSLATE_Y]] = np.floor(table[[Op.TRANSLATE_X, Op.TRANSLATE_Y]])
    table[Op.POSTERIZE] = 8 - np.rint(share * bits)
    table[Op.SOLARIZE] = 255 - share * 255
    return table


def _signed(op_KN: I8, magnitude_KN: F64, sign_draw_KN: F64) -> F64:
    """Values from magnitudes of torchvision's tables: half of the movements and factors go the other way."""
    signed_KN = np.where(sign_draw_KN < 0.5, -magnitude_KN, magnitude_KN)
    value_KN = np.where(np.isin(op_KN, GEOMETRIC), signed_KN, magnitude_KN)
    return np.where(np.isin(op_KN, ENHANCING), 1 + signed_KN, value_KN)


def _choose(ops: tuple[Op, ...], draw: F64) -> I8:
    chosen: I8 = np.array(ops, dtype=np.int8)[np.floor(draw * len(ops)).astype(np.int64)]
    return chosen


def _taken_from(op: Op, value_M: F64, side: int) -> F64:
    """a .. f of `operands`, M x 6. Shears keep the image's upper left corner, turns its middle."""
    one, zero, middle = np.ones_like(value_M), np.zeros_like(value_M), (side - 1) / 2
    if op == Op.SHEAR_X:
        six = (one, value_M, value_M / 2, zero, one, zero)
    elif op == Op.SHEAR_Y:
        six = (one, zero, zero, value_M, one, value_M / 2)
    elif op == Op.TRANSLATE_X:
        six = (one, zero, -value_M, zero, one, zero)
    elif op == Op.TRANSLATE_Y:
        six = (one, zero, zero, zero, one, -value_M)
    else:
        sin, cos = sin_cos(value_M / 180 * np.pi)
        six = (cos, -sin, middle - middle * cos + middle * sin, sin, cos, middle - middle * sin - middle * cos)
    return np.stack(six, axis=-1)
