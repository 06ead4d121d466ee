"""The checkpoints of one run on disk: the one place that makes, commits and deletes step folders.

In: this rank's shards of a step in memory, and a way to tell all ranks a row of bytes. Out: a step folder at its
final name, or no trace of it. Order: every shard and state.json into a hidden folder, flushed; the manifest, flushed;
the hidden folder, flushed; rename; the parent, flushed. Ranks agree before each stage. No torch at import.
"""

import hashlib
import logging
import os
import platform
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import ii_dist
from ii_dist.checkpoint.disk import describe, remove_tree, sync_folder, write_new_file
from ii_dist.checkpoint.finder import committed_steps, verify_step
from ii_dist.checkpoint.lease import Lease
from ii_dist.checkpoint.manifest import Manifest, PositionEntry, ShardEntry, StateEntry, TensorEntry
from ii_dist.checkpoint.retention import steps_to_delete
from ii_dist.checkpoint.shards import MOST_PARTS, ShardFile, ShardImage, TensorSpec, write_shard
from ii_dist.config.errors import CheckpointError
from ii_dist.config.run_folder import COMMITTED, STATE, RunFolder, partial_name, shard_name

Gather = Callable[[bytes], list[bytes]]
"""Collective: this rank's row in, every rank's row out, in rank order; rows have one length."""

