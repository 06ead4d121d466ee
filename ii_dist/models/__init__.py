"""Networks: timm's, and the authors' small ones, with a gate between residual and identity. No ranks.

In: `ModelConfig` and the number of classes. Out: a plain `nn.Module`, images_NCHW -> logits_NK.
Importing the room registers its networks with timm: ``timm.create_model("ini_resnet50", gate="fold3x3")``.

    compat    the door to timm
    imaging   feature maps > channel signals > pseudo-image (pure)
    lens      pseudo-image > what a gate squeezes; one filter instead of m
    gates     residual, identity > one factor a channel; table `GATES`
    blocks    timm's residual blocks with a gate, and the sum that ends every gated block
    stages    what a network of stem and stages owes timm: features, pruning, gradient checkpointing
    resnet    timm's ResNet with gates, for large and small images
    preact    the pre-activation networks of the authors' code
    named     the named networks; table `MODELS`, from `ii_dist.config.networks`
    graft     gates for the residual blocks of timm's other families
    table     parameters and multiply-adds of every network and gate, beside what was published
    watching  what the gates of a network see and answer while it runs
    pretrained  weights of a plain network under new gates; the only file that the room reads
"""

from torch import nn

from ii_dist.config.errors import ConfigError
from ii_dist.config.schema import ModelConfig
from ii_dist.models.compat import ensure_torchvision
from ii_dist.models.gates import GATES, Gate, GateChoice, make_gate
from ii_dist.models.graft import graft_gates
from ii_dist.models.lens import fuse_lenses
from ii_dist.models.named import MODELS
from ii_dist.models.pretrained import load_backbone
from ii_dist.models.table import ModelRow, format_models, model_rows

__all__ = [
    "GATES",
    "MODELS",
    "Gate",
    "GateChoice",
    "ModelRow",
    "create_model",
    "ensure_torchvision",
    "format_models",
    "fuse_lenses",
    "graft_gates",
    "load_backbone",
    "make_gate",
    "model_rows",
]


def create_model(cfg: ModelConfig, num_classes: int) -> nn.Module:
    """The network that `cfg` names, on the CPU (or on the device of a surrounding ``with torch.device(...)``)."""
    if cfg.network not in MODELS:
        raise ConfigError(f"model.network {cfg.network!r} is not one of {', '.join(MODELS)}")
    return MODELS[cfg.network](
        gate=cfg.gate,
        gate_reduction=cfg.gate_reduction,
        fold_width=cfg.fold_width,
        lens_filters=cfg.lens_filters,
        fold_layout=cfg.fold_layout,
        lens_kernel=cfg.lens_kernel,
        lens=cfg.lens,
        gate_init=cfg.gate_init,
        num_classes=num_classes,
        drop_path_rate=cfg.drop_path,
        zero_init_last=cfg.zero_init_last,
    )
