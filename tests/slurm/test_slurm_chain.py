"""A run goes on by itself on a real SLURM of two nodes: signals, requeues from outside, preemption, a lost node."""

import re
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from ii_dist.config import RunFolder
from launch import slurm as submission
from launch.output import without_stamps
from launch.records import JobRecord, cancel_path, newest_step, read_record, write_json
from tests.fault_table import note
from tests.slurm.conftest import cluster, start_now
from tests.slurm.test_slurm_jobs import Submitted
from tests.unit.launch.cases import ROOT, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm")]

POLITE = {"0": ["polite", "exit:0"], "1": ["polite", "exit:0"]}


@pytest.fixture(autouse=True)
def from_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def scontrol(*arguments: str) -> None:
    subprocess.run(["scontrol", *arguments], check=False, capture_output=True)


def started_again(job: Submitted, limit_s: float = 90.0) -> None:
    """Wait for the requeue; spare the test the seconds that SLURM lets a requeued job wait."""
    wait_until(lambda: "Restarts=1" in job.facts(), limit_s)

    def running() -> bool:
        start_now(job.id)
        return job.log(0).count("== job") == 2

    wait_until(running, limit_s)


def first_and_last(job: Submitted) -> tuple[dict[str, object], JobRecord]:
    record = job.ended()
    assert len(record.earlier) == 1
    return record.earlier[0], record


def test_a_signal_is_followed_by_a_requeue(tmp_path: Path) -> None:
    job = Submitted(tmp_path, POLITE, "usr2")
    job.ready()
    subprocess.run(["scancel", "--signal=USR2", job.id], check=True)
    started_again(job)
    first, last = first_and_last(job)
    assert (first["exit_code"], first["asked"], first["requeued"]) == (75, "SIGUSR2", "scontrol")
    assert (last.attempt, last.exit_code, last.ended_as) == (1, 0, "finished")
    assert "Restarts=1" in job.facts()


def test_what_a_person_cancels_stays_cancelled(tmp_path: Path) -> None:
    job = Submitted(tmp_path, POLITE, "cancel")
    job.ready()
    write_json(cancel_path(job.folder, job.id), {"time": "now", "by": "test"})
    subprocess.run(["scancel", "--signal=USR2", job.id], check=True)
    record = job.ended()
    assert (record.exit_code, record.ended_as, record.requeued) == (75, "stopped", "")
    assert "Restarts=0" in job.facts()


def test_a_requeue_from_outside_is_one_requeue(tmp_path: Path) -> None:
    job = Submitted(tmp_path, POLITE, "outside")
    job.ready()
    scontrol("requeue", job.id)
    started_again(job)
    first, last = first_and_last(job)
    assert (first["exit_code"], last.exit_code, last.attempt) == (75, 0, 1)
    assert "Restarts=1" in job.facts()


def test_where_requeue_is_not_allowed_a_new_job_goes_on(tmp_path: Path) -> None:
    job = Submitted(tmp_path, {"0": ["polite"], "1": ["polite"]}, "dependent")
    job.ready()
    scontrol("update", f"jobid={job.id}", "requeue=0")
    subprocess.run(["scancel", "--signal=USR2", job.id], check=True)
    record = job.ended()
    assert record.requeued.startswith("job ")
    new = record.requeued.removeprefix("job ")
    log = job.folder.rank_log(new, 0)
    wait_until(lambda: log.exists() and "0 ready" in log.read_text())
    write_json(cancel_path(job.folder, new), {"time": "now", "by": "test"})
    subprocess.run(["scancel", "--signal=USR2", new], check=True)
    wait_until(lambda: not submission.may_go_on(new))
    last = read_record(job.folder.job(new))
    assert last is not None
    assert (last.exit_code, last.attempt) == (75, 0)


def test_preemption_is_named_and_followed_by_a_requeue(tmp_path: Path) -> None:
    job = Submitted(tmp_path, POLITE, "low", partition="low")
    job.ready()
    high = ["sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--time=1", "--wrap=srun sleep 3"]
    done = subprocess.run(high, capture_output=True, text=True, check=True, cwd=tmp_path)
    wait_until(lambda: not submission.may_go_on(done.stdout.strip()), 60)
    started_again(job)
    first, last = first_and_last(job)
    assert (first["exit_code"], first["ended_as"]) == (75, "preempted")
    assert (last.exit_code, last.attempt) == (0, 1)


def test_without_a_signal_the_clock_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the job's time is known beforehand: a cluster that sends no signal costs no step."""
    monkeypatch.setenv("SBATCH_SIGNAL", "CONT@1")  # wins over the script's own USR2
    mark = tmp_path / "rank 0 stops"
    plan = {"0": ["polite", "exit:0"], "1": [f"after:{mark}:exit:75", "exit:0"]}
    job = Submitted(tmp_path, plan, "clock", time_minutes=1)
    monkeypatch.delenv("SBATCH_SIGNAL")
    wait_until(lambda: "asked by SIGUSR2" in job.log(0), 60)
    mark.touch()  # real ranks agree on it
    started_again(job)
    first, last = first_and_last(job)
    assert (first["exit_code"], first["asked"], first["ended_as"]) == (75, "time", "time_limit")
    assert (first["why"], first["requeued"]) == ("stopped before the time limit", "scontrol")
    assert (last.exit_code, last.attempt) == (0, 1)


