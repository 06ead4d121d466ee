"""Elements of a job array as runs: whose job is whose, what a run does, what is left to do, who is cancelled first.

tests/slurm has the same over a real SLURM.
"""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ii_dist.config import ClusterError, ConfigError, load_config
from launch import cancel, history
from launch.job_array import Sweep, is_done
from launch.owner import jobs_of, require_free
from launch.planned import PlannedRun
from launch.records import cancel_path, write_json
from launch.requeue import requeue
from launch.scheduler import LiveJob
from launch.status import Status, find_run, find_runs, status_of
from launch.submitted import note_again, read_submitted
from launch.sweep import write_sweep
from launch.why import why
from tests.unit.launch.made_runs import EPOCH_S, MadeRun


@pytest.fixture(autouse=True)
def slurm_has_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "ending", lambda job: None)


class MadeSweep:
    """Two runs that were submitted as the array 12."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "made.sweep"
        self.runs = [MadeRun(root, f"made-{number}") for number in range(2)]
        for number, run in enumerate(self.runs):
            run.submitted(f"12_{number}", sweep=str(self.folder))
        (self.folder / "jobs" / "submitit").mkdir(parents=True)
        write_sweep(self.folder / "runs.json", [{"run": run.folder.root.name} for run in self.runs])

    def live(self, number: int, state: str = "RUNNING", job: str = "", **more: Any) -> LiveJob:
        script = str(self.folder / "jobs" / "submitit" / ".submission_file_0.sh")
        raw_id = "12" if state == "PENDING" else str(13 + number)  # those that wait have the array's
        return self.runs[0].live(job or f"12_{number}", state, **{"raw_id": raw_id, "script": script, **more})


@pytest.fixture
def sweep(tmp_path: Path) -> MadeSweep:
    return MadeSweep(tmp_path)


def told(run: MadeRun, *jobs: LiveJob) -> Status:
    return status_of(run.folder, jobs, now_s=EPOCH_S + 110)


def test_an_element_is_the_job_of_its_run_alone(sweep: MadeSweep, tmp_path: Path) -> None:
    live = [sweep.live(0), sweep.live(1, "PENDING")]
    for run, job in zip(sweep.runs, live, strict=True):
        assert jobs_of(run.folder, live) == [job]
    assert jobs_of(MadeRun(tmp_path, "other").folder, live) == []
    elsewhere = tmp_path / "other.sweep" / "jobs" / "submitit" / "x.sh"
    assert jobs_of(sweep.runs[0].folder, [sweep.live(0, script=str(elsewhere))]) == []  # SLURM counts anew


def test_a_sweep_under_another_name_is_the_same(sweep: MadeSweep, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    linked = str(tmp_path / "link" / "made.sweep" / "jobs" / "submitit" / "x.sh")
    assert len(jobs_of(sweep.runs[0].folder, [sweep.live(0, script=linked)])) == 1


def test_a_run_whose_element_lives_is_refused_by_its_name(sweep: MadeSweep) -> None:
    with pytest.raises(ClusterError, match=r"made-1: has job 12_1 \(pending, submitted 2027"):
        require_free(sweep.runs[1].folder, [sweep.live(1, "PENDING")])
    require_free(sweep.runs[1].folder, [sweep.live(0)])


def test_the_lease_of_an_element_that_has_ended(sweep: MadeSweep) -> None:
    run = sweep.runs[0]
    owner = {"host": "far-away", "boot": "", "pid_namespace": "", "pid": 1, "started_ticks": 1, "job": "12_0"}
    run.folder.lease.write_text(json.dumps({**owner, "since": "", "fence": 3, "released": False}))
    (run.folder.root / ".heartbeat_fence_000003").touch()
    with pytest.raises(ClusterError, match="job 12_0 has ended, but far-away gave a sign of life"):
        require_free(run.folder, [sweep.live(1)])


def test_what_an_element_does(sweep: MadeSweep) -> None:
    run = sweep.runs[1]
    waiting = told(run, sweep.live(0), sweep.live(1, "PENDING", reason="JobArrayTaskLimit"))
    assert (waiting.state, waiting.job) == ("queued", "12_1")
    assert waiting.why == "--parallel runs of the sweep run already (JobArrayTaskLimit)"
    assert told(run, sweep.live(1)).state == "starting"
    run.record("12_1")
    run.numbers(10)
    assert (told(run, sweep.live(1)).state, told(run, sweep.live(1)).nodes) == ("training", ("node1", "node2"))
    run.record("12_1", end=80.0, exit_code=75, asked="SIGUSR2", why="stopped", requeued="scontrol")
    assert told(run, sweep.live(1, "PENDING", raw_id="14")).state == "requeued"
    assert told(sweep.runs[0], sweep.live(1)).state == "lost"


def test_what_is_cancelled_before_it_starts_is_stopped_though_slurm_forgets_it(sweep: MadeSweep) -> None:
    run = sweep.runs[1]
    assert why(run.folder, []).kind == "lost"
    write_json(cancel_path(run.folder, "12_1"), {"time": "now", "by": "test"})
    assert told(run).state == "stopped"
    assert (why(run.folder, []).kind, why(run.folder, []).source) == ("cancelled", "")


def test_why_names_the_log_of_the_sweep(sweep: MadeSweep) -> None:
    assert f"{sweep.folder}/jobs/submitit/12_1_0_log.out" in why(sweep.runs[1].folder, []).advice
    plain = sweep.runs[0]
    plain.submitted("20", seconds=10)
    assert f"{plain.folder.jobs}/submitit/20_0_log.out" in why(plain.folder, []).advice


def test_the_runs_of_a_sweep_by_its_name(sweep: MadeSweep, tmp_path: Path) -> None:
    folders = [run.folder for run in sweep.runs]
    assert find_runs("made.sweep", tmp_path) == find_runs(str(sweep.folder), Path("runs")) == folders
    assert find_runs("made-1", tmp_path) == folders[1:]
    with pytest.raises(ConfigError, match=r"made\.sweep: is a sweep of 2 runs; name one of them: made-0, made-1"):
        find_run("made.sweep", tmp_path)


def test_of_a_sweep_those_that_wait_are_cancelled_first_each_by_its_own_name(
    sweep: MadeSweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next takes a place that becomes free. And scancel 12, the raw id of those that wait, would end all."""
    said = tmp_path / "said"
    scancel = tmp_path / "bin" / "scancel"
    scancel.parent.mkdir()
    scancel.write_text(f'#!/bin/sh\necho "$@" >> {said}\n')
    scancel.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scancel.parent}:{os.environ['PATH']}")
    live = [sweep.live(0), sweep.live(1, "PENDING")]
    done, errors = cancel.cancel_all([run.folder for run in sweep.runs], live, save=True)
    assert ([each.job for each in done], errors) == (["12_1", "12_0"], [])
    assert said.read_text().splitlines() == ["12_1", "--signal=USR2 12_0.0"]
    for number, run in enumerate(sweep.runs):
        assert cancel_path(run.folder, f"12_{number}").is_file()

    scancel.write_text('#!/bin/sh\nif [ "$1" = 12_1 ]; then echo already completed >&2; exit 1; fi\n')
    done, errors = cancel.cancel_all([run.folder for run in sweep.runs], live, save=False)
    assert [each.job for each in done] == ["12_0"]
    assert [str(error) for error in errors] == ["scancel 12_1: already completed"]


