"""Reads archives of unknown origin: member by member, nothing is ever unpacked by a name that stands in the archive.

In: a tar file, plain (read by offset, so that threads share it) or gzip'd (read once, in order). Out: members, each a
plain file with a harmless name; anything else (a link, a device, `..`, an absolute path) ends the program with a
DataError that names it, and so does an archive that is cut off or damaged.
"""

import contextlib
import gzip
import hashlib
import io
import os
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ii_dist.config.errors import DataError
from tools._datasets import Target
from tools._progress import Progress

MAX_MEMBER_BYTES = 1 << 28  # an image or a CIFAR file; the largest is CIFAR-100's train.bin with 154 MB
_MAX_UNPACKED_BYTES = 1 << 30  # of a gzip'd archive
_MAX_HEADER_BYTES = 1 << 20  # long names and attributes; tarfile would read any size at once
_BLOCK = 512
_PIECE_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Official:
    """An archive as its authors publish it."""

    name: str
    length: int
    md5: str


@dataclass(frozen=True, slots=True)
class Member:
    """A plain file in an archive: its name, and where its bytes lie in the archive."""

    name: str
    offset: int
    length: int

    @property
    def file_name(self) -> str:
        return self.name.rsplit("/", 1)[-1]


def check_official(path: Path, official: Official, target: Target, allow_other: bool) -> bool:
    """Whether `path` is the official archive; another one is an error unless `allow_other`. Raises DataError.

    A check that succeeded is remembered in the target, so that a second start does not read the archive for it again.
    """
    if allow_other:
        print(f"{path}: taken as it is, not compared with the official {official.name}", file=sys.stderr)
        return False
    stat = path.stat()
    wanted = f"the official {official.name} has {official.length:,} bytes and MD5 {official.md5}"
    advice = "get it again, or pass --allow-other-archive if it is meant to be another one"
    if stat.st_size != official.length:
        raise DataError(f"{path}: has {stat.st_size:,} bytes, but {wanted}; {advice}")
    checked = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
    if target.noted(official.name) == checked:
        return True
    md5, progress = hashlib.md5(usedforsecurity=False), Progress(f"checking {path.name}", "GB", 1e9)
    with _naming(path), path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            md5.update(piece)
            progress(file.tell(), official.length)
    if md5.hexdigest() != official.md5:
        raise DataError(f"{path}: has MD5 {md5.hexdigest()}, but {wanted}; {advice}")
    target.note(official.name, checked)
    return True


def list_members(archive: Path, inside: Member | None = None) -> list[Member]:
    """The files in a plain tar, or in the tar that is a member of it; offsets are those in `archive`."""
    where = f"{archive}: {inside.name}" if inside else str(archive)
    start = inside.offset if inside else 0
    with _naming(archive), archive.open("rb") as file:
        length = inside.length if inside else os.fstat(file.fileno()).st_size
        window = _Window(file, start, length, where)
        return [Member(m.name, start + m.offset_data, m.size) for m in _members(window, where, length)]


def read_member(file: int, archive: Path, member: Member) -> bytes:
    """The bytes of a member; `file`: a descriptor of the archive, shared by all threads."""
    _check_size(str(archive), member.name, member.length)
    with _naming(archive):
        content = os.pread(file, member.length, member.offset)
    if len(content) != member.length:
        raise DataError(f"{archive}: is cut off in {member.name}")
    return content


def read_gzipped(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file of a tar.gz."""
    where = str(archive)
    try:
        with _naming(archive), archive.open("rb") as packed, gzip.GzipFile(fileobj=packed) as file:
            window = _Window(file, 0, _MAX_UNPACKED_BYTES, where)  # type: ignore[arg-type]  # GzipFile is a reader
            for member in _members(window, where, None):
                _check_size(where, member.name, member.size)
                content = window.read_at(member.offset_data, member.size)
                if len(content) != member.size:
                    raise DataError(f"{archive}: is cut off in {member.name}; get it again")
                yield member.name, content
            # Behind the last member stands the checksum of all of it: it is compared when the end is read.
            while file.tell() < _MAX_UNPACKED_BYTES and file.read(_PIECE_BYTES):
                pass
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{archive}: cannot be unpacked ({error}); get it again") from None


@contextlib.contextmanager
def _naming(archive: Path) -> Iterator[None]:
    """An error while reading does not say which file it was."""
    try:
        yield
    except gzip.BadGzipFile:
        raise
    except OSError as error:
        raise DataError(f"{archive}: cannot be read ({error.strerror})") from None


class _Window(io.RawIOBase):
    """A part of a file as a file of its own, for tarfile; refuses reads of a size that no header has."""

    def __init__(self, file: BinaryIO, start: int, length: int, where: str) -> None:
        self._file, self._start, self._length, self._where = file, start, length, where
        self._at = 0

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset < 0:
            raise DataError(f"{self._where}: damaged archive (a member at byte {offset})")
        self._at = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise DataError(f"{self._where}: damaged archive (a header of {size:,} bytes)")
        content = self.read_at(self._at, min(size, max(0, self._length - self._at)))
        self._at += len(content)
        return content

    def read_at(self, offset: int, size: int) -> bytes:
        """Fewer bytes than asked for only at the end."""
        self._file.seek(self._start + offset)
        return self._file.read(size)


def _members(window: _Window, where: str, length: int | None) -> Iterator[tarfile.TarInfo]:
    """Plain files in the order of the archive, checked; folders are passed over."""
    try:
        with tarfile.open(fileobj=window, mode="r:") as tar:
            last = -1
            while (member := tar.next()) is not None:
                if member.offset <= last or member.size < 0:
                    raise DataError(f"{where}: damaged archive (member {member.name!r})")
                last = member.offset
                _check_name(where, member)
                if member.isdir():
                    continue
                if length is not None and member.offset_data + member.size > length:
                    raise DataError(f"{where}: is cut off in {member.name}; get it again")
                yield member
            end = window.read_at(tar.offset, _BLOCK)
    except (tarfile.TarError, RecursionError, ValueError, OverflowError) as error:
        raise DataError(
            f"{where}: not a tar archive, or a damaged one ({str(error) or 'headers in headers'})"
        ) from None
    # tarfile takes a header that it cannot read for the end.
    if end != bytes(_BLOCK):
        raise DataError(f"{where}: is cut off or damaged at byte {tar.offset:,}; get it again")


def _check_name(where: str, member: tarfile.TarInfo) -> None:
    name = member.name
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\\" in name or not name.isprintable() or not name:
        raise DataError(f"{where}: member {name!r} has a name that is not allowed; nothing of it is written")
    if not (member.isreg() or member.isdir()) or member.issparse():
        kind = "a link" if member.islnk() or member.issym() else "no plain file"
        raise DataError(f"{where}: member {name!r} is {kind}, which is not allowed; nothing of it is written")


def _check_size(where: str, name: str, length: int) -> None:
    if length > MAX_MEMBER_BYTES:
        raise DataError(f"{where}: {name} has {length:,} bytes, more than any image or CIFAR file")
