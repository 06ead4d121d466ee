"""One real training on a real SLURM through every fault in turn; the oracle is the uninterrupted run. For the table."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from ii_dist.config import RunFolder
from launch import slurm as submission
from launch.records import newest_step, read_record
from tests.fault_table import note
from tests.slurm.conftest import cluster, start_now
from tests.unit.launch.cases import ROOT, wait_until

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.usefixtures("slurm"),
    pytest.mark.skipif("II_DIST_FAULT_TABLE" not in os.environ, reason="only for the table (make fault-table)"),
]

SAVE_EVERY, STEPS = 10, 220
LIMIT_S = 240.0


class Training:
    """The demo's run on two nodes, digits through DALI."""

    def __init__(self, tmp_path: Path, name: str) -> None:
        self.folder = RunFolder(tmp_path / "runs" / name)
        more = [f"name={name}", f"runs_folder={tmp_path}/runs", f"data.root={tmp_path}/digits", "train.epochs=10"]
        more += ["metrics.log_every_steps=1", f"checkpoint.every_steps={SAVE_EVERY}", "launch.partition=low"]
        command = [sys.executable, "-m", "launch", "submit", "configs/demo/digits.yaml", *more]
        done = subprocess.run(
            [*command, "--cluster", "configs/clusters/slurm_test.yaml", "--no-follow"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        (self.job,) = re.findall(r"^job (\d+)", done.stdout, re.MULTILINE)
        self.starts = 1

    def rows(self) -> dict[int, tuple[float, float]]:
        """step -> loss and gradient norm as written: JSON keeps every bit."""
        found = {}
        with contextlib.suppress(FileNotFoundError):
            for line in self.folder.rank_metrics(0).read_text().splitlines():
                with contextlib.suppress(ValueError):
                    facts = json.loads(line)
                    if "train/loss" in facts:
                        found[facts["step"]] = (facts["train/loss"], facts["train/grad_norm"])
        return found

    def last_step(self) -> int:
        return max(self.rows(), default=0)

    def came_to(self, step: int) -> None:
        wait_until(lambda: self.last_step() >= step, LIMIT_S)

    def resumed(self, hurry: bool) -> int:
        """Wait for the next start of the ranks to say from where it goes on; that step.

        hurry: not after a crash, for the old srun waits 7 s for the dead node and then ends the step by its number.
        """
        log = self.folder.rank_log(self.job, 0)

        def said() -> list[str] | None:
            if hurry:
                start_now(self.job)
            found = re.findall(r"resuming after step (\d+)", log.read_text())
            return found if len(found) >= self.starts else None

        found: list[str] = wait_until(said, LIMIT_S)
        self.starts = len(found) + 1
        return int(found[-1])

    def weights(self) -> dict[str, bytes]:
        tensors: dict[str, bytes] = {}
        for shard in self.folder.step(STEPS).glob("*.safetensors"):
            with safe_open(shard, framework="pt") as file:
                names = file.keys()
                tensors |= {name: file.get_tensor(name).contiguous().numpy().tobytes() for name in names}
        assert tensors
        return tensors

    def kill_rank(self, rank: int) -> None:
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                ours = str(self.folder.config).encode() in (path / "cmdline").read_bytes()
                if ours and f"RANK={rank}".encode() in (path / "environ").read_bytes().split(b"\0"):
                    os.kill(int(path.name), signal.SIGKILL)
                    return
        raise AssertionError(f"no rank {rank}")

    def goes_on(self, fault: str, before: int, began_s: float, goal: str, may_lose: int, hurry: bool = True) -> None:
        resumed = self.resumed(hurry)
        wait_until(lambda: self.last_step() > max(before, resumed), LIMIT_S)
        lost = before - resumed
        note(fault, None, time.monotonic() - began_s, lost, goal)
        assert 0 <= lost <= may_lose


def test_through_every_fault_it_is_the_same_run(tmp_path: Path) -> None:
    digits = [sys.executable, "-m", "tools.import_dataset", "digits", "--out", str(tmp_path / "digits")]
    subprocess.run(digits, cwd=ROOT, check=True, capture_output=True, timeout=60)
    whole = Training(tmp_path, "whole")
    wait_until(lambda: not submission.may_go_on(whole.job), 400)
    run, interval = Training(tmp_path, "faults"), SAVE_EVERY + 1

    run.came_to(25)
    run.kill_rank(1)
    run.goes_on(
        "SLURM: kill -9 of a rank", run.last_step(), time.monotonic(), "again <= 20 s, <= one interval", interval
    )

    run.came_to(60)
    subprocess.run(["scancel", "--signal=USR2", run.job], check=True)
    stopped(run, 1)
    run.goes_on("SLURM: SIGUSR2 and requeue", run.last_step(), time.monotonic(), "0 steps lost", 0)

    run.came_to(95)
    high = ["sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--time=1", "--wrap=srun sleep 2"]
    done = subprocess.run(high, capture_output=True, text=True, check=True, cwd=tmp_path)
    wait_until(lambda: not submission.may_go_on(done.stdout.strip()), 90)
    stopped(run, 2)
    run.goes_on("SLURM: preemption", run.last_step(), time.monotonic(), "0 steps lost", 0)

    run.came_to(130)
    assert cluster("crash", "node2").returncode == 0
    began_s = time.monotonic()
    try:
        stopped(run, 3)
    finally:
        assert cluster("boot", "node2").returncode == 0
    run.goes_on(
        "SLURM: crash of a node", run.last_step(), began_s, "<= 35 s after notice, <= one interval", interval, False
    )

    run.came_to(165)
    subprocess.run(["scontrol", "requeue", run.job], check=True)
    stopped(run, 4)
    run.goes_on("SLURM: scontrol requeue from outside", run.last_step(), time.monotonic(), "0 steps lost", 0)

    wait_until(lambda: not submission.may_go_on(run.job), LIMIT_S)
    assert newest_step(run.folder) == STEPS
    assert run.rows() == whole.rows()
    assert run.weights() == whole.weights()
    note("SLURM: loss curve and weights after all of these", None, None, 0, "bit-equal to the uninterrupted run: yes")


def stopped(run: Training, attempts: int) -> None:
    """Wait for the end of so many attempts."""

    def ended() -> bool:
        record = read_record(run.folder.job(run.job))
        return record is not None and len(record.earlier) + (record.end is not None) >= attempts

    wait_until(ended, LIMIT_S)
