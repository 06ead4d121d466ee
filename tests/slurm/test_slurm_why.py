"""`why` on a real SLURM: the right cause from the records, from sacct alone, and from the logs alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import scheduler
from launch.submitted import note_submitted
from tests.slurm.test_slurm_jobs import Plan, Submitted
from tests.unit.launch.cases import ROOT, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm")]


@pytest.fixture(autouse=True)
def from_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def without(folder: Path, *names: str) -> str:
    """A PATH on which these commands of SLURM fail, as where a job is forgotten or there is no database."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text("#!/bin/sh\necho not today >&2\nexit 1\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def why(job: Submitted, path: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "launch", "why", str(job.folder.root), "--json"],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert isinstance(facts, dict)
    return facts


def submitted(tmp_path: Path, plan: Plan, name: str, **launch: Any) -> Submitted:
    job = Submitted(tmp_path, plan, name, requeue=False, **launch)
    note_submitted(job.folder, job.id, "slurm", nodes=2, ranks_per_node=1)
    return job


CASES: dict[str, tuple[Plan, str, int | None]] = {
    "killed": ({"0": "sleep", "1": "die:SIGKILL"}, "killed_rank", 1),
    "hang": ({"0": "steps:5:hang:wait", "1": "steps:5:hang:stop"}, "hang", 1),
    "data": ({"0": "sleep", "1": "error"}, "bad_data", 1),
    "done": ({"0": "exit:0", "1": "exit:0"}, "finished", None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_supervisors_word_needs_no_answer_of_slurm(name: str, tmp_path: Path) -> None:
    plan, kind, rank = CASES[name]
    job = submitted(tmp_path, plan, name)
    wait_until(lambda: not scheduler.may_go_on(job.id), 90)
    for path in (os.environ["PATH"], without(tmp_path / "bin", "sacct", "scontrol", "squeue")):
        cause = why(job, path)
        assert (cause["kind"], cause["rank"], cause["source"]) == (kind, rank, "supervisor")


@pytest.mark.usefixtures("accounting")
def test_a_job_that_slurm_has_forgotten_is_in_the_database(tmp_path: Path) -> None:
    """Its supervisors were killed, so that only SLURM knows how it ended; then not even SLURM, only its logs."""
    job = submitted(tmp_path, {"0": "deaf", "1": "deaf"}, "forgotten")
    job.ready()
    subprocess.run(["scancel", "--signal=KILL", job.id], check=True)
    wait_until(lambda: not scheduler.may_go_on(job.id), 60)
    told = why(job, os.environ["PATH"])
    assert told["source"] == "slurm"
    kept = why(job, without(tmp_path / "no-scontrol", "scontrol"))
    assert (kept["kind"], kept["source"]) == (told["kind"], "slurm")
    nobody = why(job, without(tmp_path / "nobody", "scontrol", "sacct"))
    assert nobody["source"] != "slurm"
    assert nobody["kind"] in ("lost", "killed_rank", "exception")


@pytest.mark.usefixtures("accounting", "full_cluster")
def test_cancelled_in_the_queue(tmp_path: Path) -> None:
    job = submitted(tmp_path, {"0": "exit:0", "1": "exit:0"}, "queue", partition="main")
    subprocess.run(["scancel", job.id], check=True)
    wait_until(lambda: not scheduler.may_go_on(job.id))
    assert not job.folder.job(job.id).exists()
    for path in (os.environ["PATH"], without(tmp_path / "bin", "scontrol")):
        cause = why(job, path)
        assert (cause["kind"], cause["source"]) == ("cancelled", "slurm")
