"""Copies a node's shards to its own disk, once, in the background, while training reads the originals.

In: an index of shards and a folder on the node's disk. Out: `<folder>/<digest of the index>/<shard>`, each there only
when it is whole; `ShardReader` finds them. One process a node copies (local rank 0), the others only look. What was
copied stays: the next run on the node starts with it. Two runs on one node copy one after the other, not twice.
"""

import atexit
import fcntl
import logging
import os
import shutil
import threading
import time
from pathlib import Path

from ii_dist.config.errors import ClusterError, ConfigError
from ii_dist.data.index import Index
from ii_dist.data.shards import partial_name, sync_folder
from ii_dist.runtime.world import World

_log = logging.getLogger(__name__)

_CHUNK_BYTES = 8 << 20
_WORK_SHARE = 0.5  # of the time: training's own reads and writes come first
_LOWEST_PRIORITY = 19
_LOCK_NAME = ".lock"
_LOCK_EVERY_S = 5.0
_CLOSE_WAIT_S = 30.0


class Staging:
    """One rank's part in the copying. `close` stops it within a chunk (8 MiB); what is whole stays."""

    def __init__(self, index: Index, folder: Path, first: int) -> None:
        self._shards, self._folder, self._first = index.shards, folder, first
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="data-staging", daemon=True)
        atexit.register(self.close)
        self._thread.start()

    def close(self) -> None:
        atexit.unregister(self.close)
        self._stop.set()
        self._thread.join(_CLOSE_WAIT_S)  # a read that hangs in the system must not hold up the end of the run

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)  # of this thread alone
        try:
            lock = os.open(self._folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                while not _locked(lock):
                    if self._stop.wait(_LOCK_EVERY_S):
                        return
                self._copy_all()
            finally:
                os.close(lock)  # gives the lock back
        except OSError as error:
            _log.warning(
                "%s: copying shards stopped (%s); reading the originals", error.filename or self._folder, error.strerror
            )

    def _copy_all(self) -> None:
        for left_over in self._folder.glob(partial_name("*")):  # of a copy that was killed: we hold the lock
            left_over.unlink(missing_ok=True)
        missing, start_s, copied_bytes = self._shards.missing_copies(), time.monotonic(), 0
        # Each node begins at another shard, so that they do not all read the same one at the same time.
        for shard in sorted(missing, key=lambda shard: (shard < self._first, shard)):
            if not self._copy(shard):
                return
            copied_bytes += self._shards.expected_bytes(shard)
        if missing:
            _log.info(
                "%s: %d shards, %.1f GB copied in %.0f s",
                *(self._folder, len(missing), copied_bytes / 1e9, time.monotonic() - start_s),
            )

    def _copy(self, shard: int) -> bool:
        """Copy one shard whole or not at all; False when asked to stop."""
        name, length = self._shards.names[shard], self._shards.expected_bytes(shard)
        partial = self._folder / partial_name(name)
        try:
            with Path(self._shards.path(shard)).open("rb") as source, partial.open("wb", buffering=0) as target:
                if not self._copy_bytes(source.fileno(), target.fileno(), length):
                    return False
            partial.replace(self._folder / name)
            sync_folder(self._folder)
            return True
        finally:
            partial.unlink(missing_ok=True)

    def _copy_bytes(self, source: int, target: int, length: int) -> bool:
        done = 0
        while done < length:
            start_s = time.monotonic()
            sent = os.sendfile(target, source, done, min(_CHUNK_BYTES, length - done))
            if not sent:
                raise OSError(0, f"a shard of {length:,} bytes ended after {done:,}")
            # Written out as we go: a large heap of unwritten pages would stop every writer of the node at once.
            os.fdatasync(target)
            done += sent
            if self._stop.wait((time.monotonic() - start_s) * (1 / _WORK_SHARE - 1)):
                return False
        return True


def start_staging(index: Index, stage_to: str, world: World) -> Staging | None:
    """Read copies below `stage_to` as they appear; on local rank 0 also make them, in a thread.

    Raises ConfigError where the data set is not in shards, ClusterError where the node's disk has not the space or the
    folder is not ours.
    """
    if not index.header.shards:
        raise ConfigError(
            f"data.stage_to: {index.path} is of single files, only shards are copied; pack them first with: "
            "python -m tools.pack_dataset"
        )
    folder = Path(stage_to) / index.digest
    if world.local_rank == 0:
        _make_folder(folder)
    index.shards.use_copies(folder)
    missing = index.shards.missing_copies()
    if world.local_rank or not missing:
        return None
    need = sum(index.shards.expected_bytes(shard) for shard in missing)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ClusterError(
            f"data.stage_to {stage_to}: needs {need / 1e9:,.1f} GB more for the {len(missing)} shards of {index.path}, "
            f"{free / 1e9:,.1f} GB are free; make room, name another disk, or set data.stage_to="
        )
    return Staging(index, folder, world.node_rank * len(index.header.shards) // world.num_nodes)


def _make_folder(folder: Path) -> None:
    """Raises ClusterError where it cannot be made, or where another user could change the copies."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        about = folder.stat()
    except OSError as error:
        raise ClusterError(f"data.stage_to: {folder} cannot be made ({error.strerror}); name another folder") from None
    if about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise ClusterError(f"data.stage_to: others may write into {folder}; name a folder of your own")


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
