"""A run under the supervisor on two real ranks: killed, hung, stopped. The oracle is the uninterrupted run."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from ii_dist.config import RunFolder
from launch.output import without_stamps
from launch.records import JobRecord, newest_step, read_record
from tests.fault_table import note
from tests.ranks.test_train import CONFIG, curve, weights
from tests.unit.launch.cases import ROOT, wait_until
from tools._run_facts import read_facts

pytestmark = pytest.mark.ranks

EPOCHS = 5
STEPS = 10 * EPOCHS
SAVE_EVERY = 4
HANG_S = 8.0
RANDOM_STOPS = int(os.environ.get("II_DIST_RANDOM_STOPS", "0"))


class Run:
    """One run of `python -m launch submit` on this machine."""

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name = root, name
        self.config = root / "run.yaml"
        self.config.write_text(CONFIG + f"runs_folder: {root}/runs\n")
        self.folder = RunFolder(root / "runs" / name)
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        before = set(self.folder.jobs.glob("local-*.json"))
        more = [
            f"name={self.name}",
            f"train.epochs={EPOCHS}",
            "launch.ranks_per_node=2",
            f"launch.hang_after_s={HANG_S}",
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launch", "submit", str(self.config), *more],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        (self.record_path,) = wait_until(lambda: set(self.folder.jobs.glob("local-*.json")) - before)

    def record(self) -> JobRecord:
        record = read_record(self.record_path)
        assert record is not None
        return record

    def log(self) -> str:
        path = self.folder.rank_log(self.record_path.stem, 0)
        return without_stamps(path.read_bytes()).decode() if path.exists() else ""

    def last_step(self) -> int:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return max(curve(self.config, self.name))
        return 0

    def came_to(self, step: int, starts: int) -> float:
        """Wait until the run has made `step` in its `starts`-th start of the ranks; when that was seen."""
        wait_until(lambda: self.log().count("== job") >= starts and self.last_step() >= step, 120)
        return time.monotonic()

    def rank_pid(self, rank: int) -> int:
        supervisor = self.record().supervisor_pid
        for child in Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split():
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
        raise AssertionError(f"no rank {rank} under {supervisor}")

    def ended(self) -> int:
        assert self.process is not None
        print(self.process.communicate(timeout=240)[0])
        return self.process.returncode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("whole"), "whole")
    run.start()
    assert run.ended() == 0
    return run


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path, "run")
    yield run
    if run.process is not None and run.process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(run.record().supervisor_pid, signal.SIGKILL)
        run.process.kill()
        run.process.communicate()


def resumed_after(run: Run) -> int:
    return int(re.findall(r"resuming after step (\d+)", run.log())[-1])


def same_as(run: Run, whole: Run) -> None:
    assert curve(run.config, run.name) == curve(whole.config, whole.name)
    assert weights(run.config, run.name, STEPS) == weights(whole.config, whole.name, STEPS)


def test_killed_hung_and_stopped_it_is_the_same_run(run: Run, uninterrupted: Run) -> None:
    run.start()
    run.came_to(9, starts=1)
    os.kill(run.rank_pid(1), signal.SIGKILL)
    killed_s, before = time.monotonic(), run.last_step()
    wait_until(lambda: run.record().restarts == 1)
    noticed_s = time.monotonic() - killed_s
    wait_until(lambda: "resuming after step" in run.log(), 60)
    lost = before - resumed_after(run)
    again_s = run.came_to(before + 1, starts=2) - killed_s
    note("kill -9 of a rank", noticed_s, again_s, lost, "restart <= 20 s, at most one save interval lost")
    assert lost <= SAVE_EVERY + 1

    run.came_to(24, starts=2)
    os.kill(run.rank_pid(0), signal.SIGSTOP)
    stopped_s, before = time.monotonic(), run.last_step()
    wait_until(lambda: run.record().restarts == 2)
    noticed_s = time.monotonic() - stopped_s
    wait_until(lambda: run.log().count("resuming after step") == 2, 60)
    lost = before - resumed_after(run)
    again_s = run.came_to(before + 1, starts=3) - stopped_s
    note(f"SIGSTOP of a rank (hang_after_s {HANG_S:.0f})", noticed_s, again_s, lost, "noticed <= 30 s")
    hang = run.record().rounds[1]
    assert (hang["ended_as"], hang["failed_rank"]) == ("hang", 0)
    for rank in (0, 1):  # stacks of both, down to our loop
        text = run.folder.rank_log(run.record_path.stem, rank).read_text()
        assert re.search(r'loop\.py", line \d+ in fit', text)

    run.came_to(36, starts=3)
    os.kill(run.record().supervisor_pid, signal.SIGUSR2)
    assert run.ended() == 75
    lost = run.last_step() - newest_step(run.folder)
    note("SIGUSR2", None, None, lost, "0 steps lost")
    assert lost == 0
    record = run.record()
    assert (record.restarts, record.barren_restarts, record.step_end) == (2, 0, newest_step(run.folder))
    begin, end = (datetime.fromisoformat(text) for text in (record.start, record.end or ""))
    assert end > begin

    run.start()
    assert run.ended() == 0
    same_as(run, uninterrupted)
    goodput_is_accounted_for(run)


def goodput_is_accounted_for(run: Run) -> None:
    """Of the chain above: what was allocated adds up, and next to nothing of it is without a name."""
    found = read_facts(run.folder.root).goodput
    assert found is not None
    records = [read_record(path) for path in run.folder.jobs.glob("local-*.json")]
    spans = [datetime.fromisoformat(r.end or "") - datetime.fromisoformat(r.start) for r in records if r is not None]
    assert found.allocated == pytest.approx(2 * sum(span.total_seconds() for span in spans))
    assert sum(found.parts.values()) == pytest.approx(found.allocated)
    assert found.failures == 2
    for part in ("training", "evaluation", "saves", "start-up", "restarts", "lost steps", "hang", "shut-down"):
        assert found.parts[part] > 0, part
    assert found.share_of("other") < 0.05


@pytest.mark.skipif(not RANDOM_STOPS, reason="only for the table: II_DIST_RANDOM_STOPS=20 (make fault-table)")
def test_stops_at_random_moments_lose_no_step(tmp_path: Path, uninterrupted: Run) -> None:
    """Also before the first step, in an evaluation and during a save: the moments are random."""
    moments, stops, runs = random.Random(0), 0, 0
    while stops < RANDOM_STOPS:
        run = Run(tmp_path, f"run-{runs}")
        runs += 1
        while True:
            newest = newest_step(run.folder)
            run.start()
            time.sleep(moments.uniform(0.0, 1.0))
            if moments.random() < 0.8:
                run.came_to(min(STEPS - 2, newest + 1), starts=1)
                time.sleep(moments.uniform(0.0, 0.2))
            os.kill(run.record().supervisor_pid, signal.SIGUSR2)
            code = run.ended()
            assert code in (0, 75)
            assert run.last_step() == newest_step(run.folder)
            if code == 0:
                break
            stops += 1
        same_as(run, uninterrupted)
    note(f"SIGUSR2 at {stops} random moments of {runs} runs", None, None, 0, "0 steps lost")
