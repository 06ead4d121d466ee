"""Nodes and ports."""

import os
import socket
from pathlib import Path

import pytest

from ii_dist.config import ClusterError
from launch.rendezvous import PORTS, free_port, local_place, require_port, slurm_place, slurm_port

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NODEID": "1",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_RESTART_COUNT": "3",
}


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers as the real one does for node[1-2], which the tests in tests/slurm ask."""
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && printf "node1\\nnode2\\n"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.usefixtures("scontrol")
def test_place_of_a_slurm_step() -> None:
    place = slurm_place(STEP, master_port=0)
    assert (place.job, place.attempt, place.node_rank, place.hosts) == ("4711", 3, 1, ("node1", "node2"))
    assert (place.master_addr, place.master_port) == ("node1", slurm_port("4711", 3))
    assert slurm_place(STEP, master_port=23456).master_port == 23456


@pytest.mark.usefixtures("scontrol")
def test_an_element_of_an_array_has_a_name_of_its_own_and_a_port_of_its_own() -> None:
    """SLURM_JOB_ID differs between elements; digits of the name would not do: 12_3 and 1_23."""
    array = {"SLURM_ARRAY_JOB_ID": "4709", "SLURM_ARRAY_TASK_ID": "3"}
    place = slurm_place({**STEP, **array}, master_port=0)
    assert (place.job, place.raw_id, place.master_port) == ("4709_3", "4711", slurm_port("4711", 3))


@pytest.mark.usefixtures("scontrol")
def test_first_attempt_has_no_restart_count() -> None:
    assert slurm_place({k: v for k, v in STEP.items() if k != "SLURM_RESTART_COUNT"}, 0).attempt == 0


@pytest.mark.usefixtures("scontrol")
def test_counts_that_disagree_are_refused() -> None:
    with pytest.raises(ClusterError, match="SLURM_NNODES is 3"):
        slurm_place({**STEP, "SLURM_NNODES": "3"}, 0)


def test_outside_slurm() -> None:
    with pytest.raises(ClusterError, match="SLURM_JOB_ID is not set"):
        slurm_place({}, 0)


def test_without_scontrol(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match="scontrol is not on this node's PATH"):
        slurm_place(STEP, 0)


def test_ports_of_neighbours_and_attempts_differ() -> None:
    first = [slurm_port(str(job), 0) for job in range(1, 501)]
    assert len(set(first)) == len(first)
    assert len({slurm_port("77", attempt) for attempt in range(100)}) == 100
    assert all(20000 <= port < 20000 + PORTS <= 32768 for port in first)


def test_local_place_takes_a_free_port_or_the_one_given() -> None:
    require_port(local_place("a", 0).master_port)
    assert local_place("a", 1234).master_port == 1234


def test_a_taken_port_is_refused_and_a_free_one_is_not() -> None:
    port = free_port()
    require_port(port)
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        with pytest.raises(ClusterError, match=f"port {port} on .*set launch.master_port"):
            require_port(port)
    require_port(port)
