"""Gates: from residual and identity to one factor a channel.

In: residual_NCHW (after its last norm) and identity_NCHW (after the projection, where there is one). Out: scale_NC11 in
(0, 1), which the block multiplies the residual by. `GATES` is the only list of gates; a new one is a row there, a name
in `ii_dist.config.networks` and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor, nn
from torch.nn import functional as F

from ii_dist.config.errors import ConfigError
from ii_dist.config.networks import fold_widths
from ii_dist.models.imaging import channel_signals, fold_columns, fold_columns_shape


class Gate(Protocol):
    """What a block asks of its gate."""

    def __call__(self, residual_NCHW: Tensor, identity_NCHW: Tensor) -> Tensor:
        """scale_NC11 in (0, 1)."""
        ...


@dataclass(frozen=True, slots=True)
class GateChoice:
    """Which gate every block of a network gets. The defaults are those of the authors' public code."""

    name: str = "fold3x3"
    reduction: int = 16
    """Channels / hidden units (r)."""
    fold_width: int = 16
    """Columns of the folded image (k)."""
    lens_filters: int = 0
    """Filters of the lens (m); 0 = planes / 16."""


@dataclass(frozen=True, slots=True)
class GateShape:
    """One gate's sizes: channels to rescale, hidden units, columns of the folded image, filters of the lens."""

    channels: int
    hidden: int
    fold_width: int
    lens_filters: int


class SqueezeExcite(nn.Module):
    """Factors from signals by two bias-free linear layers: sigmoid(W2 relu(W1 q)); here q are the residual's signals.

    Linear on N x C rather than a 1x1 convolution on N x C x 1 x 1: the same numbers in about half the time on CPU.
    """

    def __init__(self, shape: GateShape, signals: int | None = None) -> None:
        super().__init__()
        self.squeeze = nn.Linear(signals or shape.channels, shape.hidden, bias=False)
        self.excite = nn.Linear(shape.hidden, shape.channels, bias=False)
        for layer in (self.squeeze, self.excite):  # Xavier, as in the authors' training script
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, residual_NCHW: Tensor, identity_NCHW: Tensor) -> Tensor:
        return self.factors(channel_signals(residual_NCHW))

    def factors(self, signals_NQ: Tensor) -> Tensor:
        hidden_NH = F.relu(self.squeeze(signals_NQ), inplace=True)
        scale_NC: Tensor = self.excite(hidden_NH).sigmoid()
        return scale_NC[:, :, None, None]


class Lens(nn.Module):
    """Convolution without padding over the pseudo-image, norm, mean over filters: image_N1HW -> view_Nhw.

    There is no activation between norm and mean, as in the authors' code.
    """

    def __init__(self, filters: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, filters, kernel_size, bias=False)
        self.norm = nn.BatchNorm2d(filters)

    def forward(self, image_N1HW: Tensor) -> Tensor:
        view_Nhw: Tensor = self.norm(self.conv(image_N1HW)).mean(1)
        return view_Nhw

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the network to its device, dtype and memory format.

        With one input channel the weight is channels_last and plain at once; only its strides choose the kernel. Kept
        plain, the convolution takes a third of the time on CPU. Gradient and momentum then get the same strides.
        """
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        weight = self.conv.weight
        weight.data = weight.data.flatten(1).view(weight.shape)
        return self


class FoldGate(SqueezeExcite):
    """Inner-Imaging: a 3x3 lens over the folded image of residual and identity signals, then squeeze and excite."""

    def __init__(self, shape: GateShape) -> None:
        height, width = fold_columns_shape(shape.channels, shape.fold_width)
        super().__init__(shape, signals=(height - 2) * (width - 2))
        self.fold_width = shape.fold_width
        self.lens = Lens(shape.lens_filters, kernel_size=3)

    def forward(self, residual_NCHW: Tensor, identity_NCHW: Tensor) -> Tensor:
        image_N1HW = fold_columns(channel_signals(residual_NCHW), channel_signals(identity_NCHW), self.fold_width)
        return self.factors(self.lens(image_N1HW).flatten(1))


def _no_gate(shape: GateShape) -> None:
    """A block without a gate is timm's own block: no module, no parameter."""


def _fold3x3(shape: GateShape) -> FoldGate:
    possible = fold_widths([shape.channels])
    if shape.fold_width not in possible:
        raise ConfigError(
            f"fold_width {shape.fold_width}: {shape.channels} channels cannot be folded so (the width must divide them "
            f"and leave 3x3 or more); possible: {', '.join(map(str, possible)) or 'none'}"
        )
    return FoldGate(shape)


GATES: dict[str, Callable[[GateShape], nn.Module | None]] = {
    "none": _no_gate,
    "se": SqueezeExcite,
    "fold3x3": _fold3x3,
}


def make_gate(
    name: str, channels: int, planes: int, reduction: int = 16, fold_width: int = 16, lens_filters: int = 0
) -> nn.Module | None:
    """The gate of one block (a `Gate`), or None for `none`.

    channels: what leaves the block; planes: width of its 3x3 convolution; lens_filters 0 = planes / 16.
    Raises ConfigError for an unknown name or sizes that cannot be.
    """
    if name not in GATES:
        raise ConfigError(f"gate {name!r} is not one of {', '.join(GATES)}")
    if name != "none" and not 1 <= reduction <= channels:
        raise ConfigError(f"gate_reduction {reduction}: needs 1 to {channels} for a block of {channels} channels")
    filters = lens_filters or max(1, planes // 16)
    return GATES[name](GateShape(channels, channels // reduction, fold_width, filters))
