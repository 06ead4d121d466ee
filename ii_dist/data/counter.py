"""Random numbers without a state: a hash of integers. Pure numpy, no `numpy.random`.

In: integers that name a draw (seed, epoch, image, stream, try). Out: 64 random bits, or a float64 in [0, 1).
Only integer arithmetic modulo 2^64 and one exact conversion are used, so that every machine and every numpy version
draws the same. The mixing function is the published finalizer of SplitMix64 (Steele, Lea, Flood 2014).
"""

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

_GAMMA = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: SplitMix64's step between two counters
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # its two multipliers
_MASK = (1 << 64) - 1


def mix(x: U64) -> U64:
    """Spread every input bit over all 64 output bits; one to one."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return x ^ (x >> np.uint64(31))


def key(*parts: int) -> int:
    """One 64-bit key from integers; their order matters. The same mixing in Python's own integers."""
    value = 0
    for part in parts:
        x = ((value ^ (part & _MASK)) + _GAMMA) & _MASK
        x = (x ^ (x >> 30)) * _FIRST & _MASK
        x = (x ^ (x >> 27)) * _SECOND & _MASK
        value = x ^ (x >> 31)
    return value


def bits(draw_key: int, counter: U64) -> U64:
    """64 random bits for each counter, elementwise: SplitMix64 started at the key, at its counter-th step."""
    return mix(counter * np.uint64(_GAMMA) + np.uint64(draw_key))


def uniform(draw_key: int, counter: U64) -> NDArray[np.float64]:
    """A float64 in [0, 1) for each counter: the upper 53 bits, an exact conversion."""
    return (bits(draw_key, counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53
