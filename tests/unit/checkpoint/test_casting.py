"""Conversions of tensor files against torch's own, bit for bit."""

import pytest
import torch
from torch import Tensor

from ii_dist.checkpoint.casting import cast, decode, encode
from ii_dist.checkpoint.streams import tensor_bytes
from ii_dist.config.errors import CheckpointError

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def awkward() -> Tensor:
    """Ordinary numbers, and those where rounding shows: ties, the last that fit, denormals, zeros of both signs."""
    ordinary = torch.randn(10_000, generator=torch.Generator().manual_seed(1)) * 3
    bits = torch.randint(0, 2**31, (10_000,), generator=torch.Generator().manual_seed(2)).to(torch.int32)
    any_bits = bits.view(torch.float32)
    ties = ((torch.arange(0x3F80, 0x4080, dtype=torch.int32) << 16) + 0x8000).view(torch.float32)
    half_ties = 1 + (torch.arange(64) * 2 + 1) / 2048
    special = torch.tensor(
        [0.0, -0.0, 65504.0, -65504.0, 65519.0, 6e-8, 2.9e-8, 1e-40, torch.inf, -torch.inf, torch.nan]
    )
    odd_nans = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    all_of_them = torch.cat([ordinary, any_bits, -any_bits, ties, half_ties, special, odd_nans])
    return all_of_them[~torch.isfinite(all_of_them) | (all_of_them.abs() < 65520)]


@pytest.mark.parametrize("target", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("source", TYPES)
def test_as_torch_does(source: str, target: str) -> None:
    given = awkward().to(TYPES[source])
    given = given[~given.isfinite() | (given.abs().double() < 65520)]  # rounding to bfloat16 may have led beyond
    expected = given.to(TYPES[target])
    found = torch.frombuffer(bytearray(cast(tensor_bytes(given), source, target, "t")), dtype=TYPES[target])
    numbers = ~expected.isnan()
    assert torch.equal(found.isnan(), ~numbers)
    integers = torch.int32 if target == "F32" else torch.int16
    assert torch.equal(found.view(integers)[numbers], expected.view(integers)[numbers])


@pytest.mark.parametrize(("value", "target"), [(65520.0, "F16"), (-1e6, "F16"), (3.4e38, "BF16")])
def test_what_does_not_fit_is_named(value: float, target: str) -> None:
    given = tensor_bytes(torch.tensor([1.0, torch.inf, value, torch.nan]))
    with pytest.raises(CheckpointError, match=f"^conv.weight: a value of .* does not fit in {target}; choose a wider"):
        cast(given, "F32", target, "conv.weight")


def test_counters_stay() -> None:
    given = tensor_bytes(torch.tensor([2**40, -3]))
    assert cast(given, "I64", "F16", "n") is given
    assert encode(decode(b"", "BF16"), "F16", "n").nbytes == 0
