"""One owner a run folder, proven with real processes that are really killed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ii_dist.checkpoint import lease as lease_module
from ii_dist.checkpoint import take_lease
from ii_dist.config.errors import CheckpointError, ClusterError
from ii_dist.config.run_folder import RunFolder

OWNER = """
import sys, time
from pathlib import Path
from ii_dist.checkpoint import take_lease
from ii_dist.config.errors import UserError
from ii_dist.config.run_folder import RunFolder
print("ready", flush=True)
for line in sys.stdin:
    folder, _, job = line.strip().partition("|")
    try:
        lease = take_lease(RunFolder(Path(folder)), job)
        print(f"owner {lease.fence}", flush=True)
    except UserError as error:
        print(f"refused {error.exit_code} {error}", flush=True)
    if sys.stdin.readline() == "release\\n":
        lease.release()
        print("released", flush=True)
"""


class Process:
    """Another process that takes leases when told to."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
        )
        assert self.read() == "ready"

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def take(self, folder: RunFolder, job: str) -> str:
        self.tell(f"{folder.root}|{job}")
        return self.read()

    def end(self, number: int = signal.SIGKILL) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


@pytest.fixture
def other() -> Iterator[Process]:
    process = Process()
    yield process
    process.end()


def test_live_owner_is_named_at_once(folder: RunFolder, other: Process) -> None:
    assert other.take(folder, "first") == "owner 1"
    started_s = time.monotonic()
    with pytest.raises(ClusterError) as caught:
        take_lease(folder, "second")
    assert time.monotonic() - started_s < 5
    text = str(caught.value)
    assert "\n" not in text
    for part in ("job first", f"pid {other.process.pid}", os.uname().nodename, "since 20", str(folder.root)):
        assert part in text
    assert caught.value.exit_code == 5


def test_killed_owner_is_succeeded_at_once(folder: RunFolder, other: Process) -> None:
    assert other.take(folder, "first") == "owner 1"
    other.end(signal.SIGKILL)
    lease = take_lease(folder, "second")
    assert lease.fence == 2
    assert lease.is_ours()
    lease.release()


def test_killed_owner_that_nobody_waited_for(folder: RunFolder, other: Process) -> None:
    # A zombie still has its pid.
    assert other.take(folder, "first") == "owner 1"
    other.process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while ") Z " not in Path(f"/proc/{other.process.pid}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lease = take_lease(folder, "second")
    assert lease.fence == 2
    lease.release()


def test_released_lease_leaves_its_number(folder: RunFolder, other: Process) -> None:
    assert other.take(folder, "first") == "owner 1"
    other.tell("release")
    assert other.read() == "released"
    for fence in (2, 3):
        lease = take_lease(folder, "next")
        assert lease.fence == fence
        lease.release()
        assert not lease.is_ours()
    assert sorted(p.name for p in folder.root.iterdir()) == [".lease.lock", "lease.json"]


def test_of_two_that_start_together_one_wins(tmp_path: Path) -> None:
    rivals = [Process(), Process()]
    try:
        for race in range(20):
            folder = RunFolder(tmp_path / f"run{race}")
            for number, rival in enumerate(rivals):
                rival.tell(f"{folder.root}|job{number}")
            answers = sorted(rival.read().split()[0] for rival in rivals)
            assert answers == ["owner", "refused"], race
            for rival in rivals:
                rival.tell("go on")
    finally:
        for rival in rivals:
            rival.end()


def test_two_in_one_process(folder: RunFolder) -> None:
    lease = take_lease(folder, "a")
    with pytest.raises(ClusterError):
        take_lease(folder, "b")
    lease.release()


def _move_to_another_host(folder: RunFolder) -> None:
    values = json.loads(folder.lease.read_text())
    folder.lease.write_text(json.dumps(values | {"host": "node-17", "boot": "elsewhere"}))


def test_owner_on_another_host_lives_by_its_heartbeat(folder: RunFolder, other: Process) -> None:
    assert other.take(folder, "first") == "owner 1"
    other.end()
    _move_to_another_host(folder)
    with pytest.raises(ClusterError, match="job first on host node-17"):
        take_lease(folder, "second")
    beat = folder.root / ".heartbeat_fence_000001"
    past = time.time() - lease_module.HEARTBEAT_DEAD_S - 1
    os.utime(beat, (past, past))
    lease = take_lease(folder, "second")
    assert lease.fence == 2
    assert not beat.exists()
    lease.release()


def test_later_attempt_of_the_same_job_need_not_wait(folder: RunFolder, other: Process) -> None:
    # A requeued job after the loss of its node: the heartbeat is still young.
    assert other.take(folder, "job") == "owner 1"
    other.end()
    _move_to_another_host(folder)
    with pytest.raises(ClusterError):
        take_lease(folder, "job", attempt=0)
    lease = take_lease(folder, "job", attempt=1)
    assert lease.fence == 2
    lease.release()


def test_pid_of_another_process_is_not_the_owner(folder: RunFolder) -> None:
    lease = take_lease(folder, "a")
    owner = dataclasses.replace(lease._owner, started_ticks=lease._owner.started_ticks - 1)
    lease_module._write(folder, owner)
    successor = take_lease(folder, "b")
    assert successor.fence == 2
    assert not lease.is_ours()
    lease.release()
    assert successor.is_ours()
    successor.release()


def test_heartbeat_beats(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_EVERY_S", 0.02)
    lease = take_lease(folder, "a")
    beat = folder.root / ".heartbeat_fence_000001"
    os.utime(beat, (0, 0))
    deadline = time.monotonic() + 5
    while beat.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert abs(beat.stat().st_mtime - time.time()) < 10
    lease.release()
    assert not beat.exists()


def test_deleted_lease_is_noticed(folder: RunFolder) -> None:
    lease = take_lease(folder, "a")
    folder.lease.unlink()
    with pytest.raises(CheckpointError, match="no longer owns"), lease.guard():
        pass
    lease.release()
    assert not folder.lease.exists()


@pytest.mark.parametrize("text", ["", "{}", "[]", "x", '{"host": 1}', "[" * 60_000])
def test_damaged_lease_is_one_line(folder: RunFolder, text: str) -> None:
    folder.lease.write_text(text)
    with pytest.raises(CheckpointError, match=r"lease\.json: not a lease; make sure that no job writes in this folder"):
        take_lease(folder, "a")
    assert folder.lease.read_text() == text


def test_lock_held_for_long_is_refused_in_time(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "_LOCK_WAIT_S", 0.2)
    with lease_module._locked(folder), pytest.raises(ClusterError, match="held by another process"):
        take_lease(folder, "a")


@pytest.mark.parametrize("place", ["file", "below a file", "proc"])
def test_folder_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    path = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "run", "proc": Path("/proc/ii_dist")}[place]
    with pytest.raises(CheckpointError) as caught:
        take_lease(RunFolder(path), "a")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


def test_writable_probe_leaves_nothing(folder: RunFolder) -> None:
    take_lease(folder, "a").release()
    assert sorted(p.name for p in folder.root.iterdir()) == [".lease.lock", "lease.json"]
