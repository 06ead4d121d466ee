"""Two supervisors of one job, both on this machine: they start, end and restart their ranks together.

SLURM's variables are set by hand, and `scontrol` is a program that names this machine twice; tests/slurm has the real
one.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ii_dist.config import ClusterError, RunFolder
from launch import bus as buses
from launch.records import JobRecord, read_record
from launch.rendezvous import bus_ports
from tests.unit.launch.cases import HERE, ROOT, is_gone, wait_until

SECRET = "known to this submission"


class TwoNodes:
    """A job of two nodes x one stand-in rank."""

    def __init__(self, root: Path, job: int) -> None:
        self.root, self.job = root, str(job)
        self.folder = RunFolder(root / "run")
        self.folder.root.mkdir()
        programs = root / "bin"
        programs.mkdir()
        scontrol = programs / "scontrol"
        scontrol.write_text('#!/bin/sh\n[ "$2" = hostnames ] || exit 1\necho localhost\necho 127.0.0.1\n')
        scontrol.chmod(0o755)
        self.path = f"{programs}:{os.environ['PATH']}"
        self.nodes: list[subprocess.Popen[str]] = []

    def start(self, plan: dict[str, Any], attempt: int = 0, **watch: Any) -> None:
        fields = {
            "run_folder": str(self.folder.root),
            "executor": "slurm",
            "nodes": 2,
            "ranks_per_node": 1,
            "command": (sys.executable, str(HERE / "rank_program.py"), json.dumps(plan)),
            "watch": {"hang_after_s": 30.0, "requeue": False, **watch},
            "secret": SECRET,
            "grace_s": 1.0,
        }
        for node in (0, 1):
            env = {
                **os.environ,
                "PATH": self.path,
                "PYTHONPATH": str(ROOT),
                "SLURM_JOB_ID": self.job,
                "SLURM_RESTART_COUNT": str(attempt),
                "SLURM_STEP_NODELIST": "node[0-1]",
                "SLURM_NODEID": str(node),
                "SLURM_NNODES": "2",
                "SLURM_JOB_END_TIME": str(int(time.time()) + 86400),
            }
            self.nodes.append(
                subprocess.Popen(
                    [sys.executable, str(HERE / "job_program.py"), "call", json.dumps(fields)],
                    cwd=ROOT,
                    env=env,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            )

    def log(self, rank: int) -> str:
        path = self.folder.rank_log(self.job, rank)
        return path.read_text() if path.exists() else ""

    def ended(self) -> tuple[list[int], JobRecord]:
        for node in self.nodes:
            print(node.communicate(timeout=60)[0])  # shown when the test fails
        record = read_record(self.folder.job(self.job))
        assert record is not None
        return [node.returncode for node in self.nodes], record


@pytest.fixture
def two(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    case = TwoNodes(tmp_path, os.getpid() * 10 + len(request.node.name) % 10)
    yield case
    for node in case.nodes:
        if node.poll() is None:
            os.killpg(node.pid, signal.SIGKILL)
        node.communicate()


def test_both_nodes_restart_together_after_one_lost_a_rank(two: TwoNodes) -> None:
    two.start({"0": ["steps:3:sleep", "environ"], "1": ["steps:9:die:SIGKILL", "environ"]})
    codes, record = two.ended()
    assert (codes, record.exit_code, record.restarts) == ([0, 0], 0, 1)
    assert (record.rounds[0]["failed_rank"], record.rounds[0]["failed_host"]) == (1, "127.0.0.1")
    ports = [json.loads(two.log(rank).splitlines()[-1].partition("{")[2].join("{ "))["environ"] for rank in (0, 1)]
    assert ports[0]["MASTER_PORT"] == ports[1]["MASTER_PORT"]
    assert [env["II_DIST_ATTEMPT"] for env in ports] == ["1", "1"]
    assert not is_gone(os.getpid())


def test_the_first_silent_rank_of_all_nodes_is_named(two: TwoNodes) -> None:
    two.start({"0": ["steps:6:hang:wait", "exit:0"], "1": ["steps:6:hang:gil", "exit:0"]}, hang_after_s=1.0)
    codes, record = two.ended()
    assert codes == [0, 0]
    first = record.rounds[0]
    assert (first["ended_as"], first["failed_rank"], first["failed_host"]) == ("hang", 1, "127.0.0.1")
    for rank in (0, 1):
        assert "rank_program.py" in two.log(rank)


def test_the_cause_on_another_node_is_the_job_s(two: TwoNodes) -> None:
    two.start({"0": "sleep", "1": "steps:3:error"})
    codes, record = two.ended()
    assert codes == [3, 0]  # node 0 says it, and leaves last
    assert (record.exit_code, record.failed_rank, record.ended_as) == (3, 1, "bad_data")
    assert record.why == "rank 1: data/x.index: is not an index"


def test_a_lost_supervisor_ends_the_job_as_a_lost_node(two: TwoNodes) -> None:
    two.start({"0": "steps:3:sleep", "1": "steps:3:sleep"})
    wait_until(lambda: "ready" in two.log(0) and "ready" in two.log(1))
    two.nodes[1].kill()
    codes, record = two.ended()
    assert codes[0] == 5
    assert (record.ended_as, record.failed_host, record.restarts) == ("node_failure", "127.0.0.1", 0)


def test_a_lost_first_node_ends_the_others(two: TwoNodes) -> None:
    two.start({"0": "steps:3:sleep", "1": "steps:3:sleep"})
    wait_until(lambda: "ready" in two.log(0) and "ready" in two.log(1))
    two.nodes[0].kill()
    codes, record = two.ended()
    assert codes[1] == 5
    assert record.end is None
    other = read_record(two.folder.job(f"{two.job}_node_00001"))
    assert other is not None
    assert (other.ended_as, other.failed_host) == ("node_failure", "localhost")
    two.nodes.clear()
    two.start({"0": "exit:0", "1": "exit:0"}, attempt=1)
    _, record = two.ended()
    assert [(before["attempt"], before["ended_as"]) for before in record.earlier] == [(0, "node_failure")]


def test_a_request_on_one_node_is_kept(two: TwoNodes) -> None:
    two.start({"0": "polite", "1": "polite"})
    wait_until(lambda: "ready" in two.log(0) and "ready" in two.log(1))
    for node in two.nodes:
        node.send_signal(signal.SIGUSR2)
    codes, record = two.ended()
    assert (codes, record.asked, record.exit_code) == ([75, 0], "SIGUSR2", 75)


@pytest.mark.parametrize(("name", "secret"), [("7 0", SECRET), ("7 1", "another")])
def test_a_ghost_is_not_let_in(name: str, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervisor of an earlier attempt, or one without the secret, stays outside; the right one gets in."""
    monkeypatch.setattr(buses, "MEET_S", 1.0)
    ports = bus_ports(str(os.getpid()), 1)
    led: list[buses.Bus] = []

    def lead() -> None:
        monkeypatch.setattr(buses, "MEET_S", 10.0)
        led.append(buses.lead(ports, 2, "7 1", SECRET, lambda: False))

    leader = threading.Thread(target=lead)
    leader.start()
    stopped_s = time.monotonic() + 1.5
    ghost = buses.follow("127.0.0.1", ports, 1, name, secret, lambda: time.monotonic() > stopped_s)
    assert not ghost.others
    right = buses.follow("127.0.0.1", ports, 1, "7 1", SECRET, lambda: False)
    leader.join(10)
    led[0].send("start", port=1)
    (said,) = wait_until(lambda: right.poll("start"))
    assert said == (0, {"kind": "start", "port": 1})
    right.close()
    wait_until(lambda: led[0].poll("ended") == [] and led[0].lost == {1})
    led[0].close()


def test_ports_in_use_are_an_error_of_one_line() -> None:
    taken = [socket.create_server(("", port)) for port in bus_ports("3", 7)]
    try:
        with pytest.raises(ClusterError, match="all in use"):
            buses.lead(bus_ports("3", 7), 2, "3 7", SECRET, lambda: False)
    finally:
        for listener in taken:
            listener.close()
