"""The supervisor of one node: real processes, real signals."""

import json
import os
import re
import signal
import socket
import time

import pytest

from launch import ranks
from launch.verdict import blame
from tests.unit.launch.cases import Case, is_gone, wait_until


def test_all_done(case: Case) -> None:
    process = case.start({"0": "exit:0", "1": "exit:0"})
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    record = case.record()
    assert (record.exit_code, record.why, record.failed_rank, record.ranks) == (0, "done", None, 2)
    assert record.end is not None
    assert record.end > record.start
    assert "done (exit code 0)" in out
    assert case.log(1).splitlines()[0].startswith(f"== job {case.job} attempt 0 rank 1 of 2 on ")
    assert case.log(1).splitlines()[1:] == ["1 leaves with 0"]


def test_ranks_know_who_they_are(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as Submitit's local executor sets it
    process = case.start({"0": "environ", "1": "environ"}, cuda_visible_devices="3,5", umask=0o027)
    process.communicate(timeout=30)
    said = [json.loads(case.log(rank).splitlines()[1].partition(" ")[2]) for rank in (0, 1)]
    for rank, facts in enumerate(said):
        env = facts["environ"]
        assert (env["RANK"], env["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"], env["GROUP_RANK"]) == ("2", "2", "0")
        assert env["MASTER_ADDR"] == "127.0.0.1"
        assert env["MASTER_PORT"] == said[0]["environ"]["MASTER_PORT"]
        assert (env["II_DIST_JOB"], env["II_DIST_ATTEMPT"]) == (case.job, "0")
        assert env["CUDA_VISIBLE_DEVICES"] == "3,5"
        assert env["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
        assert env["GLOO_SOCKET_IFNAME"] == "lo"
        assert facts["arguments"] == [str(case.folder.config)]
        assert facts["umask"] == 0o027


def test_network_interface_reaches_both_libraries(case: Case) -> None:
    case.start({"0": "environ"}, network_interface="eth7").communicate(timeout=30)
    env = json.loads(case.log(0).splitlines()[1].partition(" ")[2])["environ"]
    assert (env["GLOO_SOCKET_IFNAME"], env["NCCL_SOCKET_IFNAME"]) == ("eth7", "eth7")
    assert "CUDA_VISIBLE_DEVICES" not in env


def test_one_failing_rank_ends_the_others(case: Case) -> None:
    mark = case.root / "go"
    process = case.start({"0": "sleep", "1": f"after:{mark}:exit:3", "2": "parent"})
    pids = case.ready(0, 2)
    child = int(wait_until(lambda: re.search(r"child (\d+)", case.log(2)))[1])
    mark.touch()
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 3
    assert all(is_gone(pid) for pid in (*pids, child))
    record = case.record()
    assert (record.exit_code, record.failed_rank) == (3, 1)
    assert record.why == "rank 1 ended with exit code 3"
    assert "1 leaves with 3" in out  # the failing rank's last lines


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace(case: Case) -> None:
    mark = case.root / "go"
    process = case.start({"0": "deaf", "1": f"after:{mark}:die:SIGKILL"}, grace_s=2.0)
    (pid,) = case.ready(0)
    mark.touch()
    begin_s = time.monotonic()
    process.communicate(timeout=30)
    took_s = time.monotonic() - begin_s
    assert process.returncode == 128 + signal.SIGKILL
    assert case.record().why == "rank 1 was killed by SIGKILL"
    assert is_gone(pid)
    assert 1.5 < took_s < 7


@pytest.mark.parametrize("signum", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
def test_a_stop_request_reaches_every_rank_once(case: Case, signum: signal.Signals) -> None:
    process = case.start({"0": "polite", "1": "polite"})
    case.ready(0, 1)
    process.send_signal(signum)
    time.sleep(0.15)
    process.send_signal(signum)  # schedulers repeat themselves; it is still one request
    process.communicate(timeout=20)
    assert process.returncode == 75
    for rank in (0, 1):
        assert case.log(rank).splitlines()[-1] == f"{rank} asked by SIGUSR2"
    assert case.record().why == "stopped as asked"


def test_a_second_sigterm_ends_the_ranks_at_once(case: Case) -> None:
    process = case.start({"0": "deaf"})
    (pid,) = case.ready(0)
    process.send_signal(signal.SIGTERM)
    time.sleep(ranks.AGAIN_S + 0.3)
    assert not is_gone(pid)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=5)
    assert process.returncode == 128 + signal.SIGTERM
    assert "second SIGTERM" in case.record().why
    assert is_gone(pid)


def test_a_rank_that_cannot_listen_yet_has_stopped_as_asked(case: Case) -> None:
    process = case.start({"0": "sleep", "1": "polite"})
    case.ready(0, 1)
    process.send_signal(signal.SIGUSR2)
    process.communicate(timeout=20)
    assert process.returncode == 75
    assert case.record().why == "stopped as asked"


def test_no_rank_outlives_a_killed_supervisor(case: Case) -> None:
    process = case.start({"0": "deaf", "1": "sleep"})
    pids = case.ready(0, 1)
    process.kill()
    wait_until(lambda: all(is_gone(pid) for pid in pids), 5)
    assert case.record().exit_code is None


def test_port_in_use(case: Case) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = case.start({"0": "exit:0"}, master_port=port)
        process.communicate(timeout=20)
    assert process.returncode == 5
    assert case.record().exit_code == 5
    assert f"port {port}" in case.record().why
    assert "set launch.master_port" in case.record().why
    assert case.log(0) == ""


def test_a_requeued_job_keeps_what_its_first_attempt_said(case: Case) -> None:
    case.start({"0": "exit:4"}).communicate(timeout=20)
    case.start({"0": "exit:0"}).communicate(timeout=20)
    record = case.record()
    assert record.exit_code == 0
    assert [before["exit_code"] for before in record.earlier] == [4]
    assert case.log(0).count("== job") == 2


def test_the_cause_is_named_and_not_its_echo(case: Case) -> None:
    mark = case.root / "go"
    plan = {"0": f"after:{mark}:exit:5", "1": f"after:{mark}:exit:1", "2": f"after:{mark}:error"}
    process = case.start(plan)
    wait_until(lambda: "== job" in case.log(2))
    mark.touch()
    process.communicate(timeout=20)
    assert process.returncode == 3
    assert (case.record().failed_rank, case.record().why) == (2, "rank 2: data/x.index: is not an index")


@pytest.mark.parametrize(
    ("together", "blamed"),
    [
        ([(0, 1), (1, -9)], 1),  # a broken connection beside a kill
        ([(0, 5), (1, 1), (2, 4)], 2),  # lost peers beside an error with a meaning
        ([(1, 1), (0, 1)], 0),
    ],
)
def test_blame(together: list[tuple[int, int]], blamed: int) -> None:
    assert min(together, key=lambda pair: blame(*pair))[0] == blamed
