"""A committed step back into memory: CPU tensors by name, and the scalars.

In: a step folder and its manifest. Out: tensors that are mapped from the shards (private pages: writing to one changes
no file), after every byte that is used was hashed. Nothing in a checkpoint is ever executed.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ii_dist.checkpoint.disk import read_small
from ii_dist.checkpoint.finder import check_files, expected_files
from ii_dist.checkpoint.manifest import Manifest
from ii_dist.checkpoint.shards import spec_of
from ii_dist.config.errors import CheckpointError
from ii_dist.config.run_folder import STATE


def load_step(
    path: Path, manifest: Manifest, names: Iterable[str] | None = None, *, verified: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (all, or those of `names`) and scalars of a step.

    verified: this process has just checked the hashes (`find_newest`), so that they are not computed again. Raises
    CheckpointError for a name that is not there and for content that is not as the manifest says.
    """
    wanted = list(manifest.tensors) if names is None else list(names)
    by_shard: dict[str, list[str]] = {}
    for name in wanted:
        if name not in manifest.tensors:
            raise CheckpointError(f"{path}: has no tensor {name!r}")
        by_shard.setdefault(manifest.tensors[name].shard, []).append(name)
    if not verified:
        files = {f: facts for f, facts in expected_files(manifest).items() if f in by_shard or f == STATE}
        if problems := check_files(path, files):
            raise CheckpointError(f"{path}: {problems[0]}")
    tensors: dict[str, Tensor] = {}
    for file, members in by_shard.items():
        tensors.update(_read_shard(path / file, members, manifest))
    # In the caller's order, whatever the shards.
    return {name: tensors[name] for name in wanted}, _read_state(path, manifest)


def _read_shard(path: Path, names: list[str], manifest: Manifest) -> dict[str, Tensor]:
    tensors = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as shard:
            for name in names:
                tensors[name] = shard.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    for name, tensor in tensors.items():
        spec, entry = spec_of(name, tensor), manifest.tensors[name]
        if (spec.dtype, spec.shape) != (entry.dtype, entry.shape):
            raise CheckpointError(
                f"{path}: {name} is {spec.dtype} {list(spec.shape)}, not {entry.dtype} {list(entry.shape)}"
            )
    return tensors


def _read_state(path: Path, manifest: Manifest) -> dict[str, Any]:
    try:
        values = json.loads(read_small(path / STATE, manifest.state.bytes))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: {STATE} is not JSON") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: {STATE} holds no table of scalars")
    return values