_PARTIAL = ".partial_"
_TRASH = ".trash_"
# What ranks tell each other: fine?, hash of the layout, problem, number of shards; then size and hash of each of them.
_ROW = struct.Struct("<?32s900sB")
_SHARD = struct.Struct("<Q32s")
_ROW_BYTES = _ROW.size + MOST_PARTS * _SHARD.size
_WRITERS = 4
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a manifest says of the run. Hashes are sha256 in hex; "" for a data set without an index."""

    engine: str
    global_batch: int
    config_sha256: str = ""
    index_sha256: str = ""


@dataclass(frozen=True, slots=True)
class StepContent:
    """One step to save: the layout of all tensors over the shards, this rank's shards in memory, the scalars.

    layout: (spec, number of its shard) of every tensor of every rank; every rank has equally many shards, those of rank
    0 are the first. state: the text of state.json, needed on rank 0.
    """

    step: int
    epoch: int
    offset: int
    layout: Sequence[tuple[TensorSpec, int]]
    images: Sequence[ShardImage]
    state: bytes

    def layout_hash(self) -> bytes:
        layout = [(s.name, s.dtype, s.shape, number) for s, number in self.layout]
        text = repr((self.step, len(self.images), layout))
        return hashlib.sha256(text.encode()).digest()


class CheckpointStore:
    """Writes the steps of a run. Only rank 0 holds the lease and changes names."""

    def __init__(
        self, folder: RunFolder, facts: RunFacts, rank: int, world_size: int, fence: int, lease: Lease | None = None
    ) -> None:
        self._folder = folder
        self._facts = facts
        self._rank = rank
        self._world_size = world_size
        self._fence = fence
        self._lease = lease

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def save(self, content: StepContent, gather: Gather) -> int:
        """Write and commit one step together with all ranks; its bytes. Collective.

        Raises CheckpointError, on every rank alike, if it failed on one: then nothing of it is left and older steps
        stand untouched.
        """
        partial = self._folder.checkpoints / partial_name(content.step, self._fence)
        layout = content.layout_hash()
        try:
            self._agree(gather, layout, *self._attempt(lambda: self._prepare(partial), partial))
            written, problem = self._attempt(lambda: self._write(content, partial), partial)
            shards = self._agree(gather, layout, written, problem)
        except CheckpointError:
            self._discard(partial)
            raise
        _, problem = self._attempt(lambda: self._commit(content, partial, shards), partial)
        if problem:
            self._discard(partial)
        self._agree(gather, layout, [], problem)
        return sum(shard.bytes for shard in shards) + len(content.state)

    def prune(self, keep_last: int, keep_every_steps: int, newest: int) -> list[int]:
        """Delete committed steps that no rule keeps, counted from `newest` down; the steps deleted. Rank 0 only.

        Nothing is deleted unless `newest`, which stays, can be read back and verified. Steps above `newest` (left out
        as damaged) are neither counted nor touched. Raises CheckpointError.
        """
        checkpoints = self._folder.checkpoints
        doomed = steps_to_delete([s for s in committed_steps(checkpoints) if s <= newest], keep_last, keep_every_steps)
        if not doomed:
            return []
        if problems := verify_step(self._folder.step(newest)):
            raise CheckpointError(f"{self._folder.step(newest)}: does not verify ({problems[0]}); older steps are kept")
        for step in doomed:
            try:
                with self._guard():
                    trash = self._move_aside(self._folder.step(step))
                remove_tree(trash)
            except OSError as error:
                raise CheckpointError(f"old checkpoint not deleted: {describe(error, checkpoints)}") from None
        return doomed

    def sweep(self) -> None:
        """Remove what ended saves left: hidden partial folders and trash. Rank 0 only, between saves."""
        checkpoints = self._folder.checkpoints
        try:
            left = list(checkpoints.iterdir()) if checkpoints.is_dir() else []
            for path in left:
                if path.name.startswith((_PARTIAL, _TRASH)):
                    logger.info("removing %s, left by an interrupted save", path)
                    remove_tree(path)
        except OSError as error:
            logger.warning("leftovers not removed: %s", describe(error, checkpoints))

    def _attempt(self, act: Callable[[], list[ShardFile] | None], where: Path) -> tuple[list[ShardFile], str]:
        """What `act` returned, or the one line of its failure."""
        try:
            return act() or [], ""
        except OSError as error:
            return [], describe(error, where)
        except CheckpointError as error:
            return [], str(error)

    def _agree(self, gather: Gather, layout: bytes, written: list[ShardFile], problem: str) -> list[ShardFile]:
        """Every rank's shards. Raises CheckpointError if any rank has a problem, the ranks differ, or one is gone."""
        row = _ROW.pack(not problem, layout, problem.encode()[:900], len(written))
        row += b"".join(_SHARD.pack(shard.bytes, bytes.fromhex(shard.sha256)) for shard in written)
        try:
            rows = gather(row.ljust(_ROW_BYTES, b"\0"))
        except RuntimeError as error:
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise CheckpointError(f"a rank was lost while saving: {reason}") from None
        shards = []
        for rank, row in enumerate(rows):
            ok, theirs, text, count = _ROW.unpack_from(row)
            if not ok:
                raise CheckpointError(f"rank {rank}: {text.rstrip(bytes(1)).decode(errors='ignore')}")
            if theirs != layout:
                raise CheckpointError(f"rank {rank} saves another step or other tensors than rank {self._rank}")
            for number in range(count):
                size, sha256 = _SHARD.unpack_from(row, _ROW.size + number * _SHARD.size)
                name = shard_name(rank * count + number, self._world_size * count)
                shards.append(ShardFile(name, size, sha256.hex()))
        return shards

    def _prepare(self, partial: Path) -> None:
        """Make the hidden folder, empty. Never makes the run folder: an unmounted disk must not be written under."""
        if self._rank != 0:
            return
        checkpoints = partial.parent
        if not checkpoints.is_dir():
            checkpoints.mkdir()
            sync_folder(checkpoints.parent)
        # Also what an earlier save could not take away: on a full disk it is the room for this one.
        self.sweep()
        partial.mkdir()

    def _write(self, content: StepContent, partial: Path) -> list[ShardFile]:
        """This rank's shards, side by side: while one waits for the disk another is hashed. On rank 0 state.json."""
        count = len(content.images)
        names = [shard_name(self._rank * count + i, self._world_size * count) for i in range(count)]

        def one(name: str, image: ShardImage) -> ShardFile:
            return write_shard(partial / name, image, content.step)

        with ThreadPoolExecutor(min(_WRITERS, count), "shard") as pool:
            written = pool.map(one, names, content.images)
            if self._rank == 0:
                write_new_file(partial / STATE, content.state)
            return list(written)

    def _commit(self, content: StepContent, partial: Path, shards: list[ShardFile]) -> None:
        if self._rank != 0:
            return
        final = self._folder.step(content.step)
        write_new_file(partial / COMMITTED, self._manifest(content, shards).encode())
        sync_folder(partial)
        if final.is_dir() and not verify_step(final):
            logger.warning("%s is committed already and whole; kept", final)
            remove_tree(partial)
            return
        with self._guard():
            # Damaged, and left out when this run started. Out of the way only now that the new one is whole.
            trash = self._move_aside(final) if os.path.lexists(final) else None
            partial.rename(final)
            sync_folder(final.parent)
        if trash:
            remove_tree(trash)

    def _manifest(self, content: StepContent, shards: list[ShardFile]) -> Manifest:
        return Manifest(
            step=content.step,
            position=PositionEntry(epoch=content.epoch, offset=content.offset),
            world_size=self._world_size,
            engine=self._facts.engine,
            global_batch=self._facts.global_batch,
            fence=self._fence,
            config_sha256=self._facts.config_sha256,
            index_sha256=self._facts.index_sha256,
            versions=_versions(),
            tensors={
                spec.name: TensorEntry(shard=shards[number].file, dtype=spec.dtype, shape=spec.shape)
                for spec, number in content.layout
            },
            shards=tuple(ShardEntry(file=s.file, bytes=s.bytes, sha256=s.sha256) for s in shards),
            state=StateEntry(bytes=len(content.state), sha256=hashlib.sha256(content.state).hexdigest()),
        )

    def _discard(self, partial: Path) -> None:
        if self._rank != 0:
            return
        try:
            remove_tree(partial)
        except OSError as error:
            logger.warning("half a checkpoint stays: %s", describe(error, partial))

    def _guard(self) -> AbstractContextManager[None]:
        return self._lease.guard() if self._lease else nullcontext()

    def _move_aside(self, path: Path) -> Path:
        """Rename a step to a hidden name: a kill while it is deleted then leaves no half of it as a step."""
        trash = path.with_name(f"{_TRASH}{path.name}_fence_{self._fence:06d}")
        remove_tree(trash)
        path.rename(trash)
        sync_folder(path.parent)
        return trash


def _versions() -> dict[str, str]:
    return {"ii_dist": ii_dist.__version__, "python": platform.python_version(), "torch": version("torch")}
