"""Gates: from residual and identity to one factor a channel.

In: residual_NCHW (after its last norm) and identity_NCHW (after the projection, where there is one). Out: scale_NC11 in
(0, 1), which the block multiplies the residual by. `GATES` is the only list of gates; a new one is a row there, a name
in `ii_dist.config.networks` and nothing else. With u, v the channel signals of residual and identity, h hidden units,
and without biases, as in the authors' public code:

    none        no module
    se          sigmoid(W2 relu(W1 u)): squeeze and excite, which does not see the identity
    double_fc   sigmoid(W2 [relu(Wu u), relu(Wv v)])
    pair1x1     squeeze and excite of a 1x1 lens's view of the C x 2 image of pairs: 2C numbers
    pair2x1     the same with a lens that takes a pair at a time: C numbers
    fold3x3     the same with a 3x3 lens over the folded image of both: Inner-Imaging

The dead gate: a lens of one tap only standardizes the signals and multiplies them by the mean of sign(w_j) g_j over its
filters. Where as many filters start positive as negative that is 0, and behind it, without biases, no gradient reaches
anything: the gate stays at one half for ever. So such a lens starts with positive weights here (`gate_init: cured`);
`authors` draws them with either sign. Lenses of more taps do not cancel so.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ii_dist.config.errors import ConfigError
from ii_dist.config.networks import FOLD_LAYOUTS, GATE_INITS, LENS_FORMS, fold_shape, fold_widths
from ii_dist.models.imaging import channel_signals, fold_image, pair_image
from ii_dist.models.lens import Lens

AUTHORS_FOLD = {"columns": 16, "groups": 10}


class Gate(Protocol):
    """What a block asks of its gate."""

    def __call__(self, residual_NCHW: Tensor, identity_NCHW: Tensor) -> Tensor:
        """scale_NC11 in (0, 1)."""
        ...


@dataclass(frozen=True, slots=True)
class GateChoice:
    """Which gate every block of a network gets. The defaults are those of the authors' public code, but for the start
    of a one-tap lens (see above) and for how a lens is computed."""

    name: str = "fold3x3"
    reduction: int = 16
    """Channels / hidden units (r)."""
    fold_width: int = 0
    """Columns of the folded image, or groups of channels (k); 0 = 16 columns, 10 groups."""
    lens_filters: int = 0
    """Filters of the lens (m); 0 = planes / 16."""
    fold_layout: str = "columns"
    """What `fold_width` counts: `columns` or `groups` (see `ii_dist.models.imaging`)."""
    lens_kernel: int = 3
    """Height and width of the lens of fold3x3."""
    lens: str = "one_filter"
    """How a lens is computed: `one_filter` or `plain` (see `ii_dist.models.lens`); the same numbers."""
    gate_init: str = "cured"
    """`cured` or `authors`: see the dead gate above."""


@dataclass(frozen=True, slots=True)
class GateShape:
    """One gate's sizes: channels to rescale, hidden units, filters of the lens; the rest as chosen."""

    channels: int
    hidden: int
    filters: int
    choice: GateChoice

    def lens(self, kernel: tuple[int, int]) -> Lens:
        one_tap = kernel == (1, 1)
        return Lens(self.filters, kernel, self.choice.lens, positive=one_tap and self.choice.gate_init == "cured")


class SqueezeExcite(nn.Module):
    """Factors from signals by two bias-free linear layers: sigmoid(W2 relu(W1 q)); here q are the residual's signals.

    Linear on N x C rather than a 1x1 convolution on N x C x 1 x 1: the same numbers in about half the time on CPU.
    """

    def __init__(self, shape: GateShape, signals: int | None = None) -> None:
        super().__init__()
        self.squeeze = _linear(signals or shape.channels, shape.hidden)
        self.excite = _linear(shape.hidden, shape.channels)

    def forward(self, residual_NCHW: Tensor, identity_NCHW: Tensor) -> Tensor:
        return self.factors(channel_signals(residual_NCHW))

    def factors(self, signals_NQ: Tensor) -> Tensor:
        hidden_NH = F.relu(self.squeeze(signals_NQ), inplace=True)
        scale_NC: Tensor = self.excite(hidden_NH).sigmoid()
        return scale_NC[:, :, None, None]


