"""Jobs on a real SLURM of two nodes: what the supervisor and the submission promise, over stand-in ranks."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ii_dist.config import ClusterError, ConfigError, LaunchConfig, RunConfig, RunFolder
from launch import slurm as submission
from launch.fields import Watch
from launch.folder import private_folder
from launch.job import TrainJob
from launch.output import without_stamps
from launch.records import JobRecord, read_record
from launch.rendezvous import slurm_port
from tests.slurm.conftest import start_now
from tests.unit.launch.cases import ROOT, Plan, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm")]

STAND_IN = ROOT / "tests" / "unit" / "launch" / "rank_program.py"


def config(name: str, **launch: Any) -> RunConfig:
    asked = {"executor": "slurm", "nodes": 2, "partition": "main", "time_minutes": 10, "signal_lead_s": 30}
    return RunConfig(name=name, launch=LaunchConfig(**{**asked, **launch}))


class Submitted:
    """A job of two nodes x one stand-in rank."""

    def __init__(self, tmp_path: Path, plan: Plan, name: str, requeue: bool = True, **launch: Any) -> None:
        self.folder = RunFolder(tmp_path / "run")
        command = (sys.executable, str(STAND_IN), json.dumps(plan))
        watch = Watch(requeue=requeue, hang_after_s=5.0)
        job = TrainJob(str(self.folder.root), "slurm", nodes=2, ranks_per_node=1, command=command, watch=watch)
        self.submitit_folder = private_folder(self.folder.jobs / "submitit")
        self.parameters = submission.sbatch_parameters(config(name, **launch), 1)
        self.id = submission.submit(job, self.submitit_folder, self.parameters)

    def log(self, rank: int) -> str:
        path = self.folder.rank_log(self.id, rank)
        return without_stamps(path.read_bytes()).decode() if path.exists() else ""

    def ready(self) -> None:
        for rank in (0, 1):
            wait_until(lambda r=rank: f"{r} ready" in self.log(r))

    def ended(self) -> JobRecord:
        """Node 0's record, after SLURM has let go of the job."""
        wait_until(lambda: not submission.may_go_on(self.id))
        record = read_record(self.folder.job(self.id))
        assert record is not None
        return record

    def facts(self) -> str:
        return subprocess.run(["scontrol", "show", "job", self.id], capture_output=True, text=True, check=True).stdout


@pytest.fixture(autouse=True)
def from_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_two_nodes_know_who_they_are(tmp_path: Path) -> None:
    job = Submitted(tmp_path, {"0": "environ", "1": "environ"}, "who")
    record = job.ended()
    assert (record.exit_code, record.why, record.nodes, record.ranks) == (0, "done", ("node1", "node2"), 2)
    envs = [json.loads(job.log(rank).splitlines()[1].partition(" ")[2])["environ"] for rank in (0, 1)]
    for rank, env in enumerate(envs):
        assert (env["RANK"], env["LOCAL_RANK"], env["GROUP_RANK"]) == (str(rank), "0", str(rank))
        assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == ("2", "1")
        assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("node1", envs[0]["MASTER_PORT"])
        assert (env["II_DIST_JOB"], env["II_DIST_ATTEMPT"]) == (job.id, "0")
    other = read_record(job.folder.job(f"{job.id}_node_00001"))
    assert other is not None
    assert (other.host, other.node_rank, other.exit_code) == ("node2", 1, 0)
    assert "JobState=COMPLETED" in job.facts()


def test_the_submitted_text_is_the_dry_runs(tmp_path: Path) -> None:
    job = Submitted(tmp_path, {"0": "exit:0", "1": "exit:0"}, "text")
    (script,) = job.submitit_folder.glob("*_submission.sh")
    assert script.read_text() == submission.sbatch_text(job.submitit_folder, job.parameters)
    facts = job.facts()
    assert "JobName=text" in facts
    assert "Requeue=1" in facts
    assert "NumNodes=2" in facts
    job.ended()


