"""From a config to a job: `python -m launch submit`.

In: file names and overrides. Out: a run folder, a job, and the exit code of the run where it is followed.
"""

import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ii_dist.config import (
    ClusterError,
    ConfigError,
    DataError,
    RunConfig,
    RunFolder,
    gpu_count,
    load_config,
    ranks_on_a_node,
)
from ii_dist.config.errors import EXIT_DONE, EXIT_STOPPED
from launch import local, slurm
from launch.account import account_lines, plan_of
from launch.fields import watch_of
from launch.folder import prepare_run_folder, private_folder, run_folder
from launch.follow import follow, wait_gone
from launch.job import TrainJob
from launch.ranks import StopSignals, last_lines
from launch.records import JobRecord
from launch.rounds import SHOWN_LINES

QUEUE_POLL_S = 5.0


@dataclass(frozen=True, slots=True)
class Submission:
    """What the command line asks for."""

    config: Path
    overrides: tuple[str, ...] = ()
    cluster: Path | None = None
    nodes: int | None = None
    dry_run: bool = False
    follow: bool | None = None
    """None = follow a local run, not a job in a queue."""
    new_config: tuple[str, ...] = ()
    """Keys that may differ from what the run was started with."""


def submit_run(asked: Submission, environ: Mapping[str, str]) -> int:
    """Do what is asked; returns the command's exit code. Raises UserError before anything is started."""
    overrides = [*asked.overrides, *([f"launch.nodes={asked.nodes}"] if asked.nodes is not None else [])]
    cfg = load_config(asked.config, overrides, layers=[asked.cluster] if asked.cluster else [])
    if cfg.launch.executor == "local" and cfg.launch.nodes > 1:
        raise ConfigError(f"launch.nodes {cfg.launch.nodes}: this machine is one node; give --cluster FILE for SLURM")
    ranks_per_node, folder = ranks_on_a_node(cfg, gpu_count(environ)), run_folder(cfg)
    if asked.dry_run:
        return _dry_run(cfg, folder, ranks_per_node)
    _check_plan(cfg, ranks_per_node)
    on_slurm = cfg.launch.executor == "slurm"
    parameters = slurm.sbatch_parameters(cfg, ranks_per_node) if on_slurm else {}
    if on_slurm:
        slurm.require_slurm()
        slurm.check_folder(folder.root)
    if said := prepare_run_folder(folder, cfg, asked.new_config):
        print(said, flush=True)
    submitit_folder = private_folder(folder.jobs / "submitit")
    job = train_job(cfg, folder, ranks_per_node, environ)
    if on_slurm:
        return submit_slurm(job, folder, submitit_folder, parameters, follows=asked.follow is True)
    return submit_local(job, folder, submitit_folder, follows=asked.follow is not False)


def train_job(cfg: RunConfig, folder: RunFolder, ranks_per_node: int, environ: Mapping[str, str]) -> TrainJob:
    """The job that Submitit pickles: plain fields taken from the config."""
    umask = os.umask(0o077)
    os.umask(umask)
    on_slurm = cfg.launch.executor == "slurm"
    return TrainJob(
        run_folder=str(folder.root),
        executor=cfg.launch.executor,
        nodes=cfg.launch.nodes,
        ranks_per_node=ranks_per_node,
        job="" if on_slurm else local.new_job_name(),
        cpus_per_rank=cfg.launch.cpus_per_rank if on_slurm else 0,
        master_port=cfg.launch.master_port,
        network_interface=cfg.launch.network_interface or "",
        cuda_visible_devices=None if on_slurm else environ.get("CUDA_VISIBLE_DEVICES"),
        umask=umask,
        watch=watch_of(cfg.launch),
    )


def _dry_run(cfg: RunConfig, folder: RunFolder, ranks_per_node: int) -> int:
    if cfg.launch.executor == "slurm":
        print(slurm.sbatch_text(folder.jobs / "submitit", slurm.sbatch_parameters(cfg, ranks_per_node)))
    else:
        print(f"# on this machine, {ranks_per_node} times: {shlex.join(TrainJob.command)} {folder.config}")
    for line in account_lines(cfg, folder, ranks_per_node):
        print(f"# {line}")
    return EXIT_DONE


