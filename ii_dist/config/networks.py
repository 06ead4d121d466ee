"""Facts about the networks that a config check needs before torch is imported.

In: nothing. Out: ``NETWORKS`` (name -> Shape), the words that a gate is chosen by, and what can be folded.
`ii_dist.models` builds its networks from the same table, so a network is described in one place.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

GATE_NAMES = ("none", "se", "double_fc", "pair1x1", "pair2x1", "fold3x3")
FOLD_LAYOUTS = ("columns", "groups")
LENS_FORMS = ("one_filter", "plain")
GATE_INITS = ("cured", "authors")


@dataclass(frozen=True, slots=True)
class Shape:
    """Residual stages of a network and what stands around them.

    planes: width of the 3x3 convolutions of each stage; expansion: block output channels / planes;
    small_images: 3x3 stem of stride 1 without max-pool, for images of about 32x32;
    fold_width, fold_layout, gate_reduction: the pseudo-image of a folded gate (columns, or groups where the layout says
    so) and channels / hidden units of a gate, where nothing else is asked for. Few channels need a small reduction: a
    gate of one hidden unit may be born dead.
    pre_activation: norm and activation before each convolution, none after the sum, and a norm of the input;
    norm_after_stem: a norm, without activation, behind the stem of a pre-activation network;
    deep_stem: three 3x3 convolutions for the stem and average pooling before the projections (the D variants);
    cardinality, base_width: groups of the 3x3 convolutions, and their width a group for 64 planes;
    anti_aliased: a blur before each stride of 2.
    """

    block: Literal["basic", "bottleneck"]
    layers: tuple[int, ...]
    planes: tuple[int, ...] = (64, 128, 256, 512)
    small_images: bool = False
    fold_width: int = 16
    gate_reduction: int = 16
    fold_layout: Literal["columns", "groups"] = "columns"
    pre_activation: bool = False
    norm_after_stem: bool = False
    deep_stem: bool = False
    cardinality: int = 1
    base_width: int = 64
    anti_aliased: bool = False

    @property
    def expansion(self) -> int:
        return 4 if self.block == "bottleneck" else 1

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels that leave the blocks of each stage: what a gate of that stage rescales."""
        return tuple(p * self.expansion for p in self.planes)


_R50, _R101, _R152 = (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)


def _preresnet(block: Literal["basic", "bottleneck"], fold_width: int) -> Shape:
    """18 blocks a stage: 110 layers of basic blocks, 164 of bottlenecks."""
    return Shape(
        block, (18, 18, 18), planes=(16, 32, 64), small_images=True, pre_activation=True, fold_width=fold_width
    )


def _wide(layers_a_stage: int, width: int, fold_width: int) -> Shape:
    """Wide residual network: `width` times the planes of the narrow one; gates fold into groups of channels."""
    return Shape(
        "basic",
        (layers_a_stage,) * 3,
        planes=(16 * width, 32 * width, 64 * width),
        small_images=True,
        pre_activation=True,
        norm_after_stem=True,
        fold_layout="groups",
        fold_width=fold_width,
    )


NETWORKS: dict[str, Shape] = {
    "ini_resnet18": Shape("basic", (2, 2, 2, 2)),
    "ini_resnet34": Shape("basic", (3, 4, 6, 3)),
    "ini_resnet50": Shape("bottleneck", _R50),
    "ini_resnet101": Shape("bottleneck", _R101),
    "ini_resnet152": Shape("bottleneck", _R152),
    "ini_resnet50d": Shape("bottleneck", _R50, deep_stem=True),
    "ini_resnet101d": Shape("bottleneck", _R101, deep_stem=True),
    "ini_resnet152d": Shape("bottleneck", _R152, deep_stem=True),
    "ini_resnext50_32x4d": Shape("bottleneck", _R50, cardinality=32, base_width=4),
    "ini_resnext101_32x4d": Shape("bottleneck", _R101, cardinality=32, base_width=4),
    "ini_wide_resnet50_2": Shape("bottleneck", _R50, base_width=128),
    "ini_wide_resnet101_2": Shape("bottleneck", _R101, base_width=128),
    "ini_resnetblur50": Shape("bottleneck", _R50, anti_aliased=True),
    "ini_resnet20": Shape("basic", (3, 3, 3), planes=(16, 32, 64), small_images=True, fold_width=8, gate_reduction=4),
    "ini_preresnet20": Shape(
        "basic", (3, 3, 3), (16, 32, 64), small_images=True, pre_activation=True, fold_width=8, gate_reduction=4
    ),
    # The networks of the authors' code and tables. Theirs fold 16 columns, which 16 channels cannot be, or 10 groups,
    # which 128 channels cannot be: there 8.
    "ini_preresnet110": _preresnet("basic", fold_width=8),
    "ini_preresnet164": _preresnet("bottleneck", fold_width=16),
    "ini_wrn16_8": _wide(2, 8, fold_width=8),
    "ini_wrn22_10": _wide(3, 10, fold_width=10),
    "ini_wrn28_10": _wide(4, 10, fold_width=10),
}


def fold_shape(channels: int, fold: int, layout: str) -> tuple[int, int]:
    """Height and width of the image that 2 rows of `channels` signals are folded into: `fold` columns, or `fold` groups
    of consecutive channels, each two rows."""
    return (2 * fold, channels // fold) if layout == "groups" else (2 * channels // fold, fold)


def fold_widths(channels: Iterable[int], layout: str = "columns", kernel: int = 3) -> list[int]:
    """Columns (or groups) that divide each of these channel counts and leave a lens of `kernel` x `kernel` room."""
    counts = sorted(set(channels))
    return [
        k
        for k in range(1, counts[0] + 1)
        if all(c % k == 0 and min(fold_shape(c, k, layout)) >= kernel for c in counts)
    ]
