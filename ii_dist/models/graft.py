"""Put a gate on the residual blocks of a network that exists: timm's families with an identity path.

In: a network of timm and the gate. Out: the same network, its blocks with identity now residual * scale + identity.
Tensors keep their names, and the gates' are new ones under `<block>.gate`. Blocks without identity stay as they are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ii_dist.config.errors import ConfigError
from ii_dist.config.networks import fold_widths
from ii_dist.models.blocks import GatedBasicBlock, GatedBottleneck, gate_of_block, gated_sum
from ii_dist.models.compat import (
    BasicBlock,
    Bottleneck,
    CondConvResidual,
    ConvBnAct,
    ConvNeXtBlock,
    DepthwiseSeparableConv,
    EdgeResidual,
    InvertedResidual,
    RegNetBottleneck,
    UniversalInvertedResidual,
)
from ii_dist.models.gates import GateChoice

MIN_HIDDEN = 4
"""Hidden units that a gate keeps, where no reduction is asked for: a gate of one may be born dead."""


class _GatedSkip:
    """Before one of timm's blocks of the EfficientNet kind: `has_skip` is false, so that `forward` is the residual."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        residual_NCHW = super().forward(x_NCHW)  # type: ignore[misc]
        return gated_sum(self.gate, self.drop_path, residual_NCHW, x_NCHW)  # type: ignore[attr-defined]


class GatedInvertedResidual(_GatedSkip, InvertedResidual):  # type: ignore[misc]
    """1x1, depthwise and 1x1 convolution."""


class GatedDepthwiseSeparable(_GatedSkip, DepthwiseSeparableConv):  # type: ignore[misc]
    """Depthwise and 1x1 convolution."""


class GatedEdgeResidual(_GatedSkip, EdgeResidual):  # type: ignore[misc]
    """One wide convolution and a 1x1."""


class GatedConvBnAct(_GatedSkip, ConvBnAct):  # type: ignore[misc]
    """One convolution."""


class GatedCondConvResidual(_GatedSkip, CondConvResidual):  # type: ignore[misc]
    """The same as `InvertedResidual`, its convolutions mixed for each image."""


class GatedUniversalInvertedResidual(_GatedSkip, UniversalInvertedResidual):  # type: ignore[misc]
    """1x1 convolutions with depthwise ones before, between or behind them (MobileNetV4)."""


