"""A tensor that no rank holds whole.

In: this rank's stretch of it. Out: the whole of it, on the rank that is to have it, bit for bit.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_BITS = {4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Scattered:
    """A row-major tensor cut into stretches of elements, one a rank; a stretch may be empty.

    The stretches of all ranks cover it without overlap. part: this rank's stretch, flat, the owner's own memory.
    start: the place of its first element in the flattened tensor.
    """

    shape: torch.Size
    part: Tensor
    start: int

    @property
    def dtype(self) -> torch.dtype:
        return self.part.dtype

    @property
    def is_cuda(self) -> bool:
        return self.part.is_cuda

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.part.element_size()

    def collect(self, rank: int | None = None) -> Tensor | None:
        """The whole tensor on `rank` (None: on every rank), on the device of its stretches; None elsewhere. Collective.

        Needs memory for one whole tensor on every rank. The stretches are added up as whole numbers, where every place
        is zero on all ranks but one: floating-point sums would lose the sign of -0.0.
        """
        bits, stretch = self._as_bits()
        whole = torch.zeros(
            self.shape.numel() * self.part.element_size() // bits.itemsize, dtype=bits, device=stretch.device
        )
        first = self.start * self.part.element_size() // bits.itemsize
        whole[first : first + stretch.numel()] = stretch
        if dist.is_initialized():
            if rank is None:
                dist.all_reduce(whole)
            else:
                dist.reduce(whole, dst=rank)
                if dist.get_rank() != rank:
                    return None
        return whole.view(self.dtype).view(self.shape)

    def _as_bits(self) -> tuple[torch.dtype, Tensor]:
        bits = _BITS.get(self.part.element_size(), torch.uint8)
        return bits, self.part.detach().view(bits)
