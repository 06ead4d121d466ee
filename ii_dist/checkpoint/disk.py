"""Disk calls that survive a kill and a power cut: every change is flushed before the next one builds on it.

In: paths and bytes. Out: files that are whole at their final name, or an error of one line. Every change is a call of
`os` of its own (no buffered files), so that each is one visible step. No torch.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from ii_dist.config.errors import CheckpointError

CHUNK_BYTES = 1 << 20
SLAB_BYTES = 1 << 23
PAGE_BYTES = 4096
_FULL = {errno.ENOSPC, errno.EDQUOT}


def create_file(path: Path) -> int:
    """Open a new file for writing; it must not exist yet."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)


def write_views(file: int, views: Sequence[memoryview]) -> int:
    """Write all of `views`, one after the other, without joining them in memory; the number of bytes."""
    left = deque(view for view in views if view.nbytes)
    total = 0
    while left:
        # One call takes at most 1024 pieces, and may write less than it was given.
        count = os.writev(file, list(islice(left, 1024)))
        total += count
        while count and count >= len(left[0]):
            count -= len(left.popleft())
        if count:
            left[0] = left[0][count:]
    return total


def write_hashed(path: Path, data: memoryview) -> str:
    """Make `path` with `data`, on disk when this returns; its sha256.

    Past the page cache where the file system can (`data` then begins at a multiple of PAGE_BYTES): that saves the
    processor a copy, and the disk works from the first slab on. No Python runs while a slab is written or hashed.
    """
    digest = hashlib.sha256()
    file = create_file(path)
    try:
        _past_the_cache(file, True)
        pages = len(data) - len(data) % PAGE_BYTES
        for start, end in ((0, pages), (pages, len(data))):
            if start == pages:
                _past_the_cache(file, False)
            for at in range(start, end, SLAB_BYTES):
                slab = data[at : min(at + SLAB_BYTES, end)]
                _write_slab(file, slab)
                digest.update(slab)
        os.fsync(file)
    finally:
        os.close(file)
    return digest.hexdigest()


def _past_the_cache(file: int, on: bool) -> None:
    """Where the file system knows no such thing, nothing changes."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(file, fcntl.F_SETFL, os.O_DIRECT if on else 0)


def _write_slab(file: int, slab: memoryview) -> None:
    while slab:
        try:
            count = os.write(file, slab)
        except OSError as error:
            direct = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT
            if not direct or error.errno not in (errno.EINVAL, errno.EFAULT):
                raise
            # Larger pages than ours, or memory that the disk cannot read from.
            _past_the_cache(file, False)
            continue
        slab = slab[count:]


def write_new_file(path: Path, data: bytes) -> None:
    """Make `path` with `data`, on disk when this returns."""
    file = create_file(path)
    try:
        write_views(file, [memoryview(data)])
        os.fsync(file)
    finally:
        os.close(file)


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one step: readers see the old file or the new one, never a part."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_new_file(draft, data)
        draft.rename(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush the names in a folder: after this a new or renamed entry stays."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are missing, each with its name flushed to the disk."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def remove_tree(path: Path) -> None:
    """Delete a folder and what is in it, if it is there; of a symbolic link or file only itself."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def open_regular(path: Path) -> int:
    """Open a plain file for reading. Raises CheckpointError for a symbolic link, a pipe, a folder, a missing file."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(f"{path.name}: missing") from None
    except OSError as error:
        reason = "is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise CheckpointError(f"{path.name}: {reason}") from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise CheckpointError(f"{path.name}: not a plain file")
    return file


def read_small(path: Path, limit_bytes: int) -> bytes:
    """The content of a plain file of at most `limit_bytes`. Raises CheckpointError."""
    file = open_regular(path)
    try:
        size = os.fstat(file).st_size
        if size > limit_bytes:
            raise CheckpointError(f"{path.name}: {size} bytes, more than the limit of {limit_bytes}")
        parts: list[bytes] = []
        while part := os.read(file, size + 1):
            parts.append(part)
        return b"".join(parts)
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error.strerror}") from None
    finally:
        os.close(file)


def hash_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> tuple[int, str]:
    """Size and sha256 of a plain file; `on_bytes` hears of each chunk that was read. Raises CheckpointError."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    total = 0
    file = open_regular(path)
    try:
        while count := os.readv(file, [buffer]):
            digest.update(buffer[:count])
            total += count
            if on_bytes is not None:
                on_bytes(count)
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error.strerror} after {total} bytes") from None
    finally:
        os.close(file)
    return total, digest.hexdigest()


def describe(error: OSError, path: Path) -> str:
    """One line for a failed write at or below `path`: what, where, and the free bytes when the disk is full."""
    # Deleting a tree names its members only.
    where = path / error.filename if isinstance(error.filename, str) else path
    text = f"{where}: {error.strerror or error}"
    if error.errno in _FULL:
        text += f"; {free_bytes(path)} bytes free there: make room or lower checkpoint.keep_last"
    return text


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write near `path` (its nearest existing parent)."""
    here = path
    while not here.exists() and here != here.parent:
        here = here.parent
    return shutil.disk_usage(here).free


def probe_folder(path: Path) -> None:
    """Prove that files can be made, flushed and renamed in `path`. Raises CheckpointError naming the folder."""
    draft, final = (path / f".probe.{os.getpid()}.{end}" for end in ("tmp", "done"))
    try:
        draft.unlink(missing_ok=True)
        write_new_file(draft, b"probe\n")
        draft.rename(final)
        final.unlink()
        sync_folder(path)
    except OSError as error:
        room = f" ({free_bytes(path)} bytes free)" if error.errno in _FULL else ""
        raise CheckpointError(
            f"run folder {path}: cannot be written: {error.strerror}{room}; "
            "choose another with runs_folder=... or make it writable"
        ) from None
