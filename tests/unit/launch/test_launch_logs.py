"""`logs`: one rank or all by time, by attempt, followed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ii_dist.config import ConfigError
from launch import logs
from tests.unit.launch.cases import ROOT, Case, wait_until
from tests.unit.launch.made_runs import MadeRun
from tests.unit.launch.test_launch_command_line import launch


@pytest.fixture
def run(tmp_path: Path) -> MadeRun:
    run = MadeRun(tmp_path)
    run.log("7", 0, "a0", "b0", start=60)
    run.log("7", 0, "c0", "d0", attempt=1, start=100)
    run.log("7", 1, "a1", "b1", start=60.5)
    run.log("7", 1, "c1", "  detail", attempt=1, start=100.5)
    return run


def texts(lines: list[logs.Line]) -> list[str]:
    return [line.text for line in lines if not line.text.startswith("== job")]


def test_the_newest_attempt_of_one_rank(run: MadeRun) -> None:
    lines = logs.read_lines(run.folder, "7", [1], last=50)
    assert texts(lines) == ["c1", "  detail"]
    assert {line.attempt for line in lines} == {1}


def test_an_earlier_attempt(run: MadeRun) -> None:
    assert texts(logs.read_lines(run.folder, "7", [0], attempt=0)) == ["a0", "b0"]
    assert texts(logs.read_lines(run.folder, "7", [0], attempt=5)) == []


def test_ranks_are_joined_in_the_order_of_time(run: MadeRun) -> None:
    assert texts(logs.read_lines(run.folder, "7", [0, 1])) == ["c0", "c1", "d0", "  detail"]
    assert texts(logs.read_lines(run.folder, "7", [0, 1], last=2)) == ["d0", "  detail"]


def test_lines_without_a_time_stay_behind_the_line_before_them(tmp_path: Path) -> None:
    lines = logs.parse_log("bare\n2026-11-23T10:00:00.000Z 3| timed\nstack\n", 3)
    assert [(line.time, line.text) for line in lines] == [
        ("", "bare"),
        ("2026-11-23T10:00:00.000", "timed"),
        ("2026-11-23T10:00:00.000", "stack"),
    ]


def test_only_the_end_of_a_long_log_is_read(run: MadeRun) -> None:
    run.log("8", 0, *(f"line {n:06d} {'x' * 100}" for n in range(5000)))
    lines = logs.read_lines(run.folder, "8", [0], last=3)
    assert [line.text[:11] for line in lines] == ["line 004997", "line 004998", "line 004999"]


@pytest.mark.parametrize(("text", "ranks"), [("all", [0, 1, 2, 3]), ("2", [2]), ("0,2-3", [0, 2, 3])])
def test_ranks_are_named(text: str, ranks: list[int]) -> None:
    assert logs.parse_ranks(text, [0, 1, 2, 3]) == ranks


@pytest.mark.parametrize("text", ["4", "0-4", "x", "-1", "", "1;id"])
def test_ranks_that_are_not_there(text: str) -> None:
    with pytest.raises(ConfigError, match="--rank"):
        logs.parse_ranks(text, [0, 1, 2, 3])


def test_the_command_and_its_json(run: MadeRun) -> None:
    shown = launch("logs", run.folder.root, "--rank", "all", "--lines", "2").stdout.splitlines()
    assert [line.split() for line in shown] == [
        ["08:01:42.000", "rank", "0", "d0"],
        ["08:01:42.500", "rank", "1", "detail"],
    ]
    (line,) = launch("logs", run.folder.root, "--lines", "1", "--json").stdout.splitlines()
    assert json.loads(line) == {"time": "2027-01-15T08:01:42.000", "rank": 0, "text": "d0", "attempt": 1}
    wrong = launch("logs", run.folder.root, "--job", "9")
    assert (wrong.returncode, "there are: 7" in wrong.stderr) == (2, True)


def test_following_a_run_until_it_ends(case: Case) -> None:
    mark = case.root / "go"
    case.start({"0": f"after:{mark}:exit:0", "1": f"after:{mark}:exit:0"}, how="background")
    wait_until(lambda: "== job" in case.log(0))
    view = subprocess.Popen(
        [sys.executable, "-m", "launch", "logs", str(case.folder.root), "--follow", "--rank", "all"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert view.stdout is not None
        assert "== job" in view.stdout.readline()
        mark.touch()
        shown, _ = view.communicate(timeout=40)
    finally:
        view.send_signal(signal.SIGKILL)
    assert "0 leaves with 0" in shown
    assert "1 leaves with 0" in shown
    assert view.returncode == 0
