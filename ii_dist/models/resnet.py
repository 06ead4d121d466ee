"""The named networks, built on timm's ResNet and registered with timm.

In: `ii_dist.config.networks.NETWORKS`. Out: `MODELS`, name -> constructor; after this import
``timm.create_model("ini_resnet50", gate="fold3x3")`` works, with every option of timm's ResNet beside those of the
gate: gate, gate_reduction and fold_width (0 = the network's own), lens_filters (0 = planes / 16).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ii_dist.config.networks import NETWORKS, Shape
from ii_dist.models.blocks import GatedBasicBlock, GatedBottleneck
from ii_dist.models.compat import (
    ResNet,
    build_model_with_cfg,
    checkpoint_seq,
    feature_take_indices,
    generate_default_cfgs,
    register_model,
)
from ii_dist.models.gates import GateChoice

_BLOCKS = {"basic": GatedBasicBlock, "bottleneck": GatedBottleneck}
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class SmallImageResNet(ResNet):  # type: ignore[misc]
    """ResNet for images of about 32x32: a 3x3 stem of stride 1, no pooling, any number of stages.

    Takes the arguments of timm's ResNet but those of the stem.
    """

    feature_info: list[dict[str, Any]]

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
        self.stage_names = tuple(str(tap["module"]) for tap in self.feature_info[1:])

    def forward_features(self, x_NCHW: Tensor) -> Tensor:
        x: Tensor = self.act1(self.bn1(self.conv1(x_NCHW)))
        for name in self.stage_names:
            x = self._stage(name, x)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of the stem and of each stage at `indices`, and the last one; arguments as timm's."""
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        x = self.act1(self.bn1(self.conv1(x)))
        taken = [x] if 0 in wanted else []
        names = self.stage_names[:last] if stop_early else self.stage_names
        for index, name in enumerate(names, start=1):
            x = self._stage(name, x)
            if index in wanted:
                taken.append(x)
        return taken if intermediates_only else (x, taken)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last of `indices`, and the head; arguments as timm's."""
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        for name in self.stage_names[last:]:
            setattr(self, name, nn.Sequential())
        if last < len(self.stage_names):
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            prune_head = True
        if prune_head:
            self.reset_classifier(0, "")
        return list(wanted)

    def _stage(self, name: str, x: Tensor) -> Tensor:
        stage = getattr(self, name)
        y: Tensor = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
        return y


def _default_cfg(shape: Shape) -> dict[str, Any]:
    """What timm wants to know of a network; there are no published weights, hence no address."""
    sizes: dict[str, Any] = {"num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7), "crop_pct": 0.875}
    if shape.small_images:
        sizes = {"num_classes": 10, "input_size": (3, 32, 32), "pool_size": (8, 8), "crop_pct": 1.0}
    names = {"first_conv": "conv1", "classifier": "fc", "license": "apache-2.0"}
    return {**sizes, **names, "interpolation": "bilinear", "mean": _MEAN, "std": _STD}


def _build(
    name: str,
    pretrained: bool,
    gate: str = "fold3x3",
    gate_reduction: int = 0,
    fold_width: int = 0,
    lens_filters: int = 0,
    **options: Any,
) -> nn.Module:
    shape = NETWORKS[name]
    choice = GateChoice(gate, gate_reduction or shape.gate_reduction, fold_width or shape.fold_width, lens_filters)
    network = {"block": _BLOCKS[shape.block], "layers": shape.layers, "channels": shape.planes}
    block_args = {**(options.pop("block_args", None) or {}), "gate": choice}
    model: nn.Module = build_model_with_cfg(
        SmallImageResNet if shape.small_images else ResNet,
        name,
        pretrained,
        feature_cfg={"out_indices": tuple(range(1 + len(shape.layers)))},
        block_args=block_args,
        **{**network, **options},
    )
    return model


def _register(name: str) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **options: Any) -> nn.Module:
        return _build(name, pretrained, **options)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"Inner-Imaging network {name}. Takes the options of timm's ResNet and of the gate."
    registered: Callable[..., nn.Module] = register_model(entry)
    return registered


default_cfgs = generate_default_cfgs({name: _default_cfg(shape) for name, shape in NETWORKS.items()})
"""Read by timm at registration, under this name."""

__all__ = ["MODELS", "SmallImageResNet"]
MODELS: dict[str, Callable[..., nn.Module]] = {name: _register(name) for name in NETWORKS}
globals().update(MODELS)  # timm adds the names that it registers to `__all__`, so they must be there