class GatedRegNetBottleneck(RegNetBottleneck):  # type: ignore[misc]
    """1x1, grouped 3x3 and 1x1 convolution, activation after the sum."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        residual_NCHW = self.conv3(self.se(self.conv2(self.conv1(x_NCHW))))
        joined = gated_sum(self.gate, self.drop_path, residual_NCHW, self.downsample(x_NCHW))
        y: Tensor = self.act3(joined)
        return y


class GatedConvNeXtBlock(ConvNeXtBlock):  # type: ignore[misc]
    """Depthwise convolution, norm, two linear layers on each position, layer scale."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        residual = self.conv_dw(x_NCHW)
        if self.use_conv_mlp:
            residual = self.mlp(self.norm(residual))
        else:
            residual = self.mlp(self.norm(residual.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        if self.gamma is not None:
            residual = residual * self.gamma[:, None, None]
        return gated_sum(self.gate, self.drop_path, residual, self.shortcut(x_NCHW))


@dataclass(frozen=True, slots=True)
class _Graft:
    """One kind of block: its gated twin, whether this block has an identity, channels that leave it, its planes."""

    twin: type[nn.Module]
    has_identity: Callable[[Any], bool]
    channels: Callable[[Any], int]
    planes: Callable[[Any], int] | None = None
    """None = as many as channels."""


def _has_skip(block: Any) -> bool:
    return bool(block.has_skip)


def _always(block: Any) -> bool:
    return True


def _has_shortcut(block: Any) -> bool:
    return block.downsample is not None


GRAFTS: Mapping[type[nn.Module], _Graft] = {
    BasicBlock: _Graft(GatedBasicBlock, _always, lambda b: b.conv2.out_channels),
    Bottleneck: _Graft(
        GatedBottleneck, _always, lambda b: b.conv3.out_channels, lambda b: b.conv3.out_channels // b.expansion
    ),
    InvertedResidual: _Graft(GatedInvertedResidual, _has_skip, lambda b: b.conv_pwl.out_channels),
    DepthwiseSeparableConv: _Graft(GatedDepthwiseSeparable, _has_skip, lambda b: b.conv_pw.out_channels),
    EdgeResidual: _Graft(GatedEdgeResidual, _has_skip, lambda b: b.conv_pwl.out_channels),
    CondConvResidual: _Graft(GatedCondConvResidual, _has_skip, lambda b: b.conv_pwl.out_channels),
    UniversalInvertedResidual: _Graft(GatedUniversalInvertedResidual, _has_skip, lambda b: b.pw_proj.conv.out_channels),
    ConvBnAct: _Graft(GatedConvBnAct, _has_skip, lambda b: b.conv.out_channels),
    RegNetBottleneck: _Graft(GatedRegNetBottleneck, _has_shortcut, lambda b: b.conv3.conv.out_channels),
    ConvNeXtBlock: _Graft(GatedConvNeXtBlock, _always, lambda b: b.conv_dw.out_channels),
}
_TWINS = tuple(graft.twin for graft in GRAFTS.values())
SUPPORTED = "ResNet and its variants, MobileNetV2 to V4, EfficientNet, MNASNet, FBNet, RegNetX and Y, ConvNeXt"


def graft_gates(model: nn.Module, gate: str | GateChoice = "fold3x3") -> list[str]:
    """Give each residual block of `model` a gate, in place; returns the names of these blocks.

    A gate by its name is fitted to each block: channels / hidden units are 16, or less where 4 hidden units would not
    be left, and the image is as wide as the channels allow, 16 at most; so is what is 0 in a `GateChoice`.
    Raises ConfigError, having touched no block, if a block cannot take the gate or there is none that could.
    """
    choice = gate if isinstance(gate, GateChoice) else GateChoice(gate, reduction=0, fold_width=0)
    found = {name: m for name, m in model.named_modules() if type(m) in GRAFTS and GRAFTS[type(m)].has_identity(m)}
    _refuse_others(model, found)
    gates = {name: _gate_for(block, choice, name) for name, block in found.items()}
    for name, block in found.items():
        _join(block, gates[name])
    return [name for name in found if gates[name] is not None]


def _refuse_others(model: nn.Module, found: Mapping[str, nn.Module]) -> None:
    """A network with gates on some of its residual blocks only is not what anybody asks for."""
    network = getattr(model, "default_cfg", {}).get("architecture") or type(model).__name__
    for name, module in model.named_modules():
        if isinstance(module, _TWINS):
            raise ConfigError(f"block {name} of {network} is made for a gate already; give `gate` to its constructor")
        if name not in found and type(module) not in GRAFTS and getattr(module, "has_skip", False):
            raise ConfigError(
                f"block {name} of {network} ({type(module).__name__}) takes no gate; supported: {SUPPORTED}"
            )
    if not found:
        raise ConfigError(f"{network} has no residual block that takes a gate; supported: {SUPPORTED}")


def _gate_for(block: nn.Module, choice: GateChoice, name: str) -> nn.Module | None:
    graft = GRAFTS[type(block)]
    channels = graft.channels(block)
    planes = graft.planes(block) if graft.planes else channels
    reduction = choice.reduction or max(1, min(16, channels // MIN_HIDDEN))
    possible = fold_widths([channels], choice.fold_layout, choice.lens_kernel)
    width = choice.fold_width or max((k for k in possible if k <= 16), default=16)
    sample = next(block.parameters())
    try:
        fitted = replace(choice, reduction=reduction, fold_width=width)
        return gate_of_block(fitted, channels, planes, sample.device, sample.dtype)
    except ConfigError as error:
        raise ConfigError(f"block {name}: {error}") from error


def _join(block: Any, gate: nn.Module | None) -> None:
    """Make `block` its gated twin: same tensors, same names, another forward."""
    if gate is None:
        return
    block.__class__ = GRAFTS[type(block)].twin
    if isinstance(block, _GatedSkip):
        block.has_skip = False  # type: ignore[attr-defined]
    block.gate = gate.train(block.training)
