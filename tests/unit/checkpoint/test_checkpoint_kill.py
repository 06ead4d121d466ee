"""kill -9 at every change of the disk, and at random moments: a fresh process always finds a whole step and goes on."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("kill_saves.py")


def killed(mode: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), mode, str(folder)]
    repository = Path(__file__).parents[3]
    # PYTHONPATH and not the installed package: the code beside these tests is what is tested.
    environment = {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_before_every_change(tmp_path: Path) -> None:
    result = killed("kill", tmp_path)
    # mkdir, three files (made, written, flushed), flushes of folders, rename, deletion of the oldest.
    assert result["points"] >= 18
    # Early deaths leave the old step the newest, late ones the new step.
    assert min(result["found"]["20"], result["found"]["30"]) >= 3


def test_in_the_middle_of_every_write(tmp_path: Path) -> None:
    result = killed("torn", tmp_path)
    # Shard, state.json, manifest, and lease.json on release.
    assert result["points"] == 4
    assert result["found"] == {"20": 3, "30": 2}


def test_at_random_moments(tmp_path: Path) -> None:
    result = killed("random", tmp_path)
    assert len(result["newest"]) == result["rounds"]
    assert len(set(result["newest"])) > 1


def test_while_taking_the_lease(tmp_path: Path) -> None:
    result = killed("lease", tmp_path)
    assert result["points"] >= 8
