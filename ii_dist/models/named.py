"""The named networks, registered with timm.

In: `ii_dist.config.networks.NETWORKS`. Out: `MODELS`, name -> constructor; after this import
``timm.create_model("ini_resnet50", gate="fold3x3")`` works, with every option of timm's ResNet (or, for the
pre-activation networks, of `PreActResNet`) beside those of the gate: `gate`, `gate_reduction` and the other fields of
`GateChoice` by their names; 0 or nothing = the network's own.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import nn

from ii_dist.config.networks import NETWORKS, Shape
from ii_dist.models.blocks import GatedBasicBlock, GatedBottleneck
from ii_dist.models.compat import BlurPool2d, build_model_with_cfg, generate_default_cfgs, register_model
from ii_dist.models.gates import GateChoice
from ii_dist.models.preact import PreActBasic, PreActBottleneck, PreActResNet
from ii_dist.models.resnet import GatedResNet, SmallImageResNet

_BLOCKS = {"basic": GatedBasicBlock, "bottleneck": GatedBottleneck}
_PREACT_BLOCKS = {"basic": PreActBasic, "bottleneck": PreActBottleneck}
_OPTION_OF = {"name": "gate", "reduction": "gate_reduction"}
"""Fields of `GateChoice` whose option has another name."""


def gate_choice(shape: Shape, options: dict[str, Any]) -> GateChoice:
    """The gate that `options` ask for, of which it takes its own out; what they leave open is the network's own."""
    asked = {f.name: options.pop(_OPTION_OF.get(f.name, f.name), None) for f in fields(GateChoice)}
    own = {"reduction": shape.gate_reduction, "fold_width": shape.fold_width, "fold_layout": shape.fold_layout}
    known = {key: value for key, value in own.items() if key in asked}
    return GateChoice(**{**known, **{key: value for key, value in asked.items() if value}})


def _parts(shape: Shape, gate: GateChoice, options: dict[str, Any]) -> tuple[type[nn.Module], dict[str, Any]]:
    """Class of the network and its arguments."""
    network: dict[str, Any] = {"layers": shape.layers, "channels": shape.planes}
    if shape.pre_activation:
        network |= {"block": _PREACT_BLOCKS[shape.block], "gate": gate, "norm_after_stem": shape.norm_after_stem}
        return PreActResNet, {**network, **options}
    if shape.deep_stem:
        network |= {"stem_type": "deep", "stem_width": 32, "avg_down": True}
    if shape.anti_aliased:
        network["aa_layer"] = BlurPool2d
    if not shape.small_images:
        network |= {"cardinality": shape.cardinality, "base_width": shape.base_width}
    block_args = {**(options.pop("block_args", None) or {}), "gate": gate}
    network |= {"block": _BLOCKS[shape.block], **options, "block_args": block_args}
    return SmallImageResNet if shape.small_images else GatedResNet, network


def _build(name: str, pretrained: bool, **options: Any) -> nn.Module:
    shape = NETWORKS[name]
    network, arguments = _parts(shape, gate_choice(shape, options), options)
    taps = {"out_indices": tuple(range(1 + len(shape.layers)))}
    model: nn.Module = build_model_with_cfg(network, name, pretrained, feature_cfg=taps, **arguments)
    return model


def _default_cfg(shape: Shape) -> dict[str, Any]:
    """What timm wants to know of a network; there are no published weights, hence no address."""
    sizes: dict[str, Any] = {"num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7), "crop_pct": 0.875}
    if shape.small_images:
        sizes = {"num_classes": 10, "input_size": (3, 32, 32), "pool_size": (8, 8), "crop_pct": 1.0}
    first_conv = "conv1.0" if shape.deep_stem else "conv1"
    names = {"first_conv": first_conv, "classifier": "fc", "license": "apache-2.0", "interpolation": "bilinear"}
    return {**sizes, **names, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def _register(name: str) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **options: Any) -> nn.Module:
        return _build(name, pretrained, **options)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"Inner-Imaging network {name}. Takes the options of timm's ResNet and of the gate."
    registered: Callable[..., nn.Module] = register_model(entry)
    return registered


default_cfgs = generate_default_cfgs({name: _default_cfg(shape) for name, shape in NETWORKS.items()})
"""Read by timm at registration, under this name."""

__all__ = ["MODELS", "gate_choice"]
MODELS: dict[str, Callable[..., nn.Module]] = {name: _register(name) for name in NETWORKS}
globals().update(MODELS)  # timm adds the names that it registers to `__all__`, so they must be there
