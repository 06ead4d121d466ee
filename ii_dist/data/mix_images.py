"""Mixes finished images with their partners, on the CPU pair by pair in threads or on a GPU a batch at once.

In: normalized float32 images, a `Mixing`. Out: mixed images, to the same bits on both ways: products and sums are
rounded one after the other, never fused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ii_dist.data.mix import Mixing

if TYPE_CHECKING:
    import torch

F32 = NDArray[np.float32]


def mix_pair(images: F32, mixing: Mixing, pair: int, channels_last: bool) -> None:
    """Mix images 2 * pair and 2 * pair + 1 of a batch in place. numpy starts no threads of its own.

    images: N x side x side x 3 where channels_last, else N x 3 x side x side.
    """
    first, second = 2 * pair, 2 * pair + 1
    kept = images[first].copy()
    _mix(images[first], images[second], mixing, first, channels_last)
    _mix(images[second], kept, mixing, second, channels_last)


def _mix(own: F32, partner: F32, mixing: Mixing, i: int, channels_last: bool) -> None:
    weight = mixing.own_N[i]
    if weight < 1:
        own *= weight
        own += partner * (np.float32(1) - weight)
    left, top, right, bottom = (int(edge) for edge in mixing.box_N4[i])
    box = (slice(top, bottom), slice(left, right))
    where = box if channels_last else (slice(None), *box)
    own[where] = partner[where]


def mix_batch(images_NCHW: torch.Tensor, own_N: torch.Tensor, box_N4: torch.Tensor) -> torch.Tensor:
    """A mixed batch, beside the given one, with its strides; own_N and box_N4 of a `Mixing` on the same device."""
    import torch

    side = images_NCHW.shape[-1]
    # Pairs turned round: a copy, because torch has no views that run backwards.
    pairs_J2CHW = images_NCHW.view(-1, 2, *images_NCHW.shape[1:])
    partner_NCHW = pairs_J2CHW.flip(1).flatten(0, 1)
    weight_N111 = own_N[:, None, None, None]
    pixel = torch.arange(side, device=images_NCHW.device)
    left, top, right, bottom = box_N4[:, :, None].unbind(1)
    inside_x, inside_y = (pixel >= left) & (pixel < right), (pixel >= top) & (pixel < bottom)
    inside_N1HW = (inside_y[:, :, None] & inside_x[:, None, :])[:, None]
    mixed_NCHW = (images_NCHW * weight_N111).add_(partner_NCHW * (1 - weight_N111))
    return torch.where(inside_N1HW, partner_NCHW, mixed_NCHW)
