"""Pre-activation networks for small images, as in the authors' public code, with or without a gate.

In: images_NCHW of about 32x32. Out: logits_NK. A block is residual * scale + identity with nothing after the sum; norm
and activation stand before each convolution, so that the gate sees the bare output of the last one, and the identity
behind the projection where there is one.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ii_dist.models.blocks import gate_of_block, gated_sum, init_convolutions
from ii_dist.models.compat import DropPath, create_classifier
from ii_dist.models.gates import GateChoice
from ii_dist.models.stages import StagedNet


class PreActBlock(nn.Module):
    """What both kinds of block share: first activation, projection, gate, sum. `factory` is device and dtype."""

    expansion: int

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        *,
        gate: GateChoice,
        drop_path: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__()
        channels = planes * self.expansion
        projected = stride != 1 or inplanes != channels
        self.bn1 = nn.BatchNorm2d(inplanes, **factory)
        self.act = nn.ReLU(inplace=True)
        # The projection looks at the activated input and has no norm; where there is none, the identity is the input.
        self.downsample = nn.Conv2d(inplanes, channels, 1, stride, bias=False, **factory) if projected else None
        self.gate = gate_of_block(gate, channels, planes, **factory)
        self.drop_path = DropPath(drop_path) if drop_path else None

    def forward(self, x_NCHW: Tensor) -> Tensor:
        active = self.act(self.bn1(x_NCHW))
        identity = x_NCHW if self.downsample is None else self.downsample(active)
        return gated_sum(self.gate, self.drop_path, self.residual(active), identity)

    def residual(self, active_NCHW: Tensor) -> Tensor:
        raise NotImplementedError

    def last_convolution(self) -> nn.Conv2d:
        raise NotImplementedError

    def zero_init_last(self) -> None:
        """Start the last convolution at 0, so that the block begins as its identity path."""
        nn.init.zeros_(self.last_convolution().weight)


class PreActBasic(PreActBlock):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1, **options: Any) -> None:
        super().__init__(inplanes, planes, stride, **options)
        factory = _factory(options)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(planes, **factory)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False, **factory)

    def residual(self, active_NCHW: Tensor) -> Tensor:
        y: Tensor = self.conv2(self.act(self.bn2(self.conv1(active_NCHW))))
        return y

    def last_convolution(self) -> nn.Conv2d:
        return self.conv2


class PreActBottleneck(PreActBlock):
    """1x1, 3x3 (which has the stride) and 1x1 convolution."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1, **options: Any) -> None:
        super().__init__(inplanes, planes, stride, **options)
        factory = _factory(options)
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(planes, **factory)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False, **factory)
        self.bn3 = nn.BatchNorm2d(planes, **factory)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False, **factory)

    def residual(self, active_NCHW: Tensor) -> Tensor:
        inner = self.act(self.bn2(self.conv1(active_NCHW)))
        y: Tensor = self.conv3(self.act(self.bn3(self.conv2(inner))))
        return y

    def last_convolution(self) -> nn.Conv2d:
        return self.conv3


class PreActResNet(StagedNet):
    """Norm of the input without gain and shift, 3x3 stem of stride 1, stages, norm, activation, pooling, classifier.

    channels: planes of each stage, as timm's ResNet has it; stem_width: channels of the stem; norm_after_stem: a norm
    behind the stem (wide networks); zero_init_last: start the last convolution of each block at 0 (not in the authors'
    code).
    """

    def __init__(
        self,
        block: type[PreActBlock],
        layers: tuple[int, ...],
        channels: tuple[int, ...],
        *,
        gate: GateChoice,
        stem_width: int = 16,
        norm_after_stem: bool = False,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        self.norm_in = nn.BatchNorm2d(in_chans, affine=False, **factory)
        self.conv1 = nn.Conv2d(in_chans, stem_width, 3, padding=1, bias=False, **factory)
        self.bn1: nn.Module = nn.BatchNorm2d(stem_width, **factory) if norm_after_stem else nn.Identity()
        self.feature_info = [{"num_chs": stem_width, "reduction": 1, "module": "bn1"}]
        width, depth = stem_width, sum(layers)
        for stage, (planes, blocks) in enumerate(zip(channels, layers, strict=True)):
            built = []
            for i in range(blocks):
                # Stochastic depth grows from block to block, as in timm's ResNet.
                rate = drop_path_rate * (sum(layers[:stage]) + i) / max(1, depth - 1)
                stride = 2 if i == 0 and stage > 0 else 1
                built.append(block(width, planes, stride, gate=gate, drop_path=rate, **factory))
                width = planes * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*built))
            self.feature_info.append({"num_chs": width, "reduction": 2**stage, "module": f"layer{stage + 1}"})
        self.norm: nn.Module = nn.BatchNorm2d(width, **factory)
        self.act: nn.Module = nn.ReLU(inplace=True)
        self.num_features = width
        self.global_pool, self.fc = create_classifier(width, num_classes, pool_type=global_pool, **factory)
        self.head_hidden_size = width * self.global_pool.feat_mult()
        self.init_weights(zero_init_last)

    def init_weights(self, zero_init_last: bool = False) -> None:
        init_convolutions(self)
        for module in self.modules():
            if zero_init_last and isinstance(module, PreActBlock):
                module.zero_init_last()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names from the input to the classifier, for layer decay."""
        blocks = r"^layer(\d+)" if coarse else [(r"^layer(\d+)\.(\d+)", None), (r"^norm\.", (99999,))]
        return {"stem": r"^conv1|bn1|norm_in", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; 0 classes for none. global_pool: as timm's, "" for none, None for the present one."""
        weight = self.conv1.weight
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=pool, device=weight.device, dtype=weight.dtype
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_stem(self, x_NCHW: Tensor) -> Tensor:
        y: Tensor = self.bn1(self.conv1(self.norm_in(x_NCHW)))
        return y

    def forward_norm(self, x_NCHW: Tensor) -> Tensor:
        y: Tensor = self.act(self.norm(x_NCHW))
        return y

    def drop_norm(self) -> None:
        self.norm, self.act = nn.Identity(), nn.Identity()

    def forward_head(self, x_NCHW: Tensor, pre_logits: bool = False) -> Tensor:
        pooled_NC = self.global_pool(x_NCHW)
        if self.drop_rate:
            pooled_NC = F.dropout(pooled_NC, self.drop_rate, self.training)
        y: Tensor = pooled_NC if pre_logits else self.fc(pooled_NC)
        return y

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x_NCHW))


def _factory(options: dict[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in ("device", "dtype") if key in options}
