"""A supervisor as a real process over stand-in ranks."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ii_dist.config import RunFolder
from launch.output import without_stamps
from launch.records import JobRecord, read_record

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
LIMIT_S = 40.0
Plan = Mapping[str, str | list[str]]


def wait_until(what: Callable[[], Any], limit_s: float = LIMIT_S) -> Any:
    until_s = time.monotonic() + limit_s
    while time.monotonic() < until_s:
        if answer := what():
            return answer
        time.sleep(0.03)
    raise AssertionError(f"did not happen within {limit_s} s")


def is_gone(pid: int) -> bool:
    """No such process, or one that has ended and waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


class Case:
    """One job over stand-in ranks in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = RunFolder(root / "run")
        self.job = "local-test"
        self.started: list[subprocess.Popen[str]] = []

    def fields(self, plan: Plan, **more: Any) -> dict[str, Any]:
        command = (sys.executable, str(HERE / "rank_program.py"), json.dumps(plan))
        base = {"run_folder": str(self.folder.root), "executor": "local", "nodes": 1, "job": self.job}
        watch = {"max_restarts": 0, **more.pop("watch", {})}
        return {**base, "ranks_per_node": len(plan), "command": command, "watch": watch, **more}

    def start(self, plan: Plan, how: str = "call", **more: Any) -> subprocess.Popen[str]:
        self.folder.root.mkdir(exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, str(HERE / "job_program.py"), how, json.dumps(self.fields(plan, **more))],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def log(self, rank: int) -> str:
        """What the rank printed, without times."""
        path = self.folder.rank_log(self.job, rank)
        return without_stamps(path.read_bytes()).decode() if path.exists() else ""

    def ready(self, *ranks: int) -> list[int]:
        """Wait until these ranks sleep; their process ids."""
        return [
            int(wait_until(lambda r=rank: re.search(rf"^{r} ready (\d+)$", self.log(r), re.M))[1]) for rank in ranks
        ]

    def record(self) -> JobRecord:
        record = read_record(self.folder.job(self.job))
        assert record is not None
        return record
