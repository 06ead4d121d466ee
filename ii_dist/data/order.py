"""The order of an epoch as a pure function: which image stands at which position.

In: number of images, seed, epoch, positions. Out: index rows. Nothing is stored and nothing shuffled: a keyed
permutation answers for any position alone, so that a rank or a resumed run asks only for what it needs, at the same
cost for a thousand images as for a billion. It is a Feistel network over the next power of two at or above the number
of images, so a result falls outside the range in fewer than half of the cases; it is then put through the network
again until it falls inside ("cycle walking"), which keeps the whole a permutation.
"""

import numpy as np
from numpy.typing import NDArray

from ii_dist.data.counter import U64, bits, key

ROUNDS = 8
_STREAM = 0x6F72646572  # "order": keeps these keys apart from the augmentation's


def epoch_indices(images: int, seed: int, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index row at each of the `positions` of an epoch; over 0 .. images-1 each row comes exactly once."""
    assert images > 0
    place = positions.astype(np.uint64)
    assert place.size == 0 or int(place.max()) < images
    domain_bits = max(2, (images - 1).bit_length())
    keys = [key(_STREAM, seed, epoch, turn) for turn in range(ROUNDS)]
    row = _network(place, domain_bits, keys)
    while (outside := np.flatnonzero(row >= np.uint64(images))).size:
        row[outside] = _network(row[outside], domain_bits, keys)
    return row.astype(np.int64)


def _network(x: U64, domain_bits: int, keys: list[int]) -> U64:
    """A permutation of 0 .. 2^domain_bits - 1: the two halves are changed in turn by a hash of the other one."""
    right_bits = domain_bits // 2
    right_mask, left_mask = np.uint64((1 << right_bits) - 1), np.uint64((1 << (domain_bits - right_bits)) - 1)
    left, right = x >> np.uint64(right_bits), x & right_mask
    for left_key, right_key in zip(keys[::2], keys[1::2], strict=True):
        left = left ^ (bits(left_key, right) & left_mask)
        right = right ^ (bits(right_key, left) & right_mask)
    return left << np.uint64(right_bits) | right
