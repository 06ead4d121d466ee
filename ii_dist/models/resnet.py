"""timm's ResNet with a gate in every block, for large and for small images.

In: timm's arguments, the gate among `block_args`. Out: images_NCHW -> logits_NK. Without a gate the networks are
timm's, bit for bit.
"""

from typing import Any

from torch import Tensor, nn

from ii_dist.models.blocks import init_convolutions
from ii_dist.models.compat import ResNet
from ii_dist.models.stages import StagedNet


class GatedResNet(ResNet):  # type: ignore[misc]
    """timm's ResNet, whose gates keep the start that they gave themselves."""

    def init_weights(self, zero_init_last: bool = True) -> None:
        init_convolutions(self)
        for module in self.modules():
            if zero_init_last and hasattr(module, "zero_init_last"):
                module.zero_init_last()


class SmallImageResNet(StagedNet, GatedResNet):
    """ResNet for images of about 32x32: a 3x3 stem of stride 1, no pooling, any number of stages.

    Takes the arguments of timm's ResNet but those of the stem.
    """

    bn1: nn.Module
    act1: nn.Module

    def __init__(self, block: Any, layers: tuple[int, ...], in_chans: int = 3, **options: Any) -> None:
        planes: int = options["channels"][0]
        # A deep stem of half the width makes timm build the first stage for `planes` inputs; the stem itself goes.
        super().__init__(block, layers, in_chans=in_chans, stem_type="deep", stem_width=planes // 2, **options)
        device, dtype = options.get("device"), options.get("dtype")
        self.conv1 = nn.Conv2d(in_chans, planes, 3, padding=1, bias=False, device=device, dtype=dtype)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        for tap in self.feature_info:  # timm counts from a stem of stride 4
            tap["reduction"] = max(1, tap["reduction"] // 4)

    def forward_stem(self, x_NCHW: Tensor) -> Tensor:
        y: Tensor = self.act1(self.bn1(self.conv1(x_NCHW)))
        return y

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        ResNet.reset_classifier(self, num_classes, global_pool)
