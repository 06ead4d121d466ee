"""What Submitit runs on each node: the supervisor of that node's ranks.

In: a `TrainJob` of plain fields, pickled by reference by Submitit. Out: the run's exit code, a job record, rank logs.

The supervisor starts the ranks itself and not through torch's elastic agent, for three reasons: the exit codes of the
ranks come through unchanged, every signal is passed on exactly once, and no torch is imported here, so that a node
answers to signals within moments of its start.
"""

import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ii_dist.config import RunFolder, UserError
from ii_dist.config.errors import EXIT_DONE, EXIT_STOPPED
from launch.machine import cores_of_a_rank
from launch.ranks import GRACE_S, STOP_SIGNALS, GroupResult, RankStart, StopSignals, last_lines, run_ranks
from launch.records import JobRecord, new_record, now_text, read_record, with_earlier, write_record
from launch.rendezvous import Place, local_place, require_port, slurm_place

SHOWN_LINES = 20
ERROR_PREFIX = "error: "
"""What every command of the project puts before an error that the user can mend."""
TRAIN_COMMAND = (sys.executable, "-m", "ii_dist", "train")


@dataclass(frozen=True)
class TrainJob:
    """One submission of a run. The config itself lies in the run folder as `config.yaml`."""

    run_folder: str
    executor: str
    nodes: int
    ranks_per_node: int
    job: str = ""
    """Name of a local job; SLURM gives its own."""
    command: tuple[str, ...] = TRAIN_COMMAND
    """What each rank runs; the path of the run's `config.yaml` is appended."""
    cpus_per_rank: int = 0
    master_port: int = 0
    network_interface: str = ""
    cuda_visible_devices: str | None = None
    """The submitter's CUDA_VISIBLE_DEVICES (None: not set), which Submitit's local executor overwrites."""
    grace_s: float = GRACE_S
    """Seconds that ranks get to leave after another one failed."""
    umask: int = 0o077
    """The submitter's, for what the ranks write; Submitit's own files lie in a private folder."""

    def __call__(self) -> int:
        """Run this node's ranks to their end. Returns the code on this machine, exits with it on SLURM."""
        os.umask(self.umask)
        if self.executor == "local" and os.getpgrp() != os.getpid():
            os.setsid()  # Ctrl-C at the terminal is for the follower, who asks once and in order
        with StopSignals() as stop:
            code = supervise(self, os.environ, stop)
        for signum in STOP_SIGNALS:  # Submitit's own handler would requeue a run that has ended
            signal.signal(signum, signal.SIG_IGN)
        if self.executor == "slurm" and code != EXIT_DONE:
            raise SystemExit(code)
        return code


def supervise(job: TrainJob, environ: Mapping[str, str], stop: StopSignals) -> int:
    """Find this node's place, run its ranks, write the record. Returns the exit code of this node's task."""
    try:
        place = _place(job, environ)
    except UserError as error:
        print(f"{ERROR_PREFIX}{error}", file=sys.stderr, flush=True)
        return error.exit_code
    folder = RunFolder(Path(job.run_folder))
    record_path = folder.job(record_name(place.job, place.node_rank))
    before = read_record(record_path)
    record = new_record(place.job, place.attempt, place.hosts, place.node_rank, job.nodes * job.ranks_per_node)
    record = with_earlier(record, before)
    write_record(record_path, record)
    result = _with_words(_run(job, place, folder, environ, stop), place.job, folder)
    write_record(record_path, record.ended(result.exit_code, result.failed_rank, result.why))
    _say(result, record, folder)
    # With --kill-on-bad-exit the first task that leaves with a code ends the step. A stopped run is committed by
    # rank 0, so only its node may say 75.
    return EXIT_DONE if result.exit_code == EXIT_STOPPED and place.node_rank > 0 else result.exit_code


def record_name(job: str, node_rank: int) -> str:
    """Node 0's record is the job's; the others' stand beside it."""
    return job if node_rank == 0 else f"{job}_node_{node_rank:05d}"


def rank_environ(job: TrainJob, place: Place, local_rank: int, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of one rank: the supervisor's own, and who this rank is."""
    rank = place.node_rank * job.ranks_per_node + local_rank
    env = dict(environ)
    env.update(
        RANK=str(rank),
        LOCAL_RANK=str(local_rank),
        WORLD_SIZE=str(job.nodes * job.ranks_per_node),
        LOCAL_WORLD_SIZE=str(job.ranks_per_node),
        GROUP_RANK=str(place.node_rank),
        MASTER_ADDR=place.master_addr,
        MASTER_PORT=str(place.master_port),
        II_DIST_JOB=place.job,
        II_DIST_ATTEMPT=str(place.attempt),
        PYTHONUNBUFFERED="1",
    )
    env.setdefault("OMP_NUM_THREADS", str(job.cpus_per_rank or cores_of_a_rank(job.ranks_per_node)))
    if job.network_interface:
        env.update(GLOO_SOCKET_IFNAME=job.network_interface, NCCL_SOCKET_IFNAME=job.network_interface)
    elif job.executor == "local" and any(name == "lo" for _, name in socket.if_nameindex()):
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: no name to resolve, no port open to others
    if job.executor == "local":
        env.pop("CUDA_VISIBLE_DEVICES", None)
        if job.cuda_visible_devices is not None:
            env["CUDA_VISIBLE_DEVICES"] = job.cuda_visible_devices
    return env


def _place(job: TrainJob, environ: Mapping[str, str]) -> Place:
    if job.executor == "local":
        return local_place(job.job, job.master_port)
    return slurm_place(environ, job.master_port)


def _run(job: TrainJob, place: Place, folder: RunFolder, environ: Mapping[str, str], stop: StopSignals) -> GroupResult:
    try:
        if place.node_rank == 0:
            require_port(place.master_port)
    except UserError as error:
        return GroupResult(error.exit_code, None, str(error))
    folder.logs.mkdir(parents=True, exist_ok=True)
    starts = []
    for local_rank in range(job.ranks_per_node):
        env = rank_environ(job, place, local_rank, environ)
        log = folder.rank_log(place.job, int(env["RANK"]))
        with log.open("a", encoding="utf-8") as file:
            file.write(f"== job {place.job} attempt {place.attempt} rank {env['RANK']} of {env['WORLD_SIZE']}")
            file.write(f" on {place.hosts[place.node_rank]}, {now_text()}\n")
        starts.append(RankStart(int(env["RANK"]), env, log))
    command = (*job.command, str(folder.config))
    return run_ranks(command, starts, stop, again_kills=job.executor == "local", grace_s=job.grace_s)


def _with_words(result: GroupResult, job: str, folder: RunFolder) -> GroupResult:
    """The result with the failing rank's own one-line error as the reason, where it left one."""
    if result.failed_rank is None:
        return result
    lines = last_lines(folder.rank_log(job, result.failed_rank), SHOWN_LINES)
    words = [line.removeprefix(ERROR_PREFIX) for line in lines if line.startswith(ERROR_PREFIX)]
    return replace(result, why=f"rank {result.failed_rank}: {words[-1]}") if words else result


def _say(result: GroupResult, record: JobRecord, folder: RunFolder) -> None:
    """End of the supervisor's own log: what happened, and the failing rank's last lines."""
    if result.failed_rank is not None:
        log = folder.rank_log(record.job, result.failed_rank)
        print("\n".join([f"last lines of {log}:", *last_lines(log, SHOWN_LINES)]), flush=True)
    print(f"job {record.job} attempt {record.attempt}: {result.why} (exit code {result.exit_code})", flush=True)
