"""kill -9, torn writes, a full disk and power cuts at every call of a save that changes the disk: all of them.

The program tests/crash/points.py does it, once for all tests here. What stays on disk must always be a whole step, the
new one or the one before it, with the values that were saved; and the next job goes on from it.
"""

import collections
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.crash.shim import build, read_log

ROOT = Path(__file__).resolve().parents[2]
Scenarios = dict[str, dict[str, Any]]
# scenario -> at least so many points. One rank: lease, folder, 3 shards of 3 slabs, state, manifest, rename, deletion.
POINTS = {
    "third/kill": 50,
    "third/tear": 13,
    "third/full": 40,
    "first/kill": 48,
    "again/kill": 50,
    "pair_0/kill": 26,
    "pair_0/tear": 6,
    "pair_1/kill": 9,
    "pair_1/tear": 4,
    "first/power": 48,
    "third/power": 50,
    "again/power": 50,
    "pair/power": 36,
}
_CHANGES = "openat,open,creat,write,writev,pwrite64,pwritev,pwritev2,fsync,fdatasync,sync_file_range,rename,renameat,"
_CHANGES += "renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,ftruncate,truncate,link,linkat,symlink,symlinkat,fallocate,"
_CHANGES += "sendfile,copy_file_range"
_KINDS = {"open": "C", "write": "W", "pwrite": "W", "fsync": "S", "fdatasync": "S", "rename": "R", "mkdir": "M"}


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder in memory where there is one: the points are many and the model of the disk is our own."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def shim(place: Path) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler, cc")
    return build(place)


def command(work: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "tests.crash.points", str(work), *more]


def environment(shim: Path) -> dict[str, str]:
    # PYTHONPATH and not the installed package: the code beside these tests is what is tested.
    return os.environ | {"LD_PRELOAD": str(shim), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def found(place: Path, shim: Path) -> Scenarios:
    done = subprocess.run(
        command(place / "points"), cwd=ROOT, env=environment(shim), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    scenarios: Scenarios = json.loads(done.stdout)
    return scenarios


@pytest.mark.parametrize("scenario", POINTS)
def test_every_point_leaves_a_whole_step(found: Scenarios, scenario: str) -> None:
    told = found[scenario]
    assert told["wrong"] == [], f"{len(told['wrong'])} wrong, the first: {told['wrong'][0]}"
    assert told["points"] >= POINTS[scenario]
    # Early points leave the step before, late ones the new step: the strikes fell on both sides of the commit.
    old = "0" if scenario.startswith("first") else "20"
    if scenario.endswith("/full"):
        assert sum(told["found"].values()) == told["points"]
        assert told["found"]["40"] >= 30  # the save after the one that failed
    elif scenario.endswith(("/kill", "/power")):
        assert told["found"][old] > 0
        assert scenario == "pair_1/kill" or told["found"]["30"] > 0


def test_no_scenario_is_forgotten(found: Scenarios) -> None:
    assert found.keys() == POINTS.keys()


def test_the_shim_sees_every_change(place: Path, shim: Path) -> None:
    """Counted by the kernel: a call that goes past the C library's functions would be struck by nobody."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    trace, work = place / "trace", place / "census"
    strace = ["strace", "-f", "-y", "--seccomp-bpf", "-s", "0", "-o", str(trace), "-e", f"trace={_CHANGES}"]
    done = subprocess.run(
        [*strace, "-E", f"LD_PRELOAD={shim}", *command(work, "census")],
        cwd=ROOT,
        env=environment(shim) | {"LD_PRELOAD": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    if "ptrace" in done.stderr and done.returncode:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr[-2000:]
    seen = collections.Counter(call.op for call in read_log(work / "calls") if call.op != "A")
    assert seen["W"] >= 10
    assert seen == changes(trace.read_text(errors="replace"), work)


def changes(trace: str, work: Path) -> collections.Counter[str]:
    """Kinds of successful calls below work/disk since the shim's log was opened, as strace wrote them."""
    counts: collections.Counter[str] = collections.Counter()
    begun: dict[str, str] = {}
    armed = False
    for line in trace.splitlines():
        thread, _, call = line.partition(" ")
        call = call.strip()
        if call.endswith("<unfinished ...>"):
            begun[thread] = call.removesuffix("<unfinished ...>")
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>", call):
            call = begun.pop(thread) + call[resumed.end() :]
        armed = armed or f'"{work}/calls"' in call
        name = call.partition("(")[0]
        if not armed or f"{work}/disk" not in call or " = -1 " in call:
            continue
        if name.startswith("open") and ("O_CREAT" not in call or ".lease.lock" in call):
            continue
        if name.startswith("unlink"):
            counts["D" if "AT_REMOVEDIR" in call else "U"] += 1
        elif name == "rmdir":
            counts["D"] += 1
        else:
            kind = next((letter for start, letter in _KINDS.items() if name.startswith(start)), name)
            counts[kind] += 1
    return counts
