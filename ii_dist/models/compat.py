"""The one door to timm, which needs an importable torchvision.

In: nothing. Out: the names of timm that the room builds on. torchvision's wheel is linked against CUDA; beside a CPU
build of torch its operators cannot be registered and the import fails, although nothing here calls them.
"""

import importlib
import sys

import torch

from ii_dist.config.errors import ClusterError

# Operators that torchvision 0.28 describes to the tracer at import, whether or not its library could be loaded.
_DESCRIBED_OPS = ("nms", "qnms")


def ensure_torchvision() -> None:
    """Make `import torchvision` work; does nothing where it already does, as on a machine with CUDA.

    Beside a CPU build of torch the missing operators are declared without code: transforms and timm work, calling
    `torchvision.ops.nms` is an error. Raises ClusterError where the package is not installed.
    """
    try:
        importlib.import_module("torchvision")
        return
    except ModuleNotFoundError as error:
        raise ClusterError(f"{error.name} is missing: pip install torchvision==0.28.0 timm==1.0.31") from error
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    for op in _DESCRIBED_OPS:
        torch.library.define(f"torchvision::{op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")


ensure_torchvision()

try:
    from timm.layers import BlurPool2d, DropPath, create_classifier
    from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
    from timm.models._efficientnet_blocks import (
        CondConvResidual,
        ConvBnAct,
        DepthwiseSeparableConv,
        EdgeResidual,
        InvertedResidual,
        UniversalInvertedResidual,
    )
    from timm.models._features import feature_take_indices
    from timm.models.convnext import ConvNeXtBlock
    from timm.models.regnet import Bottleneck as RegNetBottleneck
    from timm.models.resnet import BasicBlock, Bottleneck, ResNet
except ModuleNotFoundError as missing:
    raise ClusterError(f"{missing.name} is missing: pip install timm==1.0.31") from missing

__all__ = [
    "BasicBlock",
    "BlurPool2d",
    "Bottleneck",
    "CondConvResidual",
    "ConvBnAct",
    "ConvNeXtBlock",
    "DepthwiseSeparableConv",
    "DropPath",
    "EdgeResidual",
    "InvertedResidual",
    "RegNetBottleneck",
    "ResNet",
    "UniversalInvertedResidual",
    "build_model_with_cfg",
    "checkpoint_seq",
    "create_classifier",
    "ensure_torchvision",
    "feature_take_indices",
    "generate_default_cfgs",
    "register_model",
]
