"""`why` names the cause: from records, from SLURM's word, or from logs alone."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from launch import history, why
from launch.scheduler import Ending
from tests.unit.launch.made_runs import MadeRun
from tests.unit.launch.test_launch_command_line import launch

TRACEBACK = ("Traceback (most recent call last):", '  File "x.py", line 1, in f', "ValueError: images have 4 channels")
LOST_PEER = ("Traceback (most recent call last):", "RuntimeError: Connection closed by peer [127.0.0.1]:2222")


@pytest.fixture
def run(tmp_path: Path) -> MadeRun:
    run = MadeRun(tmp_path)
    run.submitted("7")
    return run


@pytest.fixture(autouse=True)
def slurm_says(monkeypatch: pytest.MonkeyPatch) -> dict[str, Ending]:
    """What SLURM remembers of ended jobs: nothing unless a test says so."""
    said: dict[str, Ending] = {}
    monkeypatch.setattr(history, "ending", said.get)
    return said


def cause(run: MadeRun, *live: Any) -> why.Cause:
    return why.why(run.folder, live)


@pytest.mark.parametrize(
    ("kind", "facts"),
    [
        ("time_limit", {"exit_code": 75, "why": "the time limit came: saved step 9"}),
        ("preempted", {"exit_code": 75, "why": "preempted: saved step 9"}),
        ("node_failure", {"exit_code": 1, "why": "node2 was lost"}),
        ("out_of_memory", {"exit_code": 137, "failed_rank": 1, "why": "rank 1 was killed for its memory"}),
        ("killed_rank", {"exit_code": 137, "failed_rank": 1, "why": "rank 1 was killed by SIGKILL"}),
        ("hang", {"exit_code": 1, "failed_rank": 1, "why": "rank 1 fell silent first (31 s ago, step 9, data)"}),
        ("nan", {"exit_code": 2, "failed_rank": 0, "why": "rank 0: step 9: 10 updates in a row were left out"}),
        ("disk_full", {"exit_code": 4, "failed_rank": 0, "why": "rank 0: no space left"}),
        ("bad_data", {"exit_code": 3, "failed_rank": 1, "why": "rank 1: epoch 0: 5 images could not be read"}),
        ("exception", {"exit_code": 1, "failed_rank": 1, "why": "rank 1 ended with exit code 1"}),
        ("stopped", {"exit_code": 75, "why": "stopped as asked"}),
        ("finished", {"exit_code": 0, "why": "done"}),
    ],
)
def test_the_supervisors_class_is_what_counts(run: MadeRun, kind: str, facts: dict[str, Any]) -> None:
    run.record("7", end=900.0, ended_as=kind, failed_host="node2", **facts)
    run.log("7", 1, "a line of rank 1")
    found = cause(run)
    assert (found.kind, found.source, found.job, found.attempt) == (kind, "supervisor", "7", 0)
    assert facts["why"] in found.says
    assert found.rank == facts.get("failed_rank")
    assert found.advice == why.ADVICE[kind]
    if found.rank == 1:
        assert found.evidence[-1] == "a line of rank 1"


def test_the_last_words_of_the_first_failing_rank_are_shown(run: MadeRun) -> None:
    run.record(
        "7", end=900.0, exit_code=1, ended_as="exception", failed_rank=1, why="rank 1 failed", last_line=TRACEBACK[2]
    )
    run.log("7", 1, "an older attempt", attempt=0)
    run.log("7", 1, *TRACEBACK, attempt=1)
    found = cause(run)
    assert found.says == "rank 1 failed: ValueError: images have 4 channels"
    assert found.evidence[1:] == TRACEBACK
    assert "an older attempt" not in found.evidence


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("OSError: [Errno 28] No space left on device: 'x'", "disk_full"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "out_of_memory"),
        ("error: step 9: 10 updates in a row were left out for a non-finite loss or gradient", "nan"),
        ("Timeout (0:30:01)!", "hang"),
        (TRACEBACK[2], "exception"),
    ],
)
def test_without_a_word_of_supervisor_or_slurm_the_logs_tell(run: MadeRun, text: str, kind: str) -> None:
    run.record("7")  # it never came to write an end
    run.log("7", 0, *LOST_PEER)  # an echo of rank 1's end, and of a lower rank
    run.log("7", 1, "step 9", text)
    found = cause(run)
    assert (found.kind, found.rank, found.source) == (kind, 1, "logs")
    assert text in found.evidence


def test_of_two_failing_ranks_the_first_in_time_is_named(run: MadeRun) -> None:
    run.record("7")
    run.log("7", 0, "waits", "waits", "ValueError: later")
    run.log("7", 1, "ValueError: sooner")
    assert cause(run).rank == 1


def test_an_echo_is_better_than_nothing(run: MadeRun) -> None:
    run.record("7")
    run.log("7", 0, *LOST_PEER)
    found = cause(run)
    assert (found.kind, found.rank) == ("exception", 0)


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("TIMEOUT", "time_limit"),
        ("PREEMPTED", "preempted"),
        ("NODE_FAIL", "node_failure"),
        ("OUT_OF_MEMORY", "out_of_memory"),
        ("CANCELLED", "cancelled"),
        ("COMPLETED", "lost"),
    ],
)
def test_slurms_word_counts_where_the_supervisor_has_none(
    run: MadeRun, slurm_says: dict[str, Ending], state: str, kind: str
) -> None:
    run.record("7")
    run.log("7", 0, "step 9")
    slurm_says["7"] = Ending(state, source="sacct")
    found = cause(run)
    assert (found.kind, found.source) == (kind, "slurm")
    assert state in found.says


def test_a_job_that_ended_before_its_supervisor(run: MadeRun, slurm_says: dict[str, Ending]) -> None:
    slurm_says["7"] = Ending("CANCELLED", source="scontrol")
    assert cause(run).kind == "cancelled"
    slurm_says["7"] = Ending("FAILED", source="scontrol")
    assert cause(run).kind == "launch"


def test_the_failure_on_another_node_is_found(run: MadeRun) -> None:
    """Records of a version that classified nothing: node 0 saw only that its ranks had to end."""
    run.record("7", end=905.0, exit_code=75, why="stopped as asked")
    assert cause(run).kind == "stopped"
    run.record("7", end=905.0, exit_code=143, why="ended from outside")
    run.record("7", end=900.0, node_rank=1, host="node2", exit_code=3, failed_rank=1, why="rank 1: x.index: no index")
    found = cause(run)
    assert (found.kind, found.rank, found.host) == ("bad_data", 1, "node2")


def test_a_run_that_goes_on_needs_nothing(run: MadeRun) -> None:
    run.record("7", end=900.0, exit_code=75, ended_as="preempted", why="preempted: saved step 9")
    found = cause(run, run.live("7", "PENDING", reason="BeginTime"))
    assert (found.kind, found.advice) == ("preempted", "nothing: it goes on by itself")
    assert "SLURM starts a requeued job after a moment" in found.says


def test_a_lost_node_while_the_job_waits_again(run: MadeRun) -> None:
    run.record("7")
    assert cause(run, run.live("7", "PENDING", reason="BeginTime")).kind == "node_failure"
    run.record("7", asked="SIGTERM")
    assert cause(run, run.live("7", "PENDING", reason="BeginTime")).kind == "preempted"


def test_attempts_before_are_listed_newest_first(run: MadeRun) -> None:
    first = run.record("7", end=900.0, exit_code=75, why="preempted", step_start=0, step_end=9)
    second = run.record(
        "7", start=1000.0, end=1900.0, attempt=1, exit_code=75, why="time limit", step_start=9, step_end=30
    )
    run.record("7", start=2000.0, end=2900.0, attempt=2, exit_code=0, ended_as="finished", earlier=[first, second])
    assert cause(run).earlier == (
        "job 7 attempt 1: time limit, step 9 to 30",
        "job 7 attempt 0: preempted, step 0 to 9",
    )


def test_queued_running_and_new(run: MadeRun, tmp_path: Path) -> None:
    assert cause(run, run.live("7", "PENDING", reason="Resources")).kind == "queued"
    run.record("7")
    assert cause(run, run.live("7")).kind == "running"
    assert cause(MadeRun(tmp_path, "new")).kind == "never"


def test_foreign_and_torn_files_do_no_harm(run: MadeRun) -> None:
    (run.folder.jobs / "8.json").write_text('{"job": "8", "att')
    (run.folder.jobs / "9.json").write_text("[]")
    run.folder.submitted.write_text(run.folder.submitted.read_text() + '{"job": 3')
    run.folder.lease.write_text("{}")
    run.numbers(3)
    run.record("7", end=900.0, exit_code=0, of_another_version=3)
    assert cause(run).kind == "finished"


def test_the_command_and_its_json(run: MadeRun) -> None:
    run.record("7", end=900.0, exit_code=3, ended_as="bad_data", failed_rank=1, why="rank 1: bad")
    run.log("7", 1, "error: bad")
    environ = {"PATH": os.environ["PATH"].split(":")[0]}
    shown = launch("why", run.folder.root, **environ).stdout.splitlines()
    assert shown[0] == "bad_data: rank 1: bad (job 7, attempt 0)"
    assert "  | error: bad" in shown
    facts = json.loads(launch("why", run.folder.root, "--json", **environ).stdout)
    assert (facts["kind"], facts["rank"]) == ("bad_data", 1)
