"""Restarts inside a job: what is noticed, what is started again, when it ends. Real processes and real signals."""

import os
import re
import signal
import time
from datetime import datetime

import pytest

from tests.unit.launch.cases import Case, is_gone

RESTARTS = {"max_restarts": 3}


def seconds_between(first: str, second: str) -> float:
    return (datetime.fromisoformat(second) - datetime.fromisoformat(first)).total_seconds()


def headers(case: Case, rank: int) -> list[str]:
    return [line for line in case.log(rank).splitlines() if line.startswith("== job")]


def test_a_killed_rank_restarts_the_group(case: Case) -> None:
    plan = {"0": ["steps:5:sleep", "environ"], "1": ["steps:5:die:SIGKILL", "environ"]}
    process = case.start(plan, watch=RESTARTS)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    record = case.record()
    assert (record.exit_code, record.ended_as, record.restarts, record.why) == (0, "finished", 1, "done")
    first, second = record.rounds
    assert (first["ended_as"], first["failed_rank"], first["exit_code"]) == ("killed_rank", 1, 137)
    assert seconds_between(first["end"], second["start"]) < 5
    assert "restart 1: rank 1 was killed by SIGKILL" in out
    for rank in (0, 1):
        assert [" restart 1 " in line for line in headers(case, rank)] == [False, True]
        assert re.search(r'"II_DIST_ATTEMPT": "1"', case.log(rank))


def test_restarts_without_a_new_checkpoint_end_the_run(case: Case) -> None:
    process = case.start({"0": "steps:1:die:SIGKILL"}, watch=RESTARTS)
    process.communicate(timeout=30)
    assert process.returncode == 137
    record = case.record()
    assert len(headers(case, 0)) == 4
    assert (record.restarts, record.ended_as, record.failed_rank) == (3, "killed_rank", 0)
    assert record.why == "rank 0 was killed by SIGKILL; 3 restarts in a row brought no new checkpoint"


def test_restarts_with_new_checkpoints_go_on(case: Case) -> None:
    folder = case.folder.checkpoints
    starts = [f"steps:1:commit:{folder}:{10 * (i + 1)}:die:SIGKILL" for i in range(4)]
    process = case.start({"0": [*starts, "die:SIGKILL", "exit:0"]}, watch={"max_restarts": 2})
    process.communicate(timeout=40)
    assert process.returncode == 0
    record = case.record()
    assert (record.restarts, record.step_start, record.step_end) == (5, 0, 40)
    assert [(r["step_start"], r["step_end"]) for r in record.rounds] == [
        *((0, 10), (10, 20), (20, 30), (30, 40), (40, 40), (40, 40))
    ]


@pytest.mark.parametrize(
    ("behaviour", "code", "ended_as", "starts"),
    [
        ("exit:2", 2, "bad_config", 1),
        ("steps:3:error", 3, "bad_data", 1),
        ("exit:1", 1, "exception", 1),  # the same words would come again
        ("steps:3:exit:1", 1, "exception", 2),
    ],
)
def test_what_is_started_again(case: Case, behaviour: str, code: int, ended_as: str, starts: int) -> None:
    process = case.start({"0": behaviour}, watch={"max_restarts": 1})
    process.communicate(timeout=30)
    assert (process.returncode, case.record().ended_as, len(headers(case, 0))) == (code, ended_as, starts)


@pytest.mark.parametrize("how", ["gil", "stop", "read"])
def test_a_hang_is_noticed_named_and_ended(case: Case, how: str) -> None:
    """Rank 1 hangs, rank 0 waits for it: both fall silent."""
    plan = {"0": ["steps:6:hang:wait", "exit:0"], "1": [f"steps:6:hang:{how}", "exit:0"]}
    process = case.start(plan, watch={**RESTARTS, "hang_after_s": 1.0})
    process.communicate(timeout=30)
    assert process.returncode == 0
    (first, _) = case.record().rounds
    assert (first["ended_as"], first["failed_rank"]) == ("hang", 1)
    assert first["why"].startswith("rank 1 fell silent first (")
    assert ("stopped by a signal" in first["why"]) == (how == "stop")
    assert seconds_between(first["start"], first["end"]) < 10
    for rank in (0, 1):
        log = case.log(rank)
        assert "== hang: on this node rank 1 fell silent first" in log
        assert re.search(r'File ".*rank_program.py", line \d+ in hang', log)
        (pid,) = re.findall(r"hangs (\d+)", log)
        assert is_gone(int(pid))


def test_a_rank_that_never_gives_a_sign_is_a_hang(case: Case) -> None:
    process = case.start({"0": ["sleep", "exit:0"]}, watch={**RESTARTS, "start_timeout_s": 1.0, "hang_after_s": 0.5})
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert case.record().rounds[0]["ended_as"] == "hang"


def test_slow_steps_are_no_hang(case: Case) -> None:
    process = case.start({"0": "steps:150:exit:0"}, watch={**RESTARTS, "hang_after_s": 0.4})
    process.communicate(timeout=30)
    assert (process.returncode, case.record().restarts) == (0, 0)


def test_a_failure_after_a_stop_request_is_not_restarted(case: Case) -> None:
    process = case.start({"0": "deaf", "1": "polite"}, watch=RESTARTS, grace_s=1.0)
    pids = case.ready(0, 1)
    process.send_signal(signal.SIGUSR2)
    time.sleep(0.3)
    os.kill(pids[0], signal.SIGKILL)
    process.communicate(timeout=30)
    assert case.record().restarts == 0
    assert case.record().asked == "SIGUSR2"


def test_lines_of_ranks_have_time_and_rank(case: Case) -> None:
    case.start({"0": "exit:0", "1": "exit:0"}).communicate(timeout=30)
    raw = case.folder.rank_log(case.job, 1).read_text().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z 1\| 1 leaves with 0", raw[1])
