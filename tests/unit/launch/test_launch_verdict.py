"""Causes, blame, time and requeue decisions: pure functions against cases worked out by hand."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from launch.beats import Limits, NodeLife, RankLife, first_silent
from launch.machine import share_cores
from launch.output import OutputPump, without_stamps
from launch.preflight import judge
from launch.records import EndedAs, JobRecord, new_record, read_record, with_earlier, write_record
from launch.rendezvous import BUS_PORTS, FIRST_BUS_PORT, FIRST_PORT, PORTS, bus_ports, launch_number, slurm_port
from launch.requeue import JobClock, reason_of_stop
from launch.verdict import Ending, can_restart, classify, last_words, memory_kills, merge
from tests.unit.launch.cases import wait_until


@pytest.mark.parametrize(
    ("code", "lines", "by_kernel", "said"),
    [
        (137, [], False, "killed_rank"),
        (137, [], True, "out_of_memory"),
        (1, ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"], False, "out_of_memory"),
        (1, ["MemoryError"], False, "out_of_memory"),
        (4, ["error: step 4 not saved: /r: No space left on device"], False, "disk_full"),
        (1, ["OSError: [Errno 28] No space left on device: '/r/x'"], False, "disk_full"),
        (2, ["error: step 9: 10 updates in a row were left out for a non-finite loss or gradient"], False, "nan"),
        (2, ["error: optim.lr -1: needs 0 or more"], False, "bad_config"),
        (3, ["error: data/train.index: is not an index"], False, "bad_data"),
        (4, ["error: step_000000004: shard 1 is damaged"], False, "bad_checkpoint"),
        (5, ["error: port 20000 is in use"], False, "environment"),
        (1, ["Traceback (most recent call last):", "ValueError: x"], False, "exception"),
    ],
)
def test_classes_of_ends(code: int, lines: list[str], by_kernel: bool, said: str) -> None:
    assert classify(code, lines, by_kernel) == said


def test_last_words_are_the_error_else_the_last_line() -> None:
    assert last_words(["error: data/x: bad", "", "goodbye"]) == "data/x: bad"
    assert last_words(["Traceback", "ValueError: x", ""]) == "ValueError: x"
    assert last_words([]) == ""


def test_the_cause_wins_over_its_echoes() -> None:
    echo = Ending(5, "ended because ranks of another node had")
    lost = Ending(5, "rank 0: lost another rank", "environment", 0, "a")
    killed = Ending(137, "rank 9 was killed by SIGKILL", "killed_rank", 9, "b", stepped=True)
    gone = Ending(5, "node 2 (c) no longer answers", "node_failure", None, "c")
    assert merge([echo, lost, killed]).failed_rank == 9
    assert merge([lost, gone]).ended_as == "environment"
    assert merge([echo, gone]).ended_as == "node_failure"
    assert merge([echo, killed]).stepped
    assert merge([Ending(75, "stopped", "stopped"), Ending(0, "done", "finished", asked="SIGTERM")]).asked == "SIGTERM"


def life(signs: int, silent_s: float, state: str = "S") -> dict[str, Any]:
    return {"signs": signs, "silent_s": silent_s, "state": state, "step": 3, "phase": "step"}


def test_the_first_silent_rank() -> None:
    assert first_silent({"0": life(9, 30.0), "1": life(8, 30.0)}) == 1
    assert first_silent({"0": life(9, 30.0), "1": life(9, 31.0)}) == 1
    assert first_silent({"0": life(8, 32.0), "1": life(9, 30.0, "T")}) == 1
    hung = [
        Ending(5, "silent", "hang", None, "a", hang={"0": life(9, 30.0)}),
        Ending(5, "silent", "hang", None, "b", hang={"1": life(9, 31.0)}),
    ]
    merged = merge(hung)
    assert (merged.failed_rank, merged.failed_host, merged.ended_as) == (1, "b", "hang")


def test_what_can_be_started_again() -> None:
    assert can_restart(Ending(137, "", "killed_rank"))
    assert can_restart(Ending(5, "", "hang"))
    assert can_restart(Ending(5, "", "environment", last_line="rank 1 lost another rank (x)"))
    assert not can_restart(Ending(5, "", "environment", last_line="Submitit is not installed"))
    assert not can_restart(Ending(1, "", "exception"))
    hopeless: tuple[EndedAs, ...] = ("bad_config", "bad_data", "bad_checkpoint", "nan", "disk_full", "node_failure")
    for ended_as in hopeless:
        assert not can_restart(Ending(1, "", ended_as, stepped=True))


def test_silence_is_measured_in_the_rank_s_own_steps(tmp_path: Path) -> None:
    path = tmp_path / "rank"
    rank, now_s = RankLife(path, 0.0), 0.0
    limits = Limits(hang_after_s=30.0, hang_steps=5.0, start_timeout_s=600.0)
    assert rank.limit_s(limits) == 600.0
    for step in range(8):
        path.write_text(f"{step + 1:012d} {step + 1:012d} {step:012d} {2.5:012.3f} step      \n")
        now_s += 10.0
        rank.look(now_s)
        assert rank.limit_s(limits) == (600.0 if step < 2 else 50.0)
    assert rank.step_p50_s == 10.0
    path.write_text(f"{20:012d} {1:012d} {8:012d} {2.5:012.3f} save      \n")
    rank.look(now_s)
    assert rank.limit_s(limits) == 600.0
    path.write_text("torn")
    rank.look(now_s + 1)
    assert rank.sign is not None
    assert rank.sign.phase == "save"


def test_a_node_s_ranks_and_the_lead_of_a_stop() -> None:
    clock = [0.0]
    with NodeLife([4, 5], Limits(1.0, 5.0, 100.0), now=lambda: clock[0]) as node:
        for signs in range(1, 6):
            clock[0] += 0.1
            for rank in (4, 5):
                line = f"{signs:012d} {signs:012d} {signs:012d} {20.0:012.3f} step      \n"
                node.path(rank).write_text(line if rank == 4 or signs < 4 else node.path(rank).read_text())
            node.look()
        assert node.stepped
        assert node.lead_s == pytest.approx(2 * 20.0 + 5 * 0.1 + 10.0)
        clock[0] += 0.9
        assert node.silent([4, 5]) == [5]
        assert node.silent([4]) == []
        folder = node.path(4).parent
    assert not folder.exists()


def test_the_end_of_the_job_s_time() -> None:
    now, answers = [0.0], [{"EndTime": "2000"}]
    clock = JobClock("7", 1000.0, fields_of=lambda job: answers[0], now=lambda: now[0])
    assert not clock.due(50.0)
    now[0] = 960.0
    assert not clock.due(50.0)  # asked again: the limit was moved
    assert clock.end_s == 2000.0
    now[0] = 1951.0
    assert clock.due(50.0)
    assert clock.due(1.0) is False  # still more than the least lead
    now[0] = 1981.0
    assert clock.due(1.0)
    assert not JobClock("7", None).due(1e9)
    assert JobClock.of_job("7", {"SLURM_JOB_END_TIME": "1795400000"}).end_s == 1795400000.0
    shown = datetime.fromisoformat(JobClock("7", 1795400000.0).text())
    assert shown.astimezone(UTC).timestamp() == 1795400000.0


@pytest.mark.parametrize(
    ("asked", "fields", "cancelled", "near", "said"),
    [
        ("SIGUSR2", {"JobState": "RUNNING", "PreemptTime": "None"}, True, True, "stopped"),
        ("SIGTERM", {"JobState": "CANCELLED", "PreemptTime": "None"}, False, True, "stopped"),
        ("SIGUSR2", {"JobState": "RUNNING", "PreemptTime": "1795400000"}, False, True, "preempted"),
        ("SIGUSR2", {"JobState": "RUNNING", "PreemptTime": "None"}, False, True, "time_limit"),
        ("SIGTERM", {"JobState": "RUNNING", "PreemptTime": "None"}, False, False, "preempted"),
        ("SIGUSR2", {"JobState": "RUNNING"}, False, False, "stopped"),
        ("SIGTERM", {}, False, True, "time_limit"),
    ],
)
def test_why_a_job_was_asked_to_stop(
    asked: str, fields: dict[str, str], cancelled: bool, near: bool, said: str
) -> None:
    assert reason_of_stop(asked, fields, cancelled, near) == said


def test_ports_and_numbers_tell_starts_apart() -> None:
    ports = {slurm_port("7", attempt, restart) for attempt in range(5) for restart in range(4)}
    assert len(ports) == 20
    assert all(FIRST_PORT <= port < FIRST_PORT + PORTS for port in ports)
    assert not set(bus_ports("7", 0)) & set(bus_ports("7", 1))
    for job in ("1", "571", "99999999"):
        assert all(FIRST_BUS_PORT <= port < FIRST_BUS_PORT + BUS_PORTS for port in bus_ports(job, 3))
    assert launch_number(0, 0) < launch_number(0, 1) < launch_number(1, 0) < launch_number(1, 2)


def test_cores_are_shared_by_socket_and_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sockets, two cores each, two threads each, numbered as Linux does: threads of a core are 4 apart."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    for cpu in range(8):
        place = tmp_path / f"cpu{cpu}" / "topology"
        place.mkdir(parents=True)
        (place / "physical_package_id").write_text(str(cpu % 4 // 2))
        (place / "core_id").write_text(str(cpu % 2))
    assert share_cores(2, tmp_path) == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert share_cores(4, tmp_path) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert share_cores(9, tmp_path) == [()] * 9


def test_kills_for_memory_are_counted(tmp_path: Path) -> None:
    cgroups = tmp_path / "cgroup"
    cgroups.write_text("0::/slurm/job_7\n")
    place = tmp_path / "fs" / "slurm" / "job_7"
    place.mkdir(parents=True)
    assert memory_kills(cgroups, tmp_path / "fs") == 0
    (place / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    assert memory_kills(cgroups, tmp_path / "fs") == 2
    cgroups.write_text("9:memory:/old\n1:name=systemd:/x\n")
    old = tmp_path / "fs" / "memory" / "old"
    old.mkdir(parents=True)
    (old / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    assert memory_kills(cgroups, tmp_path / "fs") == 1


def test_records_of_an_attempt_that_could_not_say_how_it_ended(tmp_path: Path) -> None:
    record = new_record("7", 0, ("a", "b"), 0, 2)
    path = tmp_path / "jobs" / "7.json"
    write_record(path, record)
    before = read_record(path)
    assert before == record
    after = with_earlier(new_record("7", 1, ("a",), 0, 2), before)
    assert after.earlier[0]["ended_as"] == "node_failure"
    asked = JobRecord(**{**facts(record), "asked": "SIGTERM"})
    assert with_earlier(new_record("7", 1, ("a",), 0, 2), asked).earlier[0]["ended_as"] == "preempted"
    lost = JobRecord(**{**facts(record), "end": "t", "ended_as": "node_failure", "barren_restarts": 2})
    assert with_earlier(new_record("7", 1, ("a",), 0, 2), lost).barren_restarts == 2


def facts(record: JobRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in JobRecord.__dataclass_fields__}


def row(host: str, **more: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "host": host,
        "clock_s": 0.0,
        "free_bytes": {"/r": 1 << 40},
        "versions": {"torch": "2.13.0"},
    }
    rates = {"multiply_gflops": 100.0, "link_mb_per_s": 1000.0, "read_mb_per_s": 50.0, "decode_images_per_s": 500.0}
    return {**base, **rates, **more}


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"multiply_gflops": 60.0}, "c: 60 instead of 100 (matrix products"),
        ({"link_mb_per_s": 10.0}, "c: 10 instead of 1000 (link"),
        ({"clock_s": -7.0}, "c: its clock is -7.0 s off"),
        ({"free_bytes": {"/r": 1000000}}, "c: 1 MB free in /r"),
        ({"versions": {"torch": "2.12.0"}}, "c: torch is 2.12.0, elsewhere 2.13.0"),
    ],
)
def test_a_node_that_stands_out_is_named_and_avoided(odd: dict[str, Any], words: str) -> None:
    lines, avoid = judge([row("a"), row("b"), row("c", **odd), row("d")])
    assert avoid == ["c"]
    assert any(words in line for line in lines), lines


def test_what_all_nodes_have_is_no_node_s_fault() -> None:
    full = {"free_bytes": {"/r": 5}}
    lines, avoid = judge([row("a", **full), row("b", **full)])
    assert avoid == []
    assert sum("free in /r" in line for line in lines) == 2
    assert judge([row("a"), row("b", multiply_gflops=10.0)])[1] == []  # of two, neither is the usual one
    assert judge([row("a"), row("b"), row("c", multiply_gflops=80.0)])[1] == []


def test_the_output_of_ranks_survives_long_and_torn_lines(tmp_path: Path) -> None:
    pump, log = OutputPump(), tmp_path / "log"
    pipe = pump.add(3, log)
    pump.start()
    os.write(pipe, b"torn ")
    os.write(pipe, b"line\nsecond")
    wait_until(lambda: b"torn line" in log.read_bytes())
    os.write(pipe, b"\n" + b"x" * 50000)
    os.write(pipe, b"y" * 50000)
    os.close(pipe)
    pump.close()
    text = without_stamps(log.read_bytes())
    assert text.startswith(b"torn line\nsecond\nxxx")
    assert text.replace(b"\n", b"").count(b"x") == 50000
    assert text.endswith(b"y\n")
