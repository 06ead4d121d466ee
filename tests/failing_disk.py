"""A disk that fails for a while, for a process of its own: a library in front of the C library's open and read."""

import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("failing_disk.c")


def has_compiler() -> bool:
    return shutil.which("cc") is not None


def build(folder: Path) -> Path:
    library = folder / "failing_disk.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"], check=True)
    return library


def environment(library: Path, pattern: str, failures: int, number: int, call: str = "open") -> dict[str, str]:
    """Of a process in which the first `failures` calls on paths with `pattern` in them fail with errno `number`."""
    return os.environ | {
        "LD_PRELOAD": str(library),
        "DISK_PATTERN": pattern,
        "DISK_FAILURES": str(failures),
        "DISK_ERRNO": str(number),
        "DISK_CALL": call,
        "OMP_NUM_THREADS": "1",
    }
