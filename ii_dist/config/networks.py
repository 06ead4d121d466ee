"""Facts about the networks that a config check needs before torch is imported.

In: nothing. Out: ``NETWORKS`` (name -> Shape) and ``GATE_NAMES``. `ii_dist.models` builds its networks from the same
table, so a network is described in one place.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

GATE_NAMES = ("none", "se", "fold3x3")


@dataclass(frozen=True, slots=True)
class Shape:
    """Residual stages of a ResNet.

    planes: width of the 3x3 convolutions of each stage; expansion: block output channels / planes;
    small_images: 3x3 stem of stride 1 without max-pool, for images of about 32x32;
    fold_width, gate_reduction: columns of a folded gate's image, channels / hidden units of a gate, where nothing
    else is asked for. Few channels need a small reduction: a gate of one hidden unit may be born dead.
    """

    block: Literal["basic", "bottleneck"]
    layers: tuple[int, ...]
    planes: tuple[int, ...] = (64, 128, 256, 512)
    small_images: bool = False
    fold_width: int = 16
    gate_reduction: int = 16

    @property
    def expansion(self) -> int:
        return 4 if self.block == "bottleneck" else 1

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels that leave the blocks of each stage: what a gate of that stage rescales."""
        return tuple(p * self.expansion for p in self.planes)


NETWORKS: dict[str, Shape] = {
    "ini_resnet18": Shape("basic", (2, 2, 2, 2)),
    "ini_resnet34": Shape("basic", (3, 4, 6, 3)),
    "ini_resnet50": Shape("bottleneck", (3, 4, 6, 3)),
    "ini_resnet101": Shape("bottleneck", (3, 4, 23, 3)),
    "ini_resnet152": Shape("bottleneck", (3, 8, 36, 3)),
    "ini_resnet20": Shape("basic", (3, 3, 3), planes=(16, 32, 64), small_images=True, fold_width=8, gate_reduction=4),
}


def fold_widths(channels: Iterable[int]) -> list[int]:
    """Columns k that fold 2 rows of each of these channel counts into 2 * channels / k rows, 3x3 or larger."""
    counts = sorted(set(channels))
    return [k for k in range(3, counts[0] + 1) if all(c % k == 0 and 2 * c // k >= 3 for c in counts)]
