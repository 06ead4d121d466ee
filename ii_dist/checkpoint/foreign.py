"""Files of other programs that are pickles: the only place that opens any, and what it lets them name.

In: a file of DeepSpeed or of torch's distributed checkpoints. Out: tensors and plain values. A pickle may name any
function and have it called. Here it may name what is listed, which does nothing but hold values; anything else is
refused before it is even looked up. Our own checkpoints hold no pickles.
"""

import io
import os
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from ii_dist.checkpoint.disk import open_regular, read_small
from ii_dist.checkpoint.shards import DTYPES
from ii_dist.config.errors import CheckpointError

_METADATA_LIMIT_BYTES = 256 << 20
_NAMED = re.compile(r"GLOBAL ([\w.]+)")
# What a broken or hostile pickle may end in, besides being refused.
_FAILURES = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


class StandIn:
    """Takes the place of another program's class: holds what was stored of the object, does nothing."""

    def __init__(self, *values: object) -> None:
        self.values = values


def load_tensors(path: Path, stand_ins: Iterable[str] = ()) -> dict[str, Any]:
    """What torch saved in a file, its tensors mapped, not read. Raises CheckpointError.

    stand_ins: classes, by full name, that the file may also hold; each object of theirs becomes a `StandIn`.
    """
    os.close(open_regular(path))
    with torch.serialization.safe_globals([(StandIn, name) for name in stand_ins]):
        values = _load(str(path), str(path), mapped=True)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds no table of tensors")
    return values


def decode_tensor(data: bytes, where: str) -> torch.Tensor:
    """One tensor that torch saved. Raises CheckpointError."""
    tensor = _load(io.BytesIO(data), where, mapped=False)
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{where}: holds no tensor")
    return tensor


def _load(source: str | io.BytesIO, where: str, mapped: bool) -> Any:
    """torch's own restricted unpickler: tensors, plain containers and numbers, and what `safe_globals` lists."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickle protocols, which no file of torch's has
            return torch.load(source, map_location="cpu", mmap=mapped, weights_only=True)
    except (*_FAILURES, OSError) as error:
        names = _NAMED.search(str(error))
        reason = f"it names {names[1]}, which has no place there" if names else _first_line(error)
        raise CheckpointError(f"{where}: not opened: {reason}") from None


def read_dcp_metadata(path: Path) -> dcp.Metadata:
    """The `.metadata` of a torch distributed checkpoint. Its fields may still be anything. Raises CheckpointError."""
    try:
        found = _MetadataUnpickler(io.BytesIO(read_small(path, _METADATA_LIMIT_BYTES))).load()
    except _FAILURES as error:
        raise CheckpointError(f"{path}: not opened: {_first_line(error)}") from None
    if not isinstance(found, dcp.Metadata):
        raise CheckpointError(f"{path}: is not the metadata of a torch distributed checkpoint")
    return found


_DCP = "torch.distributed.checkpoint."
_METADATA_NAMES: dict[tuple[str, str], object] = {
    **{
        (f"{_DCP}metadata", known.__name__): known
        for known in (
            dcp.BytesStorageMetadata,
            dcp.ChunkStorageMetadata,
            dcp.Metadata,
            dcp.MetadataIndex,
            dcp.StorageMeta,
            dcp.TensorProperties,
            dcp.TensorStorageMetadata,
            dcp._MEM_FORMAT_ENCODING,
        )
    },
    (f"{_DCP}filesystem", "_StorageInfo"): _StorageInfo,
    **{("torch", name): getattr(torch, name) for name, _ in DTYPES.values()},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _METADATA_NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place there")
        return _METADATA_NAMES[module, name]


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0][:200]
