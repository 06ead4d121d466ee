"""What Submitit runs on each node: the supervisor of that node's ranks.

In: a `TrainJob` of plain fields, pickled by reference by Submitit. Out: the run's exit code, a job record, rank logs.

The supervisor starts the ranks itself and not through torch's elastic agent, for three reasons: the exit codes of the
ranks come through unchanged, every signal is passed on exactly once, and no torch is imported here, so that a node
answers to signals within moments of its start.
"""

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ii_dist.config import RunFolder, UserError
from ii_dist.config.errors import EXIT_DONE, EXIT_ENVIRONMENT
from launch.fields import JobFields
from launch.ranks import STOP_SIGNALS, StopSignals, last_lines
from launch.records import JobRecord, new_record, read_record, with_earlier
from launch.rendezvous import Place, local_place, slurm_place
from launch.rounds import SHOWN_LINES
from launch.supervisor import Supervisor
from launch.verdict import ERROR_PREFIX, Ending


@dataclass(frozen=True)
class TrainJob(JobFields):
    """One submission of a run, as Submitit calls it on each node."""

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


def supervise(job: JobFields, environ: Mapping[str, str], stop: StopSignals) -> int:
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
    supervisor = Supervisor(job, place, record_path, with_earlier(record, before), stop)
    ending, record = supervisor.run(environ)
    _say(ending, record, folder)
    # With --kill-on-bad-exit the first task that leaves with a code ends the step: the run's code is node 0's to say,
    # unless node 0 is gone.
    if place.node_rank > 0:
        return EXIT_ENVIRONMENT if ending.ended_as == "node_failure" else EXIT_DONE
    return ending.exit_code


def record_name(job: str, node_rank: int) -> str:
    """Node 0's record is the job's; the others' stand beside it."""
    return job if node_rank == 0 else f"{job}_node_{node_rank:05d}"


def _place(job: JobFields, environ: Mapping[str, str]) -> Place:
    if job.executor == "local":
        return local_place(job.job, job.master_port)
    return slurm_place(environ, job.master_port)


def _say(ending: Ending, record: JobRecord, folder: RunFolder) -> None:
    """End of the supervisor's own log: what happened, and the failing rank's last lines."""
    first = record.node_rank * (record.ranks // len(record.nodes))
    if ending.failed_rank is not None and first <= ending.failed_rank < first + record.ranks // len(record.nodes):
        log = folder.rank_log(record.job, ending.failed_rank)
        print("\n".join([f"last lines of {log}:", *last_lines(log, SHOWN_LINES)]), flush=True)
    print(f"job {record.job} attempt {record.attempt}: {ending.why} (exit code {ending.exit_code})", flush=True)
