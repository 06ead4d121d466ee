"""`ii-dist train` on a disk that is full for a while, then read-only: old steps stay, training goes on and saves."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ii_dist.checkpoint import committed_steps, find_newest
from ii_dist.config.run_folder import RunFolder
from tests.small_disk import mounted
from tests.tiny_run import CONFIG, ROOT

pytestmark = pytest.mark.ranks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "24m") as path:
        yield path


def wait_for(what: Callable[[], object], output: Path) -> None:
    deadline = time.monotonic() + 90
    while not what():
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.02)


def fill(disk: Path) -> Path:
    """A file that takes all the room there is."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            return ballast
    raise AssertionError


def a_while_read_only(run: RunFolder, output: Path) -> None:
    """Nobody, root included, may make or delete a name in the folder of the checkpoints."""
    if subprocess.run(["chattr", "+i", str(run.checkpoints)], capture_output=True).returncode:
        return  # the file system has no such mark

    def failed() -> list[str]:
        return re.findall(r"step \d+ not saved: .*Operation not permitted", output.read_text())

    try:
        wait_for(failed, output)
        steps = committed_steps(run.checkpoints)
    finally:
        subprocess.run(["chattr", "-i", str(run.checkpoints)], check=True)
    assert f"{run.checkpoints}/.partial_step_" in failed()[0]
    wait_for(lambda: committed_steps(run.checkpoints)[-1] > steps[-1], output)


def test_training_goes_on_and_saves_again(small_disk: Path, tmp_path: Path) -> None:
    config, output = tmp_path / "run.yaml", tmp_path / "output"
    config.write_text(CONFIG + f"runs_folder: {small_disk}\n")
    run = RunFolder(small_disk / "run")
    more = ["train.epochs=100000", "metrics.log_every_steps=1", "checkpoint.keep_last=2"]
    with output.open("w") as out:
        command = [sys.executable, "-m", "ii_dist", "train", str(config), *more]
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        wait_for(lambda: len(committed_steps(run.checkpoints)) == 2, output)

        def failed() -> list[str]:
            if process.poll() is None:
                fill(small_disk)  # again: deletion of an old step makes room
            return re.findall(r"step \d+ not saved: .*", output.read_text())

        wait_for(failed, output)
        line = failed()[0]
        assert "No space left on device" in line
        assert f"{run.checkpoints}/.partial_step_" in line
        assert re.search(r"; \d+ bytes free there: make room or lower checkpoint\.keep_last", line)
        found, left_out = find_newest(run.checkpoints)
        assert found is not None
        assert left_out == []
        (small_disk / "ballast").unlink()
        wait_for(lambda: committed_steps(run.checkpoints)[-1] > found.step, output)
        a_while_read_only(run, output)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75, output.read_text()
    finally:
        process.kill()
        process.wait()
    after, left_out = find_newest(run.checkpoints)
    assert after is not None
    assert left_out == []
    assert after.step > found.step
    assert len(committed_steps(run.checkpoints)) == 2
    assert not [path for path in run.checkpoints.iterdir() if path.name.startswith(".")]
