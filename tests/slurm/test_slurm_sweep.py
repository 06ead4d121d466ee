"""A sweep on a real SLURM of two nodes: one job array, in which each element is a run that lives its own life."""

import dataclasses
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ii_dist.config import RunFolder
from launch import cancel, planned, scheduler
from launch.output import without_stamps
from launch.records import JobRecord, read_record
from launch.status import Status, find_runs, status_of
from launch.submit import Submission, submit_run
from launch.submitted import read_submitted
from launch.why import why
from tests.slurm.conftest import start_now
from tests.slurm.test_slurm_jobs import STAND_IN, Submitted
from tests.slurm.test_slurm_run import CONFIG
from tests.unit.launch.cases import ROOT, Plan, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm")]

CLUSTER = ROOT / "configs" / "clusters" / "slurm_test.yaml"


@pytest.fixture(autouse=True)
def from_the_checkout(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(ROOT)
    yield
    subprocess.run(["scancel", "--name=trial"], check=False)  # what a failed test leaves is in nobody's way


class Swept:
    """A sweep over three seeds, one node a run, as `python -m launch submit --sweep` hands it over; stand-in ranks."""

    def __init__(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], plan: Plan
    ) -> None:
        monkeypatch.setattr(planned, "TRAIN_COMMAND", ("", str(STAND_IN), json.dumps(plan)))
        self.root, self.capsys = tmp_path / "runs", capsys
        config = tmp_path / "trial.yaml"
        config.write_text(CONFIG)
        self.asked = Submission(
            config=config,
            overrides=(f"runs_folder={self.root}",),
            cluster=CLUSTER,
            nodes=1,
            sweep=("seed=0,1,2",),
            parallel=2,
            as_json=True,
        )
        self.folders = [RunFolder(self.root / f"trial-seed_{seed}") for seed in range(3)]

    def submit(self, **changes: Any) -> tuple[int, list[dict[str, Any]], str]:
        """Exit code, rows of the table, what was said on stderr."""
        self.capsys.readouterr()
        code = submit_run(dataclasses.replace(self.asked, **changes), {})
        said = self.capsys.readouterr()
        return code, json.loads(said.out)["runs"], said.err

    def log(self, number: int, job: str) -> str:
        path = self.folders[number].rank_log(job, 0)
        return without_stamps(path.read_bytes()).decode() if path.exists() else ""

    def ready(self, number: int, job: str) -> dict[str, str]:
        """Wait for the run's rank; its variables."""
        wait_until(lambda: "0 ready" in self.log(number, job))
        line = next(line for line in self.log(number, job).splitlines() if line.startswith('0 {"environ"'))
        environ = json.loads(line.partition(" ")[2])["environ"]
        assert isinstance(environ, dict)
        return environ

    def status(self) -> list[Status]:
        live = scheduler.live_jobs()
        return [status_of(folder, live) for folder in find_runs("trial.sweep", self.root)]

    def record(self, number: int, job: str) -> JobRecord:
        record = read_record(self.folders[number].job(job))
        assert record is not None
        return record


