"""One job a run folder: the second submission is refused and names the first, a dead owner is in nobody's way."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ii_dist.config import ClusterError, RunFolder
from launch import cancel, why
from launch.owner import one_submission, require_free
from launch.processes import started_ticks
from launch.submitted import note_submitted, read_submitted
from tests.fault_table import note
from tests.unit.launch.cases import Case, is_gone, wait_until
from tests.unit.launch.made_runs import MadeRun


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def test_a_live_slurm_job_is_named(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    with pytest.raises(ClusterError, match=r"has job 7 \(pending, submitted 2027-01-15T08:00:00.*launch cancel"):
        require_free(run.folder, [run.live("7", "PENDING")])
    require_free(run.folder, [MadeRun(tmp_path, "other").live("8")])


def test_a_live_local_job_is_named_until_it_is_dead(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    run = MadeRun(tmp_path)
    note_submitted(run.folder, "local-1", "local", sleeper.pid, nodes=1, ranks_per_node=1)
    with pytest.raises(ClusterError, match=rf"has job local-1 on .*, pid {sleeper.pid}, since"):
        require_free(run.folder, [])
    sleeper.kill()
    sleeper.wait()
    require_free(run.folder, [])


def test_another_process_with_the_same_number_is_not_the_owner(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    run = MadeRun(tmp_path)
    run.submitted("local-1", executor="local", host=os.uname().nodename, pid=sleeper.pid, pid_ticks=1)
    require_free(run.folder, [])


def lease(folder: RunFolder, pid: int, **facts: object) -> None:
    owner = {
        "host": os.uname().nodename,
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "pid_namespace": str(Path("/proc/self/ns/pid").readlink()),
        "pid": pid,
        "started_ticks": started_ticks(pid),
        "job": "torchrun-1",
        "attempt": 0,
        "since": "2027-01-15T08:00:00+00:00",
        "fence": 3,
        "token": "0",
        "released": False,
    }
    folder.lease.write_text(json.dumps(owner | facts))


def test_a_process_that_trains_without_launch_is_named(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    run = MadeRun(tmp_path)
    lease(run.folder, sleeper.pid)
    with pytest.raises(ClusterError, match=rf"in use by job torchrun-1 on host .*, pid {sleeper.pid}, since 2027"):
        require_free(run.folder, [])
    lease(run.folder, sleeper.pid, released=True)
    require_free(run.folder, [])
    lease(run.folder, sleeper.pid, started_ticks=1)  # dead, its number taken by another
    require_free(run.folder, [])


def test_an_owner_on_another_machine_lives_as_long_as_its_heart_beats(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    lease(run.folder, 1, host="far-away")
    require_free(run.folder, [])
    beat = run.folder.root / ".heartbeat_fence_000003"
    beat.touch()
    with pytest.raises(ClusterError, match="far-away"):
        require_free(run.folder, [])
    os.utime(beat, (time.time() - 61, time.time() - 61))
    require_free(run.folder, [])


def test_the_last_sign_of_life_of_a_job_that_slurm_has_ended(tmp_path: Path) -> None:
    """A node's rank was killed: nobody gave the lease back, and it is fresh for a minute."""
    run = MadeRun(tmp_path)
    run.submitted("7")
    run.record("7", end=900.0, exit_code=137, failed_rank=0, why="rank 0 was killed by SIGKILL")
    lease(run.folder, 1, host="far-away", job="7")
    (run.folder.root / ".heartbeat_fence_000003").touch()
    with pytest.raises(ClusterError, match=r"job 7 has ended, but far-away gave a sign of life .* submit again"):
        require_free(run.folder, [])
    assert why.why(run.folder, []).kind == "killed_rank"
    assert cancel.cancel(run.folder, [], save=True) == []
    assert why.why(run.folder, None).kind == "running"  # SLURM does not answer: the lease is all there is


def test_a_silent_squeue_refuses_while_the_last_job_may_still_wait(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    require_free(run.folder, None)  # nothing was ever submitted
    run.submitted("7")
    with pytest.raises(ClusterError, match="squeue does not answer, so job 7"):
        require_free(run.folder, None)
    run.record("7", end=900.0, exit_code=0)
    require_free(run.folder, None)


def test_of_two_submissions_at_the_same_moment_one_wins(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    """20 races of the sequence that a submission goes through; threads, for a file lock is one of open files."""
    for race in range(20):
        run = MadeRun(tmp_path, f"race-{race}")
        ready, outcomes = threading.Barrier(2), []

        def submit(
            name: str, run: MadeRun = run, ready: threading.Barrier = ready, outcomes: list[str] = outcomes
        ) -> None:
            ready.wait()
            try:
                with one_submission(run.folder):
                    require_free(run.folder, [])
                    note_submitted(run.folder, name, "local", sleeper.pid, nodes=1, ranks_per_node=1)
                outcomes.append(f"{name} won")
            except ClusterError as error:
                outcomes.append(str(error))

        threads = [threading.Thread(target=submit, args=(name,)) for name in ("job-a", "job-b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (entry,) = read_submitted(run.folder)
        lost = next(outcome for outcome in outcomes if not outcome.endswith("won"))
        assert f"has job {entry.job}" in lost
    note("two submissions at the same moment, 20 races", None, None, None, "0 mixed: one has the folder, one is told")


def test_a_submission_that_hangs_does_not_hold_the_next_for_ever(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    begin_s = time.monotonic()
    with (
        one_submission(run.folder),
        pytest.raises(ClusterError, match="another submission is under way"),
        one_submission(run.folder),
    ):
        pass
    assert time.monotonic() - begin_s < 5


@pytest.mark.parametrize("save", [True, False])
def test_cancelling_a_local_run(case: Case, save: bool) -> None:
    case.start({"0": "polite" if save else "deaf", "1": "polite"}, how="background")
    pids = case.ready(0, 1)
    (done,) = cancel.cancel(case.folder, None, save)
    assert done == cancel.Cancelled(case.job, "asked to save and leave" if save else "ended")
    note = json.loads((case.folder.jobs / case.job / "cancel.json").read_text())
    assert set(note) == {"time", "by"}
    wait_until(lambda: all(map(is_gone, pids)))
    record = wait_until(lambda: case.record().end and case.record())
    assert record.exit_code == (75 if save else 128 + signal.SIGTERM)
    wait_until(lambda: cancel.cancel(case.folder, None, save) == [])


def test_the_second_submission_of_a_local_run_is_refused_in_time(case: Case) -> None:
    case.start({"0": "sleep"}, how="background")
    case.ready(0)
    begin_s = time.monotonic()
    with pytest.raises(ClusterError, match=f"has job {case.job} on"):
        require_free(case.folder, None)
    assert time.monotonic() - begin_s < 5
