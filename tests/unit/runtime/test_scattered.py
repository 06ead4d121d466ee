"""A tensor in stretches comes back bit for bit, whatever stands in it."""

import pytest
import torch

from ii_dist.runtime.scattered import Scattered

AS_THEY_ARE = torch.tensor([0x7FC00001, -0x800000, 1, -1, 0, 2**31 - 1, -(2**31)], dtype=torch.int32)


def test_one_rank_needs_no_group() -> None:
    part = AS_THEY_ARE.view(torch.float32)
    whole = Scattered(torch.Size([7]), part, 0).collect(0)
    assert whole is not None
    assert torch.equal(whole.view(torch.int32), AS_THEY_ARE)
    assert whole.data_ptr() != part.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8])
def test_what_it_says_of_itself(dtype: torch.dtype) -> None:
    scattered = Scattered(torch.Size([2, 3]), torch.zeros(6, dtype=dtype), 0)
    assert (scattered.dtype, scattered.nbytes, scattered.is_cuda) == (dtype, 6 * dtype.itemsize, False)
    whole = scattered.collect()
    assert whole is not None
    assert (whole.dtype, whole.shape) == (dtype, (2, 3))
