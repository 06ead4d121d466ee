"""A tensor of another program's checkpoint that is read when it is asked for, and its bytes."""

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


def tensor_bytes(tensor: "Tensor") -> memoryview:
    """The row-major bytes of a CPU tensor; a view of its memory when that is row-major already."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")