def test_a_killed_rank_restarts_both_nodes(tmp_path: Path) -> None:
    job = Submitted(tmp_path, {"0": ["sleep", "exit:0"], "1": ["steps:5:die:SIGKILL", "exit:0"]}, "kill")
    record = job.ended()
    assert (record.exit_code, record.restarts, record.attempt) == (0, 1, 0)
    assert (record.rounds[0]["failed_rank"], record.rounds[0]["failed_host"]) == (1, "node2")
    ended, started = (datetime.fromisoformat(record.rounds[i][key]) for i, key in ((0, "end"), (1, "start")))
    assert (started - ended).total_seconds() < 5
    note("kill -9 of a rank, two nodes (no torch)", None, (started - ended).total_seconds(), None, "restart <= 20 s")


def test_a_lost_node_is_followed_by_a_new_attempt(tmp_path: Path) -> None:
    job = Submitted(tmp_path, {"0": ["steps:5:sleep", "exit:0"], "1": ["steps:5:sleep", "exit:0"]}, "crash")
    job.ready()
    began_s = time.monotonic()
    assert cluster("crash", "node2").returncode == 0
    try:
        wait_until(lambda: (r := read_record(job.folder.job(job.id))) and r.ended_as == "node_failure", 60)
        noticed_s = time.monotonic() - began_s
        assert noticed_s < 30
    finally:
        assert cluster("boot", "node2").returncode == 0

    def finished() -> JobRecord | None:  # SLURM may start the job on the dead node once more before it knows
        record = read_record(job.folder.job(job.id))
        return record if record is not None and record.ended_as == "finished" else None

    last: JobRecord = wait_until(finished, 90)
    note("crash of a node (no torch)", noticed_s, time.monotonic() - began_s, None, "<= 35 s after SLURM notices")
    assert last.exit_code == 0
    assert {before["ended_as"] for before in last.earlier} == {"node_failure"}
    assert last.earlier[0]["failed_host"] == "node2"
    wait_until(lambda: not submission.may_go_on(job.id))


def digits_run(tmp_path: Path) -> tuple[str, RunFolder]:
    """The id of a submitted job of the demo's run on two nodes, and its folder."""
    digits = [sys.executable, "-m", "tools.import_dataset", "digits", "--out", str(tmp_path / "digits")]
    subprocess.run(digits, cwd=ROOT, check=True, capture_output=True, timeout=60)
    command = [sys.executable, "-m", "launch", "submit", "configs/demo/digits.yaml", f"runs_folder={tmp_path}/runs"]
    command += [
        f"data.root={tmp_path}/digits",
        "train.epochs=6",
        "metrics.log_every_steps=1",
        "launch.preflight=true",
        "--no-follow",
    ]
    cluster_file = ["--cluster", "configs/clusters/slurm_test.yaml"]
    done = subprocess.run([*command, *cluster_file], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return re.findall(r"^job (\d+)", done.stdout, re.MULTILINE)[0], RunFolder(tmp_path / "runs" / "digits")


def test_a_training_goes_on_after_a_signal_without_losing_a_step(tmp_path: Path) -> None:
    """Real ranks, real images, nodes checked before: a signal in the middle, a requeue, the end."""
    job, folder = digits_run(tmp_path)
    log = folder.rank_log(job, 0)

    def said(words: str) -> list[str]:
        return re.findall(words, without_stamps(log.read_bytes()).decode()) if log.exists() else []

    wait_until(lambda: said(r"step +[2-9]/"), 240)
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    wait_until(lambda: (r := read_record(folder.job(job))) and r.attempt == 0 and r.end, 60)
    newest = newest_step(folder)
    assert int(said(r"step +(\d+)/\d+ +epoch")[-1]) == newest
    asked_s = time.monotonic()

    def resumed() -> list[str]:
        start_now(job)
        return said(r"resuming after step (\d+)")

    assert wait_until(resumed, 240) == [str(newest)]
    note("SIGUSR2, requeue, training again", None, time.monotonic() - asked_s, 0, "0 steps lost")
    assert (folder.jobs / job / "preflight.json").is_file()
    scontrol("requeue", job)  # a person, or an administrator: twice in one run
    wait_until(lambda: (r := read_record(folder.job(job))) and len(r.earlier) == 2, 120)
    write_json(cancel_path(folder, job), {"time": "now", "by": "test"})
    subprocess.run(["scancel", job], check=True)
    wait_until(lambda: not submission.may_go_on(job), 60)
    assert newest_step(folder) >= newest