def test_usr2_from_slurm_stops_all_ranks_with_75(tmp_path: Path) -> None:
    job = Submitted(tmp_path, {"0": "polite", "1": "polite"}, "stop", requeue=False)
    job.ready()
    subprocess.run(["scancel", "--signal=USR2", job.id], check=True)
    record = job.ended()
    assert (record.exit_code, record.why) == (75, "stopped as asked")
    for rank in (0, 1):
        assert f"{rank} asked by SIGUSR2" in job.log(rank)


def test_cancel_stops_all_ranks_before_slurm_kills_them(tmp_path: Path) -> None:
    job = Submitted(tmp_path, {"0": "polite", "1": "polite"}, "cancel")
    job.ready()
    subprocess.run(["scancel", job.id], check=True)
    assert job.ended().exit_code == 75
    for rank in (0, 1):  # no rank may see two SIGTERM: to a rank that means now
        words = re.search(rf"^{rank} asked by (.*)$", job.log(rank), re.MULTILINE)
        assert words
        assert words[1].split().count("SIGTERM") <= 1


def test_a_rank_that_fails_on_one_node_ends_the_job(tmp_path: Path) -> None:
    mark = tmp_path / "go"
    job = Submitted(tmp_path, {"0": "sleep", "1": f"after:{mark}:exit:3"}, "fail")
    wait_until(lambda: "== job" in job.log(0) and "== job" in job.log(1))
    mark.touch()
    begin_s = time.monotonic()
    job.ended()
    assert time.monotonic() - begin_s < 30
    record = read_record(job.folder.job(job.id))
    assert record is not None
    assert (record.exit_code, record.failed_rank, record.failed_host) == (3, 1, "node2")
    assert record.why == "rank 1 ended with exit code 3"
    assert re.search(r"JobState=FAILED", job.facts())


def test_a_requeued_job_gets_another_port_and_keeps_its_records(tmp_path: Path) -> None:
    mark = tmp_path / "go"
    job = Submitted(tmp_path, {"0": f"after:{mark}:environ", "1": f"after:{mark}:environ"}, "requeue")
    wait_until(lambda: "== job" in job.log(0) and "== job" in job.log(1))
    subprocess.run(["scontrol", "requeue", job.id], check=True)
    wait_until(lambda: "Restarts=1" in job.facts())

    def both_again() -> bool:
        start_now(job.id)
        return job.log(0).count("== job") == 2 and job.log(1).count("== job") == 2

    wait_until(both_again)
    mark.touch()
    record = job.ended()
    assert (record.attempt, record.exit_code) == (1, 0)
    assert [before["attempt"] for before in record.earlier] == [0]
    env = json.loads(job.log(0).splitlines()[-1].partition(" ")[2])["environ"]
    assert env["II_DIST_ATTEMPT"] == "1000"
    assert env["MASTER_PORT"] != str(slurm_port(job.id, 0))


def test_a_newline_in_the_job_name_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submitit's renderer and the real sbatch let this name through; our border is what stops it."""
    import submitit

    monkeypatch.chdir(tmp_path)  # the attacked script has lost its --output
    canary = tmp_path / "canary"
    payload = f"x\\'\"\ntouch {canary}\n#"
    executor = submitit.SlurmExecutor(private_folder(tmp_path / "bare"))
    executor.update_parameters(job_name=payload, time=1)
    executor.submit(print)
    wait_until(canary.exists)
    canary.unlink()

    cfg = config("ok").model_copy(update={"name": payload})
    with pytest.raises(ConfigError, match="sbatch job_name"):
        submission.sbatch_parameters(cfg, 1)
    job = TrainJob(str(tmp_path), "slurm", nodes=2, ranks_per_node=1)
    with pytest.raises(ConfigError, match="sbatch job_name"):
        submission.submit(job, tmp_path, {**submission.sbatch_parameters(config("ok"), 1), "job_name": payload})
    assert not canary.exists()


def test_what_sbatch_refuses_is_one_line(tmp_path: Path) -> None:
    job = TrainJob(str(tmp_path), "slurm", nodes=2, ranks_per_node=1)
    parameters = submission.sbatch_parameters(config("refused", partition="nowhere"), 1)
    with pytest.raises(ClusterError, match=r"sbatch refused the job: .*partition") as error:
        submission.submit(job, private_folder(tmp_path / "submitit"), parameters)
    assert "\n" not in str(error.value)