class DoubleFC(nn.Module):
    """Residual and identity squeezed apart, excited together."""

    def __init__(self, shape: GateShape) -> None:
        super().__init__()
        self.squeeze = _linear(shape.channels, shape.hidden)
        self.squeeze_identity = _linear(shape.channels, shape.hidden)
        self.excite = _linear(2 * shape.hidden, shape.channels)

    def forward(self, residual_NCHW: Tensor, identity_NCHW: Tensor) -> Tensor:
        squeezed = (self.squeeze(channel_signals(residual_NCHW)), self.squeeze_identity(channel_signals(identity_NCHW)))
        scale_NC: Tensor = self.excite(F.relu(torch.cat(squeezed, dim=1), inplace=True)).sigmoid()
        return scale_NC[:, :, None, None]


class PairGate(SqueezeExcite):
    """A lens over the C x 2 image of pairs; `taps` 1 sees one signal at a time, 2 a pair. Then squeeze and excite."""

    def __init__(self, shape: GateShape, taps: int) -> None:
        super().__init__(shape, signals=shape.channels * (3 - taps))
        self.lens = shape.lens((1, taps))

    def forward(self, residual_NCHW: Tensor, identity_NCHW: Tensor) -> Tensor:
        image_N1HW = pair_image(channel_signals(residual_NCHW), channel_signals(identity_NCHW))
        return self.factors(self.lens(image_N1HW).flatten(1))


class FoldGate(SqueezeExcite):
    """Inner-Imaging: a lens over the folded image of residual and identity signals, then squeeze and excite."""

    def __init__(self, shape: GateShape) -> None:
        choice = shape.choice
        height, width = fold_shape(shape.channels, choice.fold_width, choice.fold_layout)
        lost = choice.lens_kernel - 1
        super().__init__(shape, signals=(height - lost) * (width - lost))
        self.fold_width, self.fold_layout = choice.fold_width, choice.fold_layout
        self.lens = shape.lens((choice.lens_kernel, choice.lens_kernel))

    def forward(self, residual_NCHW: Tensor, identity_NCHW: Tensor) -> Tensor:
        u_NC, v_NC = channel_signals(residual_NCHW), channel_signals(identity_NCHW)
        image_N1HW = fold_image(u_NC, v_NC, self.fold_width, self.fold_layout)
        return self.factors(self.lens(image_N1HW).flatten(1))


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.xavier_uniform_(layer.weight)  # as in the authors' training script
    return layer


def _no_gate(shape: GateShape) -> None:
    """A block without a gate is timm's own block: no module, no parameter."""


def _fold3x3(shape: GateShape) -> FoldGate:
    choice, channels = shape.choice, shape.channels
    possible = fold_widths([channels], choice.fold_layout, choice.lens_kernel)
    if choice.fold_width not in possible:
        side, counted = choice.lens_kernel, choice.fold_layout
        raise ConfigError(
            f"fold_width {choice.fold_width}: {channels} channels cannot be folded so ({counted} must divide them "
            f"and leave {side}x{side} or more); possible: {', '.join(map(str, possible)) or 'none'}"
        )
    return FoldGate(shape)


GATES: dict[str, Callable[[GateShape], nn.Module | None]] = {
    "none": _no_gate,
    "se": SqueezeExcite,
    "double_fc": DoubleFC,
    "pair1x1": lambda shape: PairGate(shape, taps=1),
    "pair2x1": lambda shape: PairGate(shape, taps=2),
    "fold3x3": _fold3x3,
}


def make_gate(gate: str | GateChoice, channels: int, planes: int, **options: Any) -> nn.Module | None:
    """The gate of one block (a `Gate`), or None for `none`.

    gate: a choice, or the name of one; options: fields of `GateChoice` that are to be others.
    channels: what leaves the block; planes: width of its 3x3 convolution.
    Raises ConfigError for an unknown name or sizes that cannot be.
    """
    choice = replace(gate, **options) if isinstance(gate, GateChoice) else GateChoice(gate, **options)
    _known("gate", choice.name, GATES)
    _known("fold_layout", choice.fold_layout, FOLD_LAYOUTS)
    _known("lens", choice.lens, LENS_FORMS)
    _known("gate_init", choice.gate_init, GATE_INITS)
    if choice.name != "none" and not 1 <= choice.reduction <= channels:
        raise ConfigError(
            f"gate_reduction {choice.reduction}: needs 1 to {channels} for a block of {channels} channels"
        )
    if choice.lens_kernel < 1:
        raise ConfigError(f"lens_kernel {choice.lens_kernel}: needs 1 or more")
    choice = replace(choice, fold_width=choice.fold_width or AUTHORS_FOLD[choice.fold_layout])
    filters = choice.lens_filters or max(1, planes // 16)
    return GATES[choice.name](GateShape(channels, channels // choice.reduction, filters, choice))


def _known(key: str, value: str, table: Any) -> None:
    if value not in table:
        raise ConfigError(f"{key} {value!r} is not one of {', '.join(table)}")