def test_an_element_goes_on_as_the_same_element_of_a_new_array(
    sweep: MadeSweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, programs = tmp_path / "said", tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text("#!/bin/sh\necho Requested operation is presently disabled >&2\nexit 1\n")
    (programs / "sbatch").write_text(f'#!/bin/sh\necho "$@" > {said}\necho 31\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    folder, run = sweep.folder / "jobs" / "submitit", sweep.runs[1]
    (folder / "12_submission.sh").write_text("script")
    (folder / "12_1_submitted.pkl").write_text("pickle")
    assert requeue("12_1", folder, wait=time.sleep) == "job 31_1"
    assert said.read_text().split() == [
        *("--parsable", "--dependency=afterany:12_1", "--array=1"),
        str(folder / "12_submission.sh"),
    ]
    assert (folder / "31_1_submitted.pkl").read_text() == "pickle"
    assert (folder / "31_submission.sh").read_text() == "script"  # for the next time

    note_again(run.folder, "12_1", "31_1")
    first, again = read_submitted(run.folder)
    assert (again.job, again.sweep, again.time_minutes) == ("31_1", first.sweep, first.time_minutes)
    assert jobs_of(run.folder, [sweep.live(1, job="31_1")])


@pytest.fixture
def planned(tmp_path: Path) -> PlannedRun:
    """A run of four steps an epoch, one epoch."""
    config = tmp_path / "trial.yaml"
    config.write_text("data: {source: synthetic, synthetic_images: 64}\ntrain: {epochs: 1, global_batch: 16}\n")
    return PlannedRun(load_config(config, ["name=made", "optim.warmup_epochs=0"]), MadeRun(tmp_path).folder, 1)


def test_a_run_is_done_at_the_last_step_that_its_config_asks_for(planned: PlannedRun, tmp_path: Path) -> None:
    run = MadeRun.__new__(MadeRun)
    run.folder = planned.folder
    assert not is_done(planned, [])
    run.submitted("7")
    run.record("7", end=90.0, exit_code=0, why="done", step_end=4)
    run.commit(4)
    assert is_done(planned, [])
    longer = planned.cfg.train.model_copy(update={"epochs": 2.0})
    assert not is_done(replace(planned, cfg=planned.cfg.model_copy(update={"train": longer})), [])
    unseen = planned.cfg.data.model_copy(update={"source": "packed", "root": str(tmp_path / "nowhere")})
    assert is_done(replace(planned, cfg=planned.cfg.model_copy(update={"data": unseen})), [])
    run.record("7", end=90.0, exit_code=75, why="stopped", step_end=2)
    assert not is_done(planned, [])


def test_the_folder_of_a_sweep_is_no_other_ones(planned: PlannedRun) -> None:
    made = Sweep("made", (planned,), 1)
    assert made.folder.root == planned.folder.root.parent / "made.sweep"
    assert made.submitit_folder == made.folder.root / "jobs" / "submitit"
