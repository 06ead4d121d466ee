"""A tensor of another program's checkpoint that is read when it is asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ii_dist.checkpoint.shards import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ForeignTensor:
    """`load` raises CheckpointError where the file is not what it promised."""

    spec: TensorSpec
    load: Callable[[], "Tensor"]
