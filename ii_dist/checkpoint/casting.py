"""Numbers of a tensor file in another floating-point type, a piece at a time, without torch.

In: the bytes of some elements and their safetensors code. Out: bytes or an array. Every narrowing rounds to the nearest
value, ties to even, and goes through float32, as torch does.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ii_dist.config.errors import CheckpointError

TARGETS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
"""What a user types -> safetensors code."""

_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
FLOATS = frozenset({*_NUMPY, "BF16"})
"""Codes that can be converted; all other tensors (counters, masks) are copied as they are."""

Bytes = bytes | bytearray | memoryview


def decode(data: Bytes, dtype: str) -> NDArray[Any]:
    """The elements, of a floating-point type, as an array: of the same type, or float32 for bfloat16."""
    if dtype == "BF16":
        wide: NDArray[Any] = np.frombuffer(data, "<u2").astype("<u4")
        wide <<= 16
        return wide.view(np.float32)
    return np.frombuffer(data, _NUMPY[dtype])


def encode(values: NDArray[Any], dtype: str, name: str) -> memoryview:
    """The bytes of `values` as `dtype`. Raises CheckpointError, naming the tensor, where a number becomes infinite."""
    if dtype == "F64":
        return _bytes(values.astype("<f8", copy=False))
    with np.errstate(over="ignore"):
        single = values.astype("<f4", copy=False)
        narrow = {"F32": lambda: single, "F16": lambda: single.astype("<f2"), "BF16": lambda: _to_bf16(single)}[dtype]()
    infinite = (narrow & 0x7FFF) == 0x7F80 if dtype == "BF16" else np.isinf(narrow)
    if infinite.any() and not np.isinf(values[infinite]).all():
        largest = float(np.abs(values[np.isfinite(values)]).max())
        raise CheckpointError(f"{name}: a value of {largest:.3g} does not fit in {dtype}; choose a wider --dtype")
    return _bytes(narrow)


def cast(data: Bytes, source: str, target: str, name: str) -> Bytes:
    """Some elements of a tensor in another type; those that are not floating-point numbers stay as they are."""
    if source == target or source not in FLOATS:
        return data
    return encode(decode(data, source), target, name)


def cast_code(dtype: str, target: str | None) -> str:
    """What a tensor of type `dtype` is in a file that was asked to hold `target` (None: as it is)."""
    return target if target is not None and dtype in FLOATS else dtype


def _to_bf16(single: NDArray[Any]) -> NDArray[Any]:
    bits = single.view(np.uint32)
    rounded: NDArray[Any] = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    not_a_number = np.isnan(single)
    if not_a_number.any():
        rounded[not_a_number] = 0x7FC0
    return rounded


def _bytes(values: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(values).data.cast("B") if values.size else memoryview(b"")
