"""COMMITTED.json: what a checkpoint holds and what its bytes must be.

In: the facts of a save, or a step folder. Out: a frozen `Manifest`, or a CheckpointError of one line. The file must be
byte for byte what `Manifest.encode` writes, and ends with a hash of itself, so that any edit is noticed. No torch.
"""

import hashlib
import json
from math import prod
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ii_dist.checkpoint.disk import read_small
from ii_dist.checkpoint.shards import DTYPES
from ii_dist.config.errors import CheckpointError
from ii_dist.config.run_folder import COMMITTED, parse_step, shard_name

FORMAT = "ii_dist.checkpoint"
FORMAT_VERSION = 1
MANIFEST_LIMIT_BYTES = 64 << 20
_SELF_HASH = "manifest_sha256"
_ONE_PER_LINE = {"shards", "tensors"}

Natural = Annotated[int, Field(ge=0, lt=2**62)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# A hash of something that a run need not have (a synthetic data set has no index).
MaybeSha256 = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
Name = Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]+$")]
Dim = Annotated[int, Field(ge=0, lt=2**40)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PositionEntry(_Part):
    """The next image of the training order: epoch, and global images already handed out in it."""

    epoch: Natural
    offset: Natural


class TensorEntry(_Part):
    """Which shard a tensor is in, and what it is. dtype: safetensors' code (F32, BF16, I64, ...)."""

    shard: Name
    dtype: str
    shape: Annotated[tuple[Dim, ...], Field(max_length=16)]

    @model_validator(mode="after")
    def _known_dtype(self) -> Self:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        return self

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype][1]


class ShardEntry(_Part):
    file: Name
    bytes: Natural
    sha256: Sha256


class StateEntry(_Part):
    """Size and hash of state.json."""

    bytes: Natural
    sha256: Sha256


class Manifest(_Part):
    """Everything that COMMITTED.json says, but for its hash of itself."""

    format: Literal["ii_dist.checkpoint"] = "ii_dist.checkpoint"
    format_version: Literal[1] = 1
    step: Annotated[int, Field(ge=0, lt=10**9)]
    position: PositionEntry
    world_size: Annotated[int, Field(ge=1, lt=10**5)]
    engine: Name
    global_batch: Annotated[int, Field(ge=1, lt=2**31)]
    fence: Natural
    config_sha256: MaybeSha256
    index_sha256: MaybeSha256
    versions: dict[Name, Name]
    tensors: dict[Name, TensorEntry]
    shards: tuple[ShardEntry, ...]
    state: StateEntry

    @model_validator(mode="after")
    def _files_fit(self) -> Self:
        # A shard's name follows from its number: no path in a manifest can lead out of the step folder.
        room: dict[str, int] = {}
        for number, shard in enumerate(self.shards):
            if shard.file != shard_name(number, len(self.shards)):
                raise ValueError(f"shard {shard.file!r} should be {shard_name(number, len(self.shards))!r}")
            room[shard.file] = shard.bytes
        if not room or len(room) % self.world_size:
            raise ValueError(f"{len(room)} shards for a world size of {self.world_size}")
        for name, tensor in self.tensors.items():
            if tensor.shard not in room:
                raise ValueError(f"tensor {name} is in {tensor.shard!r}, which is not a shard of this step")
            room[tensor.shard] -= tensor.bytes
            if room[tensor.shard] < 0:
                raise ValueError(f"shard {tensor.shard} is too small for its tensors")
        return self

    @property
    def total_bytes(self) -> int:
        """Bytes of all shards and of state.json."""
        return sum(shard.bytes for shard in self.shards) + self.state.bytes

    def encode(self) -> bytes:
        """The text of COMMITTED.json: sorted keys, one tensor and one shard a line, its own hash last."""
        body = _lines(self.model_dump(mode="json"))
        return f'{{\n{body},\n"{_SELF_HASH}": "{_sha256(body)}"\n}}\n'.encode()

    def sha256(self) -> str:
        """The hash of the manifest that stands in COMMITTED.json; names this checkpoint among all others."""
        return _sha256(_lines(self.model_dump(mode="json")))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _lines(values: dict[str, object]) -> str:
    return ",\n".join(f"{_json(key)}: {_value(key, value)}" for key, value in sorted(values.items()))


def _value(key: str, value: object) -> str:
    if key in _ONE_PER_LINE and isinstance(value, dict) and value:
        return "{\n" + ",\n".join(f" {_json(k)}: {_json(v)}" for k, v in sorted(value.items())) + "\n}"
    if key in _ONE_PER_LINE and isinstance(value, list) and value:
        return "[\n" + ",\n".join(f" {_json(v)}" for v in value) + "\n]"
    return _json(value)


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False)


def read_manifest(step_folder: Path) -> Manifest:
    """The manifest of a committed step. CheckpointError if missing, a link, unreadable, edited, of another step."""
    data = read_small(step_folder / COMMITTED, MANIFEST_LIMIT_BYTES)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{COMMITTED}: not JSON ({len(data)} bytes)") from None
    if not isinstance(values, dict) or not isinstance(values.pop(_SELF_HASH, None), str):
        raise CheckpointError(f"{COMMITTED}: has no hash of itself")
    if (values.get("format"), values.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise CheckpointError(
            f"{COMMITTED}: format {values.get('format')!r} version {values.get('format_version')!r}; "
            f"this program reads {FORMAT} version {FORMAT_VERSION}"
        )
    try:
        # JSON mode: lists become tuples, everything else stays strict.
        manifest = Manifest.model_validate_json(json.dumps(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise CheckpointError(f"{COMMITTED}: {where}: {first['msg']}") from None
    if manifest.encode() != data:
        raise CheckpointError(f"{COMMITTED}: changed after it was written (its hash of itself does not agree)")
    if (step := parse_step(step_folder.name)) is not None and step != manifest.step:
        raise CheckpointError(f"{COMMITTED}: is of step {manifest.step}, not of this folder")
    return manifest
