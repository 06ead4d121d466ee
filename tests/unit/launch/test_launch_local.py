"""A run on this machine through Submitit's local executor, over stand-in ranks."""

import os
import shlex
import signal
import stat
import subprocess
import sys
import time

from ii_dist.config import RunFolder
from tests.unit.launch.cases import ROOT, Case, is_gone, wait_until


def test_follows_rank_0_and_ends_with_the_run(case: Case) -> None:
    process = case.start({"0": "exit:0", "1": "exit:0"}, how="submit")
    out, err = process.communicate(timeout=40)
    assert process.returncode == 0, err
    assert "0 leaves with 0" in out
    assert "1 leaves with 0" not in out


def test_ends_with_the_code_of_the_failing_rank_and_shows_its_words(case: Case) -> None:
    process = case.start({"0": "sleep", "1": "exit:4"}, how="submit")
    _, err = process.communicate(timeout=40)
    assert process.returncode == 4
    assert "1 leaves with 4" in err
    assert "error: rank 1 ended with exit code 4" in err.splitlines()[-1]


def test_ctrl_c_at_the_terminal_stops_the_run_once(case: Case) -> None:
    process = case.start({"0": "polite", "1": "polite"}, how="submit")
    case.ready(0, 1)
    assert os.getpgid(case.record().supervisor_pid) != process.pid
    os.killpg(process.pid, signal.SIGINT)  # a terminal signals the whole foreground group
    out, err = process.communicate(timeout=40)
    assert process.returncode == 75, err
    assert "0 asked by SIGUSR2" in out
    assert case.log(1).splitlines()[-1] == "1 asked by SIGUSR2"
    assert "goes on from the newest checkpoint" in err


def test_a_second_ctrl_c_ends_the_run_at_once(case: Case) -> None:
    process = case.start({"0": "deaf"}, how="submit")
    (pid,) = case.ready(0)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1.8)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert is_gone(pid)


def test_a_killed_supervisor_is_told_in_one_line(case: Case) -> None:
    process = case.start({"0": "sleep"}, how="submit")
    (pid,) = case.ready(0)
    os.kill(case.record().supervisor_pid, signal.SIGKILL)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 5
    assert err.startswith(f"error: job {case.job} ended without a word of its supervisor")
    wait_until(lambda: is_gone(pid), 5)


def test_without_following_the_job_lives_on(case: Case) -> None:
    process = case.start({"0": "polite"}, how="background")
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    case.ready(0)
    stop = shlex.split(out.rsplit("stop:  python ", 1)[1])  # the printed line
    subprocess.run([sys.executable, *stop], cwd=ROOT, check=True, capture_output=True, timeout=30)
    wait_until(lambda: case.record().exit_code == 75)


def test_what_submitit_writes_is_private(case: Case) -> None:
    case.start({"0": "exit:0"}, how="submit", umask=0o022).communicate(timeout=40)
    folder = RunFolder(case.folder.root).jobs / "submitit"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    written = sorted(folder.glob("*_submitted.pkl"))
    assert written
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in written)
    assert stat.S_IMODE(case.folder.rank_log(case.job, 0).stat().st_mode) == 0o644  # the submitter's own choice
