"""Channel signals and the pseudo-images made of them. Pure functions.

In: feature maps. Out: one signal a channel (x_NC), and the signals of residual and identity laid out as a one-channel
image for a lens to look at (image_N1HW). The layouts are those of the authors' public code, where the one for ResNets
is told its columns, the one for wide networks its groups:

    pair      C rows of 2: one channel's residual and identity side by side
    columns   `fold` columns, 2C / fold rows; residual and identity rows take turns
    groups    `fold` groups of consecutive channels, two rows each: C / fold columns, 2 * fold rows
"""

from typing import Any

import torch
from torch import Tensor

from ii_dist.config.networks import fold_shape


def channel_signals(x_NCHW: Tensor) -> Tensor:
    """Mean of each channel over all positions: x_NC, in the dtype of x."""
    # A compiler fuses the pass that `_Mean` saves; without gradients there is none.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return x_NCHW.mean((2, 3))
    signals_NC: Tensor = _Mean.apply(x_NCHW)  # type: ignore[no-untyped-call]
    return signals_NC


def pair_image(residual_NC: Tensor, identity_NC: Tensor) -> Tensor:
    """Row c holds channel c of the residual and of the identity: image_N1HW with H = C, W = 2."""
    return torch.stack((residual_NC, identity_NC), dim=2)[:, None]


def fold_image(residual_NC: Tensor, identity_NC: Tensor, fold: int, layout: str = "columns") -> Tensor:
    """Fold two rows of C signals into an image of consecutive channels: image_N1HW, sides as in `fold_shape`.

    Row 2i holds the i-th run of channels of the residual, row 2i+1 the same channels of the identity, so that a 3x3
    lens sees neighbouring channels of both. A run is one row: `fold` channels, or C / fold of them where `fold` counts
    groups. `fold` must divide C.
    """
    batch, channels = residual_NC.shape
    height, width = fold_shape(channels, fold, layout)
    rows = (residual_NC.view(batch, -1, width), identity_NC.view(batch, -1, width))
    return torch.stack(rows, dim=2).view(batch, 1, height, width)


class _Mean(torch.autograd.Function):
    """Mean over height and width whose gradient is a broadcast view.

    autograd's own mean writes a full-size gradient before adding it to the one that comes from the block's sum; a view
    of N x C numbers is added just as well, without that pass over memory.
    """

    @staticmethod
    def forward(x_NCHW: Tensor) -> Tensor:
        return x_NCHW.mean((2, 3))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, grad_NC: Tensor) -> Tensor:
        shape: torch.Size = ctx.shape
        return (grad_NC / (shape[2] * shape[3]))[:, :, None, None].expand(shape)