def _check_plan(cfg: RunConfig, ranks_per_node: int) -> None:
    """Refuse now what every rank would refuse later. A login node need not see the data."""
    try:
        plan_of(cfg, cfg.launch.nodes * ranks_per_node)
    except DataError:
        if cfg.launch.executor == "local":
            raise


def submit_local(job: TrainJob, folder: RunFolder, submitit_folder: Path, follows: bool) -> int:
    """Run `job` on this machine; with `follows` show it, pass Ctrl-C on and return its exit code."""
    with StopSignals() as stop:
        handle = local.submit(job, submitit_folder)
        log, record_path = folder.rank_log(job.job, 0), folder.job(job.job)
        if not follows:
            print(f"job {job.job} runs in the background\n  watch: tail -F {log}\n  stop:  kill -TERM {handle.pid}")
            return EXIT_DONE
        asked = False

        def on_signal() -> bool:
            nonlocal asked
            again = "" if asked else "; once more to end it at once"
            print(f"asked the run to save and stop{again}", file=sys.stderr, flush=True)
            asked = True
            handle.ask_to_stop()
            return True

        record = follow(log, record_path, handle.alive, stop, on_signal)
        wait_gone(handle.alive)
    if record is None and asked:
        print("stopped as asked, before the run began", file=sys.stderr)
        return EXIT_STOPPED
    return _ended(record, folder, job.job, handle.log)


def submit_slurm(
    job: TrainJob, folder: RunFolder, submitit_folder: Path, parameters: slurm.Parameters, follows: bool
) -> int:
    """Hand `job` to SLURM and say how to watch it; with `follows` show it and return its exit code."""
    with StopSignals() as stop:
        job_id = slurm.submit(job, submitit_folder, parameters)
        log, own_log = folder.rank_log(job_id, 0), submitit_folder / f"{job_id}_0_log.out"
        print(f"job {job_id} submitted: {job.nodes} node(s) x {job.ranks_per_node} rank(s)")
        print(
            f"  queue: squeue -j {job_id}\n  watch: tail -F {log}\n  stop:  scancel --signal=USR2 {job_id}", flush=True
        )
        if not follows:
            return EXIT_DONE
        alive = _seldom(lambda: slurm.may_go_on(job_id), QUEUE_POLL_S)
        record = follow(log, folder.job(job_id), alive, stop, on_signal=lambda: False)
        if (record is None or record.end is None) and alive():
            print(f"job {job_id} goes on without this view", file=sys.stderr)
            return EXIT_DONE
    return _ended(record, folder, job_id, own_log)


def _ended(record: JobRecord | None, folder: RunFolder, job: str, supervisor_log: Path) -> int:
    """Say how a followed run ended; returns its exit code."""
    if record is None or record.exit_code is None:
        words = " ".join(last_lines(supervisor_log, 1))
        raise ClusterError(f"job {job} ended without a word of its supervisor; see {supervisor_log} ({words})")
    if record.exit_code == EXIT_STOPPED:
        print(f"{record.why}; the same command goes on from the newest checkpoint", file=sys.stderr)
    elif record.exit_code != EXIT_DONE:
        if record.failed_rank:  # rank 0's own words have been shown
            print(*last_lines(folder.rank_log(job, record.failed_rank), SHOWN_LINES), sep="\n", file=sys.stderr)
        print(f"error: {record.why}; logs: {folder.logs}", file=sys.stderr)
    return record.exit_code


def _seldom(question: Callable[[], bool], every_s: float) -> Callable[[], bool]:
    """`question`, asked at most every `every_s`; the last answer in between."""
    asked_s, answer = float("-inf"), True

    def cached() -> bool:
        nonlocal asked_s, answer
        if time.monotonic() - asked_s >= every_s:
            asked_s, answer = time.monotonic(), question()
        return answer

    return cached
