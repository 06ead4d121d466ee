"""Channel signals and the pseudo-images made of them. Pure functions.

In: feature maps. Out: one signal a channel (x_NC), and the signals of residual and identity laid out as a one-channel
image for a lens to look at (image_N1HW). The layouts are those of the authors' public code.
"""

from typing import Any

import torch
from torch import Tensor


def channel_signals(x_NCHW: Tensor) -> Tensor:
    """Mean of each channel over all positions: x_NC, in the dtype of x."""
    if torch.compiler.is_compiling():  # a compiler fuses the pass that `_Mean` saves
        return x_NCHW.mean((2, 3))
    signals_NC: Tensor = _Mean.apply(x_NCHW)  # type: ignore[no-untyped-call]
    return signals_NC


def fold_columns(residual_NC: Tensor, identity_NC: Tensor, width: int) -> Tensor:
    """Fold two rows of C signals into an image of `width` columns: image_N1HW with H = 2 * C / width, W = width.

    Row 2i holds channels i*width .. (i+1)*width of the residual, row 2i+1 the same channels of the identity, so that a
    3x3 lens sees neighbouring channels of both. `width` must divide C.
    """
    batch, channels = residual_NC.shape
    groups = channels // width
    rows = (residual_NC.view(batch, groups, width), identity_NC.view(batch, groups, width))
    return torch.stack(rows, dim=2).view(batch, 1, 2 * groups, width)


def fold_columns_shape(channels: int, width: int) -> tuple[int, int]:
    """Height and width of the image that `fold_columns` makes."""
    return 2 * channels // width, width


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
