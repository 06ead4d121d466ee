"""Which node this is, which nodes the job has, and where rank 0 listens.

In: SLURM's variables of a job step, or nothing on one machine. Out: a `Place`. The master's port is a pure function of
job and attempt on SLURM, because every node must know it and a ghost of an earlier attempt must not.
"""

import re
import socket
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ii_dist.config import ClusterError

FIRST_PORT = 20000
PORTS = 12000
FIRST_BUS_PORT, BUS_PORTS, BUS_TRIES = 16000, 4000, 8
"""Below Linux's ephemeral ports (32768 and up), so that no outgoing connection sits on one by chance."""


@dataclass(frozen=True, slots=True)
class Place:
    """One node of one attempt of one job. `hosts` stand in the order of their node ranks."""

    job: str
    """Its name in records and logs, as squeue shows it: 12, or 12_3 for an element of an array."""
    attempt: int
    node_rank: int
    hosts: tuple[str, ...]
    master_addr: str
    master_port: int
    raw_id: str = ""
    """SLURM_JOB_ID, which no two jobs share, elements of arrays included: ports are made from it."""


def local_place(job: str, master_port: int) -> Place:
    """The only node of a job on this machine. `master_port` 0 = a free one."""
    return Place(job, 0, 0, (socket.gethostname(),), "127.0.0.1", master_port or free_port())


def slurm_place(environ: Mapping[str, str], master_port: int) -> Place:
    """This node of a SLURM job. Raises ClusterError outside a job step or where scontrol does not answer."""
    raw_id = _variable(environ, "SLURM_JOB_ID")
    attempt = int(environ.get("SLURM_RESTART_COUNT", "0"))
    hosts = _hostnames(environ.get("SLURM_STEP_NODELIST") or _variable(environ, "SLURM_JOB_NODELIST"))
    node_rank, nodes = int(_variable(environ, "SLURM_NODEID")), int(_variable(environ, "SLURM_NNODES"))
    if len(hosts) != nodes or not 0 <= node_rank < nodes:
        raise ClusterError(f"SLURM_NNODES is {nodes}, SLURM_NODEID {node_rank}, yet scontrol names {', '.join(hosts)}")
    port = master_port or slurm_port(raw_id, attempt)
    return Place(_job_name(environ, raw_id), attempt, node_rank, hosts, hosts[0], port, raw_id)


def _job_name(environ: Mapping[str, str], raw_id: str) -> str:
    array, element = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{element}" if array and element else raw_id


def slurm_port(raw_id: str, attempt: int, restart: int = 0) -> int:
    """Same on every node, another for the neighbour job, the next attempt and the next restart of the ranks."""
    return FIRST_PORT + (_number(raw_id) * 7 + attempt * 1009 + restart * 101) % PORTS


def bus_ports(raw_id: str, attempt: int) -> tuple[int, ...]:
    """Where the supervisor of node 0 listens for the others: the first of these that is free."""
    first = (_number(raw_id) * 7 + attempt * 1009) % (BUS_PORTS - BUS_TRIES)
    return tuple(FIRST_BUS_PORT + first + further for further in range(BUS_TRIES))


def launch_number(attempt: int, restart: int) -> int:
    """One number for a start of the ranks that rises over restarts and attempts of a job: who is a ghost of whom."""
    return attempt * 1000 + min(restart, 999)


def open_port(ports: Iterable[int]) -> int:
    """The first of these ports of this machine on which rank 0 can listen. Raises ClusterError where none is."""
    last: ClusterError | None = None
    for port in ports:
        try:
            require_port(port)
            return port
        except ClusterError as error:
            last = error
    assert last is not None
    raise last


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def require_port(port: int) -> None:
    """Raise ClusterError when rank 0 could not listen on `port` of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as rank 0's store does
        try:
            probe.bind(("0.0.0.0", port))
            probe.listen()
        except OSError as error:
            raise ClusterError(
                f"port {port} on {socket.gethostname()}: rank 0 cannot listen there ({error.strerror});"
                " set launch.master_port to a free one"
            ) from None


def _hostnames(nodelist: str) -> tuple[str, ...]:
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, timeout=60, check=True
        )
    except FileNotFoundError:
        raise ClusterError("scontrol is not on this node's PATH; it names the hosts of the job") from None
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"scontrol show hostnames {nodelist}: {error}") from None
    return tuple(done.stdout.split())


def _number(raw_id: str) -> int:
    return int(re.sub(r"\D", "", raw_id) or "0")


def _variable(environ: Mapping[str, str], name: str) -> str:
    try:
        return environ[name]
    except KeyError:
        raise ClusterError(
            f"{name} is not set: this is no SLURM job step; submit with python -m launch submit"
        ) from None
