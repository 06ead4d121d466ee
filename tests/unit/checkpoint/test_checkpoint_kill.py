"""kill -9 at random moments, and while the lease is taken: a fresh process always finds a whole step and goes on."""

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


def test_at_random_moments(tmp_path: Path) -> None:
    result = killed("random", tmp_path)
    assert len(result["newest"]) == result["rounds"]
    assert len(set(result["newest"])) > 1


def test_while_taking_the_lease(tmp_path: Path) -> None:
    result = killed("lease", tmp_path)
    assert result["points"] >= 8
