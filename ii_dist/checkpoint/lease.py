"""lease.json: which process owns a run folder, with a number that rises with each owner (the fence).

In: a run folder and the name of a job. Out: a `Lease`, or a ClusterError that names the live owner. Taking, checking
and releasing happen under one file lock, so that of two jobs that start together one wins, and an owner that was
thought dead cannot commit afterwards. A released lease stays in the folder: the next one takes the number after its
fence. No torch.
"""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from ii_dist.checkpoint.disk import describe, make_folder, probe_folder, read_small, replace_file, sync_folder
from ii_dist.config.errors import CheckpointError, ClusterError
from ii_dist.config.run_folder import RunFolder

HEARTBEAT_EVERY_S = 10.0
HEARTBEAT_DEAD_S = 60.0
_LOCK_WAIT_S = 3.0
_LIMIT_BYTES = 1 << 16
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Owner:
    """Who took the lease. boot, pid_namespace and started_ticks tell this process from any other with its pid."""

    host: str
    boot: str
    pid_namespace: str
    pid: int
    started_ticks: int
    job: str
    attempt: int
    since: str
    fence: int
    token: str
    released: bool = False


class Lease:
    """The right of this process to write in a run folder. A thread keeps it fresh until `release`."""

    def __init__(self, folder: RunFolder, owner: Owner) -> None:
        self._folder = folder
        self._owner = owner
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._heart.start()

    @property
    def fence(self) -> int:
        return self._owner.fence

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Hold the folder against a new owner for a short act. Raises CheckpointError when the lease is not ours."""
        try:
            with _locked(self._folder):
                self._check()
                yield
        except ClusterError as error:
            raise CheckpointError(str(error)) from None

    def is_ours(self) -> bool:
        """False once another owner has taken over or lease.json is gone."""
        try:
            self._check()
        except CheckpointError:
            return False
        return True

    def release(self) -> None:
        """Give the folder back. Does nothing if it is no longer ours."""
        self._stop.set()
        self._heart.join()
        try:
            with self.guard():
                _write(self._folder, replace(self._owner, released=True))
                _heartbeat(self._folder, self.fence).unlink(missing_ok=True)
        except (CheckpointError, OSError) as error:
            logger.warning("lease of %s not released: %s", self._folder.root, error)

    def _check(self) -> None:
        owner = _read(self._folder)
        if owner is None:
            raise CheckpointError(f"{self._folder.lease}: gone; this process no longer owns the run folder")
        if owner != self._owner:
            raise CheckpointError(
                f"{self._folder.root}: taken over by {_name(owner)} (fence {owner.fence}); ours was {self.fence}"
            )

    def _beat(self) -> None:
        path = _heartbeat(self._folder, self.fence)
        while not self._stop.wait(HEARTBEAT_EVERY_S):
            try:
                os.utime(path)
            except FileNotFoundError:
                logger.error("lease of %s lost: another job has taken the run folder over", self._folder.root)
                return
            except OSError as error:
                logger.warning("lease of %s: heartbeat failed: %s", self._folder.root, error.strerror)


def take_lease(folder: RunFolder, job: str, attempt: int = 0) -> Lease:
    """Own the run folder, or say within 5 s who does.

    The folder is made if need be and first proven writable (CheckpointError names it). A dead owner's lease is taken
    over with the next fence; so is that of an earlier attempt of the same job. Raises ClusterError for a live owner.
    """
    try:
        make_folder(folder.root)
        # Whoever made the run folder: a checkpoint in it lasts only if its name does.
        sync_folder(folder.root.parent)
    except OSError as error:
        raise CheckpointError(
            f"run folder {folder.root}: cannot be made: {error.strerror}; choose another with runs_folder=..."
        ) from None
    with _locked(folder):
        probe_folder(folder.root)
        before = _read(folder)
        if before is not None and _alive(folder, before, job, attempt):
            raise ClusterError(
                f"run folder {folder.root}: in use by {_name(before)}; "
                "wait for it, stop it, or give this run another name"
            )
        owner = _ourselves(job, attempt, fence=1 if before is None else before.fence + 1)
        try:
            _heartbeat(folder, owner.fence).touch()
            _write(folder, owner)
            _sweep(folder, owner)
        except OSError as error:
            raise CheckpointError(f"lease not written: {describe(error, folder.root)}") from None
        if before is not None and not before.released:
            logger.warning("%s: taken over from %s, which is gone", folder.root, _name(before))
    return Lease(folder, owner)


def _name(owner: Owner) -> str:
    return f"job {owner.job} on host {owner.host}, pid {owner.pid}, since {owner.since}"


def _ourselves(job: str, attempt: int, fence: int) -> Owner:
    return Owner(
        host=socket.gethostname(),
        boot=_boot(),
        pid_namespace=_pid_namespace(),
        pid=os.getpid(),
        started_ticks=_started_ticks(os.getpid()) or 0,
        job=job,
        attempt=attempt,
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        fence=fence,
        token=secrets.token_hex(8),
    )


def _alive(folder: RunFolder, owner: Owner, job: str, attempt: int) -> bool:
    if owner.released or (owner.job == job and attempt > owner.attempt):
        return False
    if (owner.host, owner.boot, owner.pid_namespace) == (socket.gethostname(), _boot(), _pid_namespace()):
        return _started_ticks(owner.pid) == owner.started_ticks
    age_s = _heartbeat_age_s(folder, owner.fence)
    return age_s is not None and age_s < HEARTBEAT_DEAD_S


def _heartbeat_age_s(folder: RunFolder, fence: int) -> float | None:
    """Seconds since the owner's last beat by the file server's clock; None without a heartbeat."""
    probe = folder.root / f".clock.{os.getpid()}"
    try:
        # Opening a file makes a network file system fetch its times anew.
        with _heartbeat(folder, fence).open("rb") as beat:
            last = os.fstat(beat.fileno()).st_mtime
    except OSError:
        return None
    probe.touch()
    try:
        return probe.stat().st_mtime - last
    finally:
        probe.unlink(missing_ok=True)


def _sweep(folder: RunFolder, owner: Owner) -> None:
    """Remove what earlier owners left. All of it is only ever made by the holder of the lock or of an earlier fence."""
    ours = _heartbeat(folder, owner.fence)
    for pattern in (".clock.*", f".{folder.lease.name}.*.tmp", ".probe.*", ".heartbeat_fence_*"):
        for path in folder.root.glob(pattern):
            if path != ours:
                # A ghost that still beats finds its file gone and knows.
                path.unlink(missing_ok=True)


def _heartbeat(folder: RunFolder, fence: int) -> Path:
    return folder.root / f".heartbeat_fence_{fence:06d}"


def _write(folder: RunFolder, owner: Owner) -> None:
    replace_file(folder.lease, (json.dumps(asdict(owner), indent=1) + "\n").encode())


def _read(folder: RunFolder) -> Owner | None:
    """The owner in lease.json, released or not; None without the file. Raises CheckpointError for other content."""
    if not os.path.lexists(folder.lease):
        return None
    types = {f.name: f.type for f in fields(Owner)}
    try:
        values = json.loads(read_small(folder.lease, _LIMIT_BYTES))
        if set(values) != set(types) or any(type(values[name]) is not kind for name, kind in types.items()):
            raise ValueError
        return Owner(**values)
    except (ValueError, TypeError, RecursionError):
        raise CheckpointError(
            f"{folder.lease}: not a lease; make sure that no job writes in this folder, then delete the file"
        ) from None


@contextlib.contextmanager
def _locked(folder: RunFolder) -> Iterator[None]:
    """Hold the run folder's file lock. Raises ClusterError if another process holds it for seconds."""
    path = folder.root / ".lease.lock"
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise CheckpointError(
            f"run folder {folder.root}: cannot be written: {error.strerror}; "
            "choose another with runs_folder=... or make it writable"
        ) from None
    try:
        _wait_for_lock(file, path)
        yield
    finally:
        os.close(file)


def _wait_for_lock(file: int, path: Path) -> None:
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ClusterError(f"{path}: held by another process for {_LOCK_WAIT_S:.0f} s; try again") from None
            time.sleep(0.02)
        except OSError as error:
            # Some file systems have no locks: a race of two jobs within the same milliseconds is then not decided.
            logger.warning("%s: no file locks here (%s)", path, error.strerror)
            return


def _started_ticks(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot; None if it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field, the program's name, may hold spaces and brackets.
    state, *rest = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
