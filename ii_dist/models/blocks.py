"""timm's residual blocks with a gate between residual and identity, and the sum that every gated block ends with.

In: x_NCHW. Out: act(residual * scale + identity), scale being the gate's answer to both. Without a gate a block is
timm's, parameter for parameter and bit for bit.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

from ii_dist.models.compat import BasicBlock, Bottleneck
from ii_dist.models.gates import GateChoice, make_gate

_IN_A_GATE = re.compile(r"layer\d+\.\d+\.gate\.")


class GatedBasicBlock(BasicBlock):  # type: ignore[misc]
    """Two 3x3 convolutions. Takes timm's arguments and the gate."""

    def __init__(self, inplanes: int, planes: int, *args: Any, gate: GateChoice, **kwargs: Any) -> None:
        super().__init__(inplanes, planes, *args, **kwargs)
        self.gate = gate_of_block(gate, planes * self.expansion, planes, kwargs.get("device"), kwargs.get("dtype"))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if self.gate is None:
            return super().forward(x_NCHW)  # type: ignore[no-any-return]
        residual = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x_NCHW)))))
        residual = self.bn2(self.conv2(residual))
        return _join(self, residual, x_NCHW, self.act2)


class GatedBottleneck(Bottleneck):  # type: ignore[misc]
    """1x1, 3x3 and 1x1 convolution. Takes timm's arguments and the gate."""

    def __init__(self, inplanes: int, planes: int, *args: Any, gate: GateChoice, **kwargs: Any) -> None:
        super().__init__(inplanes, planes, *args, **kwargs)
        self.gate = gate_of_block(gate, planes * self.expansion, planes, kwargs.get("device"), kwargs.get("dtype"))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if self.gate is None:
            return super().forward(x_NCHW)  # type: ignore[no-any-return]
        residual = self.act1(self.bn1(self.conv1(x_NCHW)))
        residual = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(residual)))))
        residual = self.bn3(self.conv3(residual))
        return _join(self, residual, x_NCHW, self.act3)


def gate_of_block(
    gate: GateChoice,
    channels: int,
    planes: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module | None:
    """A gate for a block of `planes` wide 3x3 convolutions that `channels` leave; None for the choice `none`."""
    module = make_gate(gate, channels, planes)
    return module and module.to(device=device, dtype=dtype)


def init_convolutions(model: nn.Module) -> None:
    """Start convolutions as He et al. do (fan out), as timm does; a gate keeps the start that it gave itself."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not _IN_A_GATE.match(name):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def gated_sum(
    gate: nn.Module | None,
    drop_path: nn.Module | None,
    residual_NCHW: Tensor,
    identity_NCHW: Tensor,
    reuse: bool = False,
) -> Tensor:
    """residual * scale + identity, with the gate's scale of both; without a gate their plain sum.

    reuse: without gradients the sum may be written over the residual, as timm's blocks do.
    """
    if gate is None:
        return (residual_NCHW if drop_path is None else drop_path(residual_NCHW)) + identity_NCHW
    scale_NC11 = gate(residual_NCHW, identity_NCHW)
    if drop_path is not None:
        # Drops whole samples, so it may act on N x C factors instead of the N x C x H x W residual.
        scale_NC11 = drop_path(scale_NC11)
    in_place = reuse and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    if in_place and residual_NCHW.dtype == scale_NC11.dtype == identity_NCHW.dtype:
        return torch.addcmul(identity_NCHW, residual_NCHW, scale_NC11, out=residual_NCHW)
    return _scale_add(residual_NCHW, scale_NC11, identity_NCHW)


def _join(block: Any, residual_NCHW: Tensor, x_NCHW: Tensor, act: nn.Module) -> Tensor:
    """What follows the last norm: timm's own attention (if asked for), gate, drop path, sum, activation."""
    if block.se is not None:
        residual_NCHW = block.se(residual_NCHW)
    identity_NCHW = x_NCHW if block.downsample is None else block.downsample(x_NCHW)
    joined: Tensor = act(gated_sum(block.gate, block.drop_path, residual_NCHW, identity_NCHW, reuse=True))
    return joined


def _scale_add(residual_NCHW: Tensor, scale_NC11: Tensor, identity_NCHW: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # a compiler fuses the passes that `_ScaleAdd` saves
        return residual_NCHW * scale_NC11 + identity_NCHW
    joined_NCHW: Tensor = _ScaleAdd.apply(residual_NCHW, scale_NC11, identity_NCHW)  # type: ignore[no-untyped-call]
    return joined_NCHW


class _ScaleAdd(torch.autograd.Function):
    """residual * scale + identity in one pass over memory forward, and no copy of the residual backward.

    autograd's own addcmul multiplies the saved residual by 1 in its backward: one more pass than needed.
    """

    @staticmethod
    def forward(residual_NCHW: Tensor, scale_NC11: Tensor, identity_NCHW: Tensor) -> Tensor:
        return torch.addcmul(identity_NCHW, residual_NCHW, scale_NC11)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])

    @staticmethod
    def backward(ctx: Any, grad_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        residual_NCHW, scale_NC11 = ctx.saved_tensors
        grad_scale_NC11 = (grad_NCHW * residual_NCHW).sum((2, 3), keepdim=True)
        return grad_NCHW * scale_NC11, grad_scale_NC11, grad_NCHW
