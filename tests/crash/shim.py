"""The preload shim (shim.c): compile it, arm it in this process, read its log."""

import ctypes
import os
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KILL, TEAR, FAIL = 1, 2, 3
_HEAD = struct.Struct("<cxxxIIIqQ")
_SOURCE = Path(__file__).with_name("shim.c")


@dataclass(frozen=True, slots=True)
class Call:
    """A call that changed the disk. op: see shim.c. number: offset, length or mark."""

    op: str
    pid: int
    path: str
    path2: str
    number: int
    data: bytes


def build(folder: Path) -> Path:
    """The compiled shim."""
    out = folder / "shim.so"
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    command = ["cc", "-shared", "-fPIC", "-O1", *warnings, "-o", str(out), str(_SOURCE), "-lpthread"]
    subprocess.run(command, check=True, capture_output=True)
    return out


class Shim:
    """The shim that this process was started with (LD_PRELOAD)."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self._library.shim_arm.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int]
        self._library.shim_mark.argtypes = [ctypes.c_long]
        self._library.shim_calls.restype = ctypes.c_long

    def arm(self, below: Path, log: Path, fault_at: int = 0, mode: int = 0, error: int = 0) -> None:
        self._library.shim_arm(bytes(below), bytes(log), fault_at, mode, error)

    def disarm(self) -> None:
        self._library.shim_disarm()

    def calls(self) -> int:
        return int(self._library.shim_calls())

    def mark_if(self, ok: bool) -> None:
        """Put a mark between the calls: from here on the save was said to be on disk."""
        if ok:
            self._library.shim_mark(0)


def read_log(log: Path) -> list[Call]:
    return list(_records(log.read_bytes())) if log.exists() else []


def _records(data: bytes) -> Iterator[Call]:
    at = 0
    while at < len(data):
        op, pid, one, two, number, length = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        path, path2, content = (data[a:b] for a, b in ((at, at + one), (at + one, at + one + two), (0, 0)))
        at += one + two
        content = data[at : at + length]
        at += length
        yield Call(op.decode(), pid, os.fsdecode(path), os.fsdecode(path2), number, content)
