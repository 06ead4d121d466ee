"""The weighted mean of several networks' weights, one piece of one tensor at a time. No torch.

In: what a user gave: run folders, step folders, safetensors files. Out: a safetensors file under timm's names. Sums are
made in float64 and rounded once. Counters and other tensors that hold no floating-point numbers come from the last one.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ii_dist.checkpoint.casting import FLOATS, cast_code, decode, encode
from ii_dist.checkpoint.finder import FoundStep, LeftOut
from ii_dist.checkpoint.shards import TensorSpec
from ii_dist.checkpoint.streams import PIECE_BYTES, Placed, TensorReader, draft_tensors, placed_tensors
from ii_dist.checkpoint.weights import choose_step, weight_names
from ii_dist.config.errors import CheckpointError

_PIECE_ELEMENTS = PIECE_BYTES // 4


@dataclass(frozen=True, slots=True)
class Weights:
    """Where the weights of one network lie, by timm's names. step: None for a file; left_out: newer damaged steps."""

    path: Path
    tensors: dict[str, Placed]
    step: FoundStep | None = None
    left_out: tuple[LeftOut, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(tensor.spec.bytes for tensor in self.tensors.values())


def open_weights(path: Path, ema: bool) -> Weights:
    """The weights that `path` means: a safetensors file, a step, or the newest whole step of a run.

    A step's bytes are all hashed first; a file has no hashes. ema: the moving averages of a step; a file has only one
    set. Raises CheckpointError.
    """
    if path.is_file():
        return Weights(path, {tensor.spec.name: tensor for tensor in placed_tensors(path)})
    step, left_out = choose_step(path)
    names = weight_names(step.manifest, ema)
    shards = {entry.shard for old in names.values() for entry in [step.manifest.tensors[old]]}
    placed = {t.spec.name: t for shard in sorted(shards) for t in placed_tensors(step.path / shard)}
    try:
        return Weights(step.path, {new: placed[old] for new, old in names.items()}, step, tuple(left_out))
    except KeyError as error:
        raise CheckpointError(f"{step.path}: {error} is not in the shard that the manifest names") from None


def check_same_network(inputs: Sequence[Weights]) -> None:
    """Raises CheckpointError, naming the first tensor in which two of them differ."""
    first = inputs[0]
    for other in inputs[1:]:
        for name in sorted(first.tensors.keys() | other.tensors.keys()):
            mine, theirs = _shape(first, name), _shape(other, name)
            if mine != theirs:
                raise CheckpointError(
                    f"{first.path} and {other.path} are of different networks: {name} is {mine} and {theirs}"
                )


def _shape(weights: Weights, name: str) -> str:
    return str(list(weights.tensors[name].spec.shape)) if name in weights.tensors else "absent"


def uniform(count: int) -> list[float]:
    return [1 / count] * count


def exponential(count: int, decay: float) -> list[float]:
    """Shares of a moving average, a = decay a + (1 - decay) x, that starts at the first input."""
    return [decay ** (count - 1)] + [(1 - decay) * decay ** (count - 1 - k) for k in range(1, count)]


def average(
    inputs: Sequence[Weights],
    shares: Sequence[float],
    out: Path,
    dtype: str | None = None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> int:
    """Write the sum of share * weights to `out`; the file's size.

    Inputs must be of one network. dtype: safetensors code of the result; None = of the inputs, F32 where they differ.
    on_bytes hears of what was read. Raises CheckpointError; then `out` is as it was.
    """
    specs = [_result(name, inputs, dtype) for name in inputs[0].tensors]
    with draft_tensors(out, specs, {}) as draft, closing(TensorReader()) as reader:
        for spec in specs:
            placed = [weights.tensors[spec.name] for weights in inputs]
            count = spec.bytes // spec.element_bytes
            for start in range(0, count, _PIECE_ELEMENTS):
                size = min(_PIECE_ELEMENTS, count - start)
                data = _mean(reader, placed, shares, spec, start, size)
                draft.write(spec.name, start * spec.element_bytes, data)
                on_bytes(sum(size * tensor.spec.element_bytes for tensor in placed))
    return draft.bytes


def _result(name: str, inputs: Sequence[Weights], dtype: str | None) -> TensorSpec:
    specs = [weights.tensors[name].spec for weights in inputs]
    own = specs[-1].dtype
    if own in FLOATS and any(spec.dtype != own for spec in specs):
        own = "F32"
    return TensorSpec(name, cast_code(own, dtype), specs[0].shape)


def _mean(
    reader: TensorReader, placed: Sequence[Placed], shares: Sequence[float], spec: TensorSpec, start: int, size: int
) -> bytes | bytearray | memoryview:
    """Elements [start, start + size) of the result."""
    if spec.dtype not in FLOATS:
        return reader.read(placed[-1], start * spec.element_bytes, size * spec.element_bytes)
    total = np.zeros(size)
    for tensor, share in zip(placed, shares, strict=True):
        if share == 0:  # not even its infinities count
            continue
        own = tensor.spec
        if own.dtype not in FLOATS:
            raise CheckpointError(f"{tensor.file}: {own.name} is {own.dtype}, a floating-point tensor elsewhere")
        data = reader.read(tensor, start * own.element_bytes, size * own.element_bytes)
        total += share * decode(data, own.dtype).astype(np.float64)
    return encode(total, spec.dtype, spec.name)
