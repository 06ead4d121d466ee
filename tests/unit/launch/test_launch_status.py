"""What `status` says of runs in every state, from made run folders and what squeue would say."""

import json
import os
import time
from pathlib import Path

import pytest

from launch import history, logs, status
from launch.scheduler import LiveJob
from tests.unit.launch.made_runs import EPOCH_S, MadeRun
from tests.unit.launch.test_launch_command_line import launch


@pytest.fixture(autouse=True)
def silent_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM remembers no ended job."""
    monkeypatch.setattr(history, "ending", lambda job: None)


@pytest.fixture
def run(tmp_path: Path) -> MadeRun:
    return MadeRun(tmp_path)


def told(run: MadeRun, *live: LiveJob, seconds: float = 200.0) -> status.Status:
    return status.status_of(run.folder, live, now_s=EPOCH_S + seconds)


def test_a_job_in_the_queue(run: MadeRun) -> None:
    run.submitted("7")
    now = told(run, run.live("7", "PENDING", reason="Priority", start_s=EPOCH_S + 500))
    assert (now.state, now.job, now.why) == ("queued", "7", "other jobs come first (Priority)")
    assert now.start_expected_s == 300
    assert now.step is None


def test_a_running_job_with_time_left(run: MadeRun) -> None:
    run.submitted("7")
    run.record("7", step_start=100)
    run.numbers(300, throughput__images_per_s=640.0, time__step_s=0.1)
    run.commit(100)
    run.commit(250)
    (run.folder.checkpoints / "step_000000900").mkdir()  # no manifest: not committed
    now = told(run, run.live("7"))
    assert (now.state, now.step, now.total_steps, now.newest_commit) == ("training", 300, 1000, 250)
    assert now.eta_s == pytest.approx(700 * 64 / 640)
    assert (now.eta_jobs, now.queue_wait_s) == (0, 60)
    assert now.updated_s == 100


def test_jobs_to_come_and_their_waiting_count_in_what_is_left(run: MadeRun) -> None:
    """100 000 s of training, 3 500 s left in this job, 3 600 s a job, 60 s in the queue each time."""
    run.submitted("7")
    run.record("7")
    run.numbers(0, throughput__images_per_s=0.64)
    now = told(run, run.live("7"), seconds=100.0)
    jobs = 27  # (100 000 - 3 500) / 3 600, rounded up
    assert (now.eta_jobs, now.eta_s) == (jobs, pytest.approx(100_000 + jobs * 60))


def test_steps_and_silence_come_from_the_signs_of_life(run: MadeRun) -> None:
    run.submitted("7")
    run.record("7")
    run.numbers(100)
    run.beats("7", 0, rank0={"step": 140, "silent_s": 0.5})
    run.beats("7", 1, rank1={"step": 139, "silent_s": 22.0})
    now = told(run, run.live("7"))
    assert (now.step, now.slowest_rank, now.silent_s) == (139, 1, 22.0)
    assert "silent  rank 1 for 22 s" in "\n".join(status.details(now))


def test_a_requeued_job_says_after_what(run: MadeRun) -> None:
    run.submitted("7")
    run.record(
        "7", end=900.0, exit_code=75, why="time limit: saved step 300", ended_as="time_limit", requeued="scontrol"
    )
    now = told(run, run.live("7", "PENDING", reason="BeginTime"), seconds=905)
    assert now.state == "requeued"
    assert now.why == "waits (BeginTime) after: time limit: saved step 300"


def test_a_dependent_job_is_this_run_too(run: MadeRun) -> None:
    run.submitted("7")
    run.record("7", end=900.0, exit_code=75, why="stopped")
    now = told(run, run.live("8", "PENDING", dependency="afterany:7"), seconds=905)
    assert (now.state, now.job) == ("requeued", "8")


def test_the_next_attempt_is_starting_while_the_record_is_the_last_ones(run: MadeRun) -> None:
    run.submitted("7")
    run.record("7", end=900.0, exit_code=75, why="stopped")
    assert told(run, run.live("7", start_s=EPOCH_S + 950), seconds=955).state == "starting"
    run.record("7")  # its supervisor never said how it ended: the node was lost
    assert told(run, run.live("7", start_s=EPOCH_S + 950), seconds=955).state == "starting"


def test_a_job_is_starting_until_its_ranks_have_made_a_step(run: MadeRun) -> None:
    run.submitted("7")
    run.numbers(50, seconds=20.0)  # of the attempt before
    run.record("7")
    assert told(run, run.live("7")).state == "starting"
    run.beats("7", 0, rank0={"step": 50, "silent_s": 1.0, "phase": "start"})
    assert told(run, run.live("7")).state == "starting"
    run.beats("7", 0, rank0={"step": 51, "silent_s": 1.0, "phase": "step"})
    assert told(run, run.live("7")).state == "training"


def test_asked_to_stop(run: MadeRun) -> None:
    run.submitted("7")
    run.record("7", asked="SIGUSR2")
    assert told(run, run.live("7")).state == "stopping"


@pytest.mark.parametrize(("code", "state"), [(0, "done"), (75, "stopped"), (3, "failed"), (137, "failed")])
def test_an_ended_run(run: MadeRun, code: int, state: str) -> None:
    run.submitted("7")
    run.record("7", end=900.0, exit_code=code, why="as it was", ended_as="bad_data" if code == 3 else "")
    now = told(run)
    assert now.state == state
    assert now.eta_s is None


def test_a_supervisor_that_ended_without_a_word(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.submitted("7")
    run.record("7")
    assert told(run).state == "lost"
    monkeypatch.setattr(history, "ending", lambda job: history.Ending("NODE_FAIL", source="sacct"))
    now = told(run)
    assert (now.state, now.why) == ("failed", "node_failure: SLURM says NODE_FAIL")


def test_another_users_or_runs_job_is_not_ours(run: MadeRun, tmp_path: Path) -> None:
    other = MadeRun(tmp_path, "made2")  # a name that begins like ours
    run.submitted("7")
    assert told(run, other.live("9")).state == "lost"


def test_a_run_folder_under_another_name_is_the_same(run: MadeRun, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run.folder.root)
    run.submitted("7")
    linked = run.live("7", script=str(tmp_path / "link" / "jobs" / "submitit" / "x.sh"))
    assert told(run, linked).state == "starting"


def test_512_nodes_of_8_ranks_in_two_seconds(tmp_path: Path) -> None:
    """CPU time of status, why and the joined logs; the folder is made outside of it."""
    run = MadeRun(tmp_path)
    nodes = [f"node{n:04d}" for n in range(512)]
    run.submitted("7", nodes=512, ranks_per_node=8)
    run.record("7", nodes=nodes, ranks=4096)
    run.numbers(300, throughput__images_per_s=1e6)
    for node in range(512):
        if node:
            run.record("7", node_rank=node, host=nodes[node], nodes=nodes)
        run.beats("7", node, **{f"rank{8 * node + r}": {"step": 310, "silent_s": 0.1} for r in range(8)})
        for rank in range(8 * node, 8 * node + 8):
            run.log("7", rank, *(f"step {n}" for n in range(30)), start=60 + rank / 4096, ranks=4096)
    begin_s = time.process_time()
    now = told(run, run.live("7"))
    lines = logs.read_lines(run.folder, "7", logs.log_ranks(run.folder, "7"), last=100)
    spent_s = time.process_time() - begin_s
    assert (now.state, now.step, now.ranks) == ("training", 310, 4096)
    assert len(lines) == 100
    assert [line.time for line in lines] == sorted(line.time for line in lines)
    assert {line.text for line in lines} == {"step 29"}
    assert spent_s < 2.0


def test_the_command_and_its_json(run: MadeRun, tmp_path: Path) -> None:
    run.submitted("7", executor="local", host="elsewhere", pid=1)
    run.record("7", end=900.0, exit_code=0, why="done", step_end=1000)
    run.commit(1000)
    environ = {"PATH": os.environ["PATH"].split(":")[0]}
    shown = launch("status", "--runs-folder", tmp_path, **environ)
    assert shown.returncode == 0, shown.stderr
    head, row = shown.stdout.splitlines()
    assert head.split() == ["run", "state", "job", "step", "images/s", "left", "saved", "why"]
    assert row.split()[:3] == ["made", "done", "7"]
    (facts,) = json.loads(launch("status", run.folder.root, "--json", **environ).stdout)["runs"]
    assert (facts["state"], facts["newest_commit"], facts["total_steps"]) == ("done", 1000, 1000)
    wrong = launch("status", "mad", "--runs-folder", tmp_path, **environ)
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "error: mad: is no run folder and no run's name; did you mean made?\n",
    )
