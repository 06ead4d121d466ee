"""`python -m launch submit | status | logs | cancel | why` on a real SLURM, as a user types them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ii_dist.config import RunFolder
from launch import scheduler
from launch.records import read_record
from launch.submitted import note_submitted
from tests.slurm.test_slurm_jobs import Submitted
from tests.unit.launch.cases import ROOT, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm")]

CONFIG = """
name: trial
data: {source: synthetic, image_size: 16, eval_resize: 16, eval_image_size: 16, synthetic_images: 64,
       synthetic_classes: 4}
model: {network: ini_resnet20, fold_width: 8}
train: {epochs: 3, global_batch: 16, eval_every_epochs: 3}
optim: {warmup_epochs: 0}
metrics: {boards: [console, jsonl]}
launch: {nodes: 1}
"""


@pytest.fixture(autouse=True)
def from_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def launch(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def status(folder: RunFolder) -> dict[str, Any]:
    (facts,) = json.loads(launch("status", folder.root, "--json").stdout)["runs"]
    assert isinstance(facts, dict)
    return facts


def test_a_queued_run_is_its_own_and_keeps_its_code(tmp_path: Path, full_cluster: str, monkeypatch: Any) -> None:
    """Queued behind a full cluster: shown, refused a second time, and not changed by edits of its checkout."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    checkout, folder = tmp_path / "checkout", RunFolder(tmp_path / "runs" / "trial")
    for part in ("ii_dist", "launch", "configs"):
        shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "trial.yaml").write_text(CONFIG)
    asked = ("submit", "trial.yaml", "--cluster", "configs/clusters/slurm_test.yaml", "launch.nodes=1")
    place = f"runs_folder={tmp_path}/runs"

    first = launch(*asked, place, cwd=checkout)
    assert first.returncode == 0, first.stderr
    job = re.findall(r"^job (\d+) submitted: 1 node\(s\) x 1 rank\(s\)$", first.stdout, re.MULTILINE)[0]
    assert "tensorboard --host localhost" in first.stdout
    assert "ssh -L 6006:localhost:6006" in first.stdout
    waiting = status(folder)
    assert (waiting["state"], waiting["job"]) == ("queued", job)
    assert re.search(r"\((Resources|Priority)\)|no reason", waiting["why"])

    begin_s = time.monotonic()
    second = launch(*asked, place, cwd=checkout)
    assert time.monotonic() - begin_s < 10  # 5 s on a machine that has nothing else to do
    assert second.returncode == 5
    assert f"has job {job} (pending, submitted " in second.stderr
    assert second.stderr.count("\n") == 1

    for edited in ("launch/job.py", "ii_dist/__init__.py"):
        (checkout / edited).write_text("raise SystemExit('edited')\n")
    subprocess.run(["scancel", full_cluster], check=True)
    wait_until(lambda: status(folder)["state"] not in ("queued", "starting", "training", "stopping"), 150)
    ended = status(folder)
    assert (ended["state"], ended["step"], ended["newest_commit"]) == ("done", 12, 12), launch(
        "why", folder.root
    ).stdout
    assert ended["queue_wait_s"] > 0
    assert json.loads(launch("why", folder.root, "--json").stdout)["kind"] == "finished"
    assert "trained    12 of 12 steps" in launch("logs", folder.root).stdout


def test_a_queued_job_is_taken_out(tmp_path: Path, full_cluster: str) -> None:
    job = Submitted(tmp_path, {"0": "exit:0", "1": "exit:0"}, "queued")
    note_submitted(job.folder, job.id, "slurm", nodes=2, ranks_per_node=1)
    wait_until(lambda: status(job.folder)["state"] == "queued")
    assert launch("cancel", job.folder.root).stdout == f"job {job.id}: taken out of the queue\n"
    wait_until(lambda: status(job.folder)["state"] == "stopped")
    cause = json.loads(launch("why", job.folder.root, "--json").stdout)
    assert (cause["kind"], cause["source"]) == ("cancelled", "slurm")
    assert launch("cancel", job.folder.root).stdout == "no job of this run waits or runs\n"


def test_cancel_with_saving_stops_every_rank_once_and_for_all(tmp_path: Path) -> None:
    job = Submitted(tmp_path, {"0": "polite", "1": "polite"}, "save")
    note_submitted(job.folder, job.id, "slurm", nodes=2, ranks_per_node=1)
    job.ready()
    assert status(job.folder)["state"] == "starting"  # these ranks make no step
    assert launch("cancel", job.folder.root, "--save").stdout == f"job {job.id}: asked to save and leave\n"
    record = job.ended()
    assert record.exit_code == 75
    assert (job.folder.jobs / job.id / "cancel.json").exists()
    assert status(job.folder)["state"] == "stopped"
    assert "Restarts=0" in job.facts()
    for rank in (0, 1):
        assert f"{rank} asked by SIGUSR2" in job.log(rank)


def supervisors(folder: Path) -> list[int]:
    """Processes of the supervisors that were started with this Submitit folder (the nodes' are seen from outside)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"python" in words[0] and b"launch.task" in words and str(folder).encode() in words:
            found.append(int(path.parent.name))
    return found


def test_killed_supervisors_are_told_by_slurms_word(tmp_path: Path) -> None:
    job = Submitted(tmp_path, {"0": "sleep", "1": "sleep"}, "killed")
    note_submitted(job.folder, job.id, "slurm", nodes=2, ranks_per_node=1)
    job.ready()
    killed = supervisors(job.submitit_folder)
    assert len(killed) == 2
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not scheduler.may_go_on(job.id))
    record = read_record(job.folder.job(job.id))
    assert record is not None
    assert record.end is None
    ended = scheduler.ending(job.id)
    assert ended is not None
    assert (ended.state, ended.source) == ("FAILED", "scontrol")
    cause = json.loads(launch("why", job.folder.root, "--json").stdout)
    assert (cause["kind"], cause["source"]) == ("lost", "slurm")
    assert "SLURM says FAILED" in cause["says"]
