"""Networks: ResNets of timm with a gate between residual and identity. No ranks, no files.

In: `ModelConfig` and the number of classes. Out: a plain `nn.Module`, images_NCHW -> logits_NK.
Importing the room registers its networks with timm: ``timm.create_model("ini_resnet50", gate="fold3x3")``.

    compat    the door to timm
    imaging   feature maps > channel signals > pseudo-image (pure)
    gates     residual, identity > one factor a channel; table `GATES`
    blocks    timm's residual blocks with a gate
    resnet    the named networks; table `MODELS`, from `ii_dist.config.networks`
"""

from torch import nn

from ii_dist.config.errors import ConfigError
from ii_dist.config.schema import ModelConfig
from ii_dist.models.compat import ensure_torchvision
from ii_dist.models.gates import GATES, Gate, GateChoice, make_gate
from ii_dist.models.resnet import MODELS

__all__ = ["GATES", "MODELS", "Gate", "GateChoice", "create_model", "ensure_torchvision", "make_gate"]


def create_model(cfg: ModelConfig, num_classes: int) -> nn.Module:
    """The network that `cfg` names, on the CPU (or on the device of a surrounding ``with torch.device(...)``)."""
    if cfg.network not in MODELS:
        raise ConfigError(f"model.network {cfg.network!r} is not one of {', '.join(MODELS)}")
    return MODELS[cfg.network](
        gate=cfg.gate,
        gate_reduction=cfg.gate_reduction,
        fold_width=cfg.fold_width,
        lens_filters=cfg.lens_filters,
        num_classes=num_classes,
        drop_path_rate=cfg.drop_path,
        zero_init_last=cfg.zero_init_last,
    )