def test_each_element_is_a_run_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One is told to save and goes on by a requeue, one is cancelled while it waits, and the third sees none of it."""
    swept = Swept(tmp_path, monkeypatch, capsys, {"0": ["tell:polite", "exit:0"]})
    code, rows, said = swept.submit()
    assert (code, said) == (0, "")
    jobs = [row["job"] for row in rows]
    array = jobs[0].partition("_")[0]
    assert jobs == [f"{array}_{element}" for element in range(3)]
    assert [row["seed"] for row in rows] == ["0", "1", "2"]
    shared = swept.root / "trial.sweep"
    assert {stat.S_IMODE(path.stat().st_mode) for path in (shared, shared / "jobs" / "submitit")} == {0o700}

    environs = [swept.ready(number, jobs[number]) for number in (0, 1)]
    assert [environ["II_DIST_JOB"] for environ in environs] == jobs[:2]
    assert environs[0]["MASTER_PORT"] != environs[1]["MASTER_PORT"]
    shown = swept.status()
    assert [(each.run, each.job, each.state) for each in shown] == [
        ("trial-seed_0", jobs[0], "starting"),
        ("trial-seed_1", jobs[1], "starting"),
        ("trial-seed_2", jobs[2], "queued"),
    ]
    assert "(JobArrayTaskLimit)" in shown[2].why

    done = cancel.cancel(swept.folders[2], scheduler.live_jobs(), save=True)
    assert done == [cancel.Cancelled(jobs[2], "taken out of the queue")]
    assert [each.state for each in swept.status()] == ["starting", "starting", "stopped"]
    assert why(swept.folders[2], scheduler.live_jobs()).kind == "cancelled"

    subprocess.run(["scancel", "--signal=USR2", jobs[0]], check=True)
    wait_until(lambda: (swept.record(0, jobs[0]).requeued, swept.status()[0].state) == ("scontrol", "requeued"))

    def again() -> bool:
        start_now(jobs[0])
        return swept.record(0, jobs[0]).ended_as == "finished"

    wait_until(again)
    wait_until(lambda: not scheduler.may_go_on(jobs[0]))
    record = swept.record(0, jobs[0])
    assert (record.attempt, record.exit_code, len(record.earlier)) == (1, 0, 1)
    assert (record.earlier[0]["exit_code"], record.earlier[0]["asked"]) == (75, "SIGUSR2")
    other = swept.record(1, jobs[1])
    assert (other.attempt, other.end, other.asked) == (0, None, "")

    done, errors = cancel.cancel_all(swept.folders, scheduler.live_jobs(), save=True)
    assert (done, errors) == ([cancel.Cancelled(jobs[1], "asked to save and leave")], [])
    wait_until(lambda: not scheduler.may_go_on(jobs[1]))
    assert swept.record(1, jobs[1]).ended_as == "stopped"
    assert [each.state for each in swept.status()] == ["done", "stopped", "stopped"]
    assert [len(read_submitted(folder)) for folder in swept.folders] == [1, 1, 1]


def test_a_sweep_submitted_again_leaves_live_runs_alone_and_an_element_goes_on_as_a_new_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    swept = Swept(tmp_path, monkeypatch, capsys, {"0": "tell:polite"})
    jobs = [row["job"] for row in swept.submit(parallel=1)[1]]
    swept.ready(0, jobs[0])
    for number, how in (
        (0, "asked to save and leave"),
        (2, "taken out of the queue"),
    ):  # two wait while one is signalled
        done = cancel.cancel(swept.folders[number], scheduler.live_jobs(), save=True)
        assert done == [cancel.Cancelled(jobs[number], how)]
    environ = swept.ready(1, jobs[1])
    assert (swept.record(0, jobs[0]).exit_code, swept.record(0, jobs[0]).ended_as) == (75, "stopped")

    wait_until(lambda: not scheduler.may_go_on(jobs[0]))  # its nodes may still be cleaned up

    code, rows, said = swept.submit(parallel=None)
    assert code == 5
    assert [row["state"] for row in rows] == ["submitted", "refused", "submitted"]
    assert rows[1]["job"] == jobs[1]
    assert f"{swept.folders[1].root}: has job {jobs[1]} (running, submitted " in said
    assert said.count("\n") == 1
    second = [row["job"] for row in rows]
    assert [second[number].partition("_")[2] for number in (0, 2)] == ["0", "1"]
    ports = {swept.ready(number, second[number])["MASTER_PORT"] for number in (0, 2)} | {environ["MASTER_PORT"]}
    assert len(ports) == 3

    subprocess.run(["scontrol", "update", f"jobid={second[2]}", "requeue=0"], check=True)
    subprocess.run(["scancel", "--signal=USR2", second[2]], check=True)
    wait_until(lambda: swept.record(2, second[2]).requeued.startswith("job "))
    new = swept.record(2, second[2]).requeued.removeprefix("job ")
    assert new.partition("_")[2] == "1"  # the same element of a new array
    swept.ready(2, new)
    wait_until(lambda: not scheduler.may_go_on(second[2]))
    assert swept.status()[2].job == new
    assert [entry.job for entry in read_submitted(swept.folders[2])] == [jobs[2], second[2], new]

    ended, _ = cancel.cancel_all(find_runs("trial.sweep", swept.root), scheduler.live_jobs(), save=True)
    assert {each.job for each in ended} == {second[0], jobs[1], new}
    wait_until(lambda: not any(scheduler.may_go_on(job) for job in (second[0], jobs[1], new)))
    assert [each.state for each in swept.status()] == ["stopped"] * 3


def test_a_job_submitted_from_inside_an_array_is_none_of_its_elements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch hands on the variables of the job that it is called in."""
    for name, value in (("JOB_ID", "9999"), ("TASK_ID", "7"), ("TASK_COUNT", "8")):
        monkeypatch.setenv(f"SLURM_ARRAY_{name}", value)
    job = Submitted(tmp_path, {"0": "exit:0", "1": "exit:0"}, "inside")
    assert os.environ["SLURM_ARRAY_TASK_ID"] == "7"
    assert job.ended().exit_code == 0


def test_a_sweep_as_a_user_types_it(tmp_path: Path) -> None:
    """Two runs train to their end side by side; the same command again has nothing left to do."""
    (tmp_path / "trial.yaml").write_text(CONFIG)

    def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launch", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    where = (f"runs_folder={tmp_path}/runs", "train.epochs=1", "train.eval_every_epochs=1")
    asked = ("submit", tmp_path / "trial.yaml", "--cluster", CLUSTER, "--nodes", "1", *where)
    swept = ("--sweep", "optim.lr=0.1,0.2")
    dry = launch(*asked, "--dry-run", *swept)
    assert dry.returncode == 0, dry.stderr
    first = launch(*asked, *swept)
    assert first.returncode == 0, first.stderr
    (script,) = (tmp_path / "runs" / "trial.sweep" / "jobs" / "submitit").glob("*_submission.sh")
    assert dry.stdout.startswith(script.read_text())
    array = script.name.partition("_")[0]
    assert f"job array {array}: 2 run(s), at most 2 at once\n" in first.stdout
    folders = [RunFolder(tmp_path / "runs" / f"trial-lr_{value}") for value in ("0.1", "0.2")]
    jobs = [f"{array}_0", f"{array}_1"]
    wait_until(lambda: not any(scheduler.may_go_on(job) for job in jobs), 150)
    for folder, job, rate in zip(folders, jobs, ("0.1", "0.2"), strict=True):
        record = read_record(folder.job(job))
        assert record is not None
        assert (record.exit_code, record.why) == (0, "done"), launch("why", folder.root).stdout
        assert f"lr: {rate}" in folder.config.read_text()
    shown = launch("status", "trial.sweep", "--runs-folder", tmp_path / "runs")
    assert [line.split()[:3] for line in shown.stdout.splitlines()[1:]] == [
        ["trial-lr_0.1", "done", jobs[0]],
        ["trial-lr_0.2", "done", jobs[1]],
    ]
    again = launch(*asked, *swept)
    assert again.returncode == 0, again.stderr
    assert "nothing submitted" in again.stdout
