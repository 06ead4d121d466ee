"""Where a run goes on: the newest committed step that verifies, the same for all ranks.

In: a run folder. Out: a found step, decided by rank 0 and told to all; the engine and the source put back to it.
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from ii_dist.checkpoint import Manifest, find_newest, load_step, read_manifest, verify_step
from ii_dist.checkpoint.disk import replace_file
from ii_dist.config import CheckpointError, IndexHeader, Plan, RunFolder, describe_change, index_facts
from ii_dist.data import BatchSource, Position
from ii_dist.engine import Engine, EngineState
from ii_dist.runtime import World
from ii_dist.train.agree import on_rank0

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class StartPoint:
    """A committed step to start from."""

    step: int
    manifest: Manifest


def find_start(folder: RunFolder, world: World, step_folder: Path | None = None) -> StartPoint | None:
    """The newest verified step (or the one of `step_folder`), None for a fresh run. Collective.

    Steps left out are named in the log. Raises CheckpointError when there are steps and none of them can be trusted.
    """

    def newest() -> str:
        if step_folder is not None:
            if problems := verify_step(step_folder):
                raise CheckpointError(f"{step_folder}: {problems[0]}; choose another step")
            manifest = read_manifest(step_folder)
            return f"{manifest.step} {manifest.sha256()}"
        found, left_out = find_newest(folder.checkpoints)
        for step in left_out:
            logger.warning("%s", step.reason)
        if found is None and left_out:
            raise CheckpointError(
                f"{folder.checkpoints}: no step can be trusted ({left_out[0].reason}); move them away"
            )
        return "" if found is None else f"{found.step} {found.manifest.sha256()}"

    answer = on_rank0(world, newest)
    if not answer:
        return None
    step, sha256 = answer.split()
    manifest = read_manifest(folder.step(int(step)))
    if manifest.sha256() != sha256:
        raise CheckpointError(f"{folder.step(int(step))}: rank {world.rank} reads another manifest than rank 0")
    return StartPoint(int(step), manifest)


def load_start(folder: RunFolder, start: StartPoint, engine: Engine) -> dict[str, Any]:
    """Fill the engine; returns the scalars. Rank 0 has verified the hashes. Raises CheckpointError."""
    path = folder.step(start.step)
    tensors, scalars = load_step(path, start.manifest, verified=True)
    try:
        engine.load_state(EngineState(tensors, scalars["engine"]))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return scalars


def check_same_run(folder: RunFolder, start: StartPoint, plan: Plan, index: IndexHeader | None) -> None:
    """Refuse to go on with another global batch or another data set. Raises CheckpointError.

    index: of the training images; None for synthetic ones.
    """
    path, manifest = folder.step(start.step), start.manifest
    if manifest.global_batch != plan.global_batch:
        raise CheckpointError(
            f"{path}: was trained with train.global_batch {manifest.global_batch}, the config says "
            f"{plan.global_batch}; restore it or give the run another name"
        )
    if manifest.index_sha256 != (index.sha256 if index else ""):
        raise CheckpointError(
            f"{path}: was trained on another data set ({_data_change(folder, manifest.index_sha256, index)}); "
            "restore data.root or give the run another name"
        )


def _data_change(folder: RunFolder, old_sha256: str, index: IndexHeader | None) -> str:
    """In words where the run folder remembers the old index, and in digests always."""
    if not old_sha256 or index is None:
        then, now = ("files" if old_sha256 else "synthetic images"), ("files" if index else "synthetic images")
        return f"{then} then, {now} now"
    digests = f"index {old_sha256[:12]}... then, {index.sha256[:12]}... now"
    try:
        remembered = json.loads(folder.index.read_text())
        if remembered["sha256"] != old_sha256:
            return digests
    except (OSError, ValueError, KeyError, TypeError):
        return digests
    return f"{describe_change(remembered, index_facts(index))}; {digests}"


def remember_index(folder: RunFolder, index: IndexHeader | None, world: World) -> None:
    """Keep what tells this data set from a later one in words. Collective."""

    def keep() -> str:
        if index is not None:
            replace_file(folder.index, (json.dumps(index_facts(index)) + "\n").encode())
        return ""

    on_rank0(world, keep)


def seek_start(source: BatchSource, start: StartPoint) -> None:
    """Put the training source back to the next image that was not yet handed out."""
    source.seek(Position(start.manifest.position.epoch, start.manifest.position.offset))
