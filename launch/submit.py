"""From a config to a job: `python -m launch submit`.

In: file names and overrides. Out: a run folder, a job, and the exit code of the run where it is followed. With
`--sweep`: several of them, as one job array.
"""

import contextlib
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ii_dist.config import ConfigError, DataError, RunConfig, RunFolder, gpu_count, load_config, ranks_on_a_node
from ii_dist.config.errors import EXIT_DONE, EXIT_STOPPED, ClusterError
from launch import local, slurm
from launch.account import account_lines, describe, plan_of, refuse_impossible
from launch.folder import own_folder, prepare_run_folder, private_folder, run_folder
from launch.follow import follow, seldom, wait_gone
from launch.job import TrainJob
from launch.job_array import Sweep, dry_lines, start_sweep, sweep_row
from launch.numbers import read_numbers
from launch.owner import one_submission, require_free
from launch.planned import PlannedRun
from launch.ranks import StopSignals, last_lines
from launch.records import JobRecord
from launch.rounds import SHOWN_LINES
from launch.scheduler import live_jobs
from launch.snapshot import python_variables, snapshot, snapshot_folder
from launch.submitted import note_submitted
from launch.sweep import Point, read_sweep, require_names_of_their_own, sweep_table, with_name_of_point

QUEUE_POLL_S = 5.0


@dataclass(frozen=True, slots=True)
class Submission:
    """What the command line asks for."""

    config: Path
    overrides: tuple[str, ...] = ()
    cluster: Path | None = None
    nodes: int | None = None
    sweep: tuple[str, ...] = ()
    parallel: int | None = None
    """How many runs of a sweep may run at once; None = all."""
    dry_run: bool = False
    follow: bool | None = None
    """None = follow a local run, not a job in a queue."""
    new_config: tuple[str, ...] = ()
    """Keys that may differ from what the run was started with."""
    as_json: bool = False


def submit_run(asked: Submission, environ: Mapping[str, str]) -> int:
    """Do what is asked; returns the command's exit code. Raises UserError before anything is started."""
    points = read_sweep(asked.sweep)
    runs = [_planned(asked, point, number, environ) for number, point in enumerate(points)]
    require_names_of_their_own([run.cfg.name for run in runs])
    sweep = _sweep_of(asked, runs)
    if asked.dry_run:
        return _dry_run(runs, sweep, asked.as_json)
    for run in runs:
        _check(run)
    if sweep is None:
        return _start(runs[0], asked)
    if asked.follow:
        raise ConfigError("--follow: shows one run, and a sweep is several; look at them with python -m launch status")
    if not runs[0].on_slurm:
        raise ConfigError("--sweep: on this machine the runs would share its cores; give --cluster FILE, or --dry-run")
    sweep.sbatch_parameters()
    return start_sweep(sweep, asked.new_config, asked.as_json)


def _sweep_of(asked: Submission, runs: list[PlannedRun]) -> Sweep | None:
    """The sweep that is asked for. Raises ConfigError for a --parallel that has no sense."""
    if not asked.sweep:
        if asked.parallel is not None:
            raise ConfigError("--parallel: says how many runs of a sweep run at once; give --sweep with several values")
        return None
    parallel = len(runs) if asked.parallel is None else asked.parallel
    if parallel < 1:
        raise ConfigError(f"--parallel {parallel}: needs 1 or more")
    return Sweep(_load(asked, ()).name, tuple(runs), min(parallel, len(runs)))


def _load(asked: Submission, point: Point) -> RunConfig:
    overrides = [*asked.overrides, *([f"launch.nodes={asked.nodes}"] if asked.nodes is not None else []), *point]
    return load_config(asked.config, overrides, layers=[asked.cluster] if asked.cluster else [])


def _planned(asked: Submission, point: Point, number: int, environ: Mapping[str, str]) -> PlannedRun:
    cfg = with_name_of_point(_load(asked, point), point, number)
    launch = cfg.launch
    if launch.executor == "local" and launch.nodes > 1:
        raise ConfigError(f"launch.nodes {launch.nodes}: this machine is one node; give --cluster FILE for SLURM")
    if launch.executor == "local" and (launch.container.kind != "none" or launch.modules):
        raise ConfigError("launch.container and launch.modules: are for launch.executor slurm; give --cluster FILE")
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    return PlannedRun(cfg, run_folder(cfg), ranks_on_a_node(cfg, gpu_count(environ)), visible, point)


def _check(run: PlannedRun) -> None:
    """Refuse now what every rank, or sbatch, would refuse later. A login node need not see the data."""
    try:
        plan_of(run.cfg, run.ranks)
    except DataError:
        if not run.on_slurm:
            raise
    refuse_impossible(run, read_numbers(run.folder))
    if run.on_slurm:
        run.sbatch_parameters()
        slurm.check_folder(run.folder.root)


def _dry_run(runs: list[PlannedRun], sweep: Sweep | None, as_json: bool) -> int:
    if sweep is not None and runs[0].on_slurm:
        return _dry_run_of_array(sweep, as_json)
    facts = [describe(run) | {"sbatch": _sbatch_text(run)} for run in runs]
    if as_json:
        print(json.dumps({"runs": facts}, indent=1))
        return EXIT_DONE
    for run, told in zip(runs, facts, strict=True):
        local_command = shlex.join([*TrainJob.command, str(run.folder.config)])
        print(told["sbatch"] or f"# on this machine, {run.ranks_per_node} times: {local_command}")
        for line in account_lines(run, told):
            print(f"# {line}")
    if len(runs) > 1:
        print("#", *sweep_table([sweep_row(run, told) for run, told in zip(runs, facts, strict=True)]), sep="\n# ")
    return EXIT_DONE


def _dry_run_of_array(sweep: Sweep, as_json: bool) -> int:
    facts, text = [describe(run) for run in sweep.runs], sweep.sbatch_text()
    if as_json:
        print(json.dumps({"sbatch": text, "parallel": sweep.parallel, "runs": facts}, indent=1))
    else:
        print(text, *(f"# {line}".rstrip() for line in dry_lines(sweep, facts)), sep="\n")
    return EXIT_DONE


def _sbatch_text(run: PlannedRun) -> str | None:
    if not run.on_slurm:
        return None
    python = run.python_words(snapshot_folder(run.folder))
    return slurm.sbatch_text(run.folder.jobs / "submitit", run.sbatch_parameters(), python)


def _start(run: PlannedRun, asked: Submission) -> int:
    job, handle, submitit_folder = _hand_over(run, asked)
    if asked.as_json:
        print(json.dumps({"runs": [_handed_over(run, job)]}), flush=True)
        return EXIT_DONE
    if handle is not None:
        return _watch_local(job, run.folder, handle, follows=asked.follow is not False)
    _say_submitted(job, run)
    return _watch_slurm(job, run.folder, submitit_folder) if asked.follow else EXIT_DONE


def _hand_over(run: PlannedRun, asked: Submission) -> tuple[TrainJob, local.LocalHandle | None, Path]:
    """Write the run folder and hand the job over, alone in the folder. Raises ClusterError where a job has it."""
    if run.on_slurm:
        slurm.require_slurm()
    own_folder(run.folder.root)
    with one_submission(run.folder):
        require_free(run.folder, live_jobs() if run.on_slurm else [])
        if (said := prepare_run_folder(run.folder, run.cfg, asked.new_config)) and not asked.as_json:
            print(said, flush=True)
        own_folder(run.folder.jobs)
        submitit_folder = private_folder(run.folder.jobs / "submitit")
        code = snapshot(run.folder)
        job = run.train_job()
        handle = None
        if run.on_slurm:
            job = replace(job, job=slurm.submit(job, submitit_folder, run.sbatch_parameters(), run.python_words(code)))
        else:
            with _variables({**run.cfg.launch.environment, **python_variables(code, os.environ)}):
                handle = local.submit(job, submitit_folder)
        _note(job, run.folder, handle, time_minutes=run.cfg.launch.time_minutes, code=code.name)
    return job, handle, submitit_folder


def _handed_over(run: PlannedRun, job: TrainJob) -> dict[str, Any]:
    return {"run": run.cfg.name, "folder": str(run.folder.root), "job": job.job, "nodes": job.nodes, "ranks": run.ranks}


@contextlib.contextmanager
def _variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables for what is started inside: Submitit's local executor takes them from here and from nowhere else."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def submit_local(job: TrainJob, folder: RunFolder, submitit_folder: Path, follows: bool) -> int:
    """Run `job` on this machine; with `follows` show it, pass Ctrl-C on and return its exit code."""
    handle = local.submit(job, submitit_folder)
    _note(job, folder, handle)
    return _watch_local(job, folder, handle, follows)


def _note(job: TrainJob, folder: RunFolder, handle: local.LocalHandle | None, **facts: Any) -> None:
    sizes = {"nodes": job.nodes, "ranks_per_node": job.ranks_per_node}
    note_submitted(folder, job.job, job.executor, pid=0 if handle is None else handle.pid, **sizes, **facts)


def _watch_local(job: TrainJob, folder: RunFolder, handle: local.LocalHandle, follows: bool) -> int:
    with StopSignals() as stop:
        log, record_path = folder.rank_log(job.job, 0), folder.job(job.job)
        if not follows:
            print("\n".join([f"job {job.job} runs in the background", *_command_lines(folder)]))
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


def _say_submitted(job: TrainJob, run: PlannedRun) -> None:
    said = f"job {job.job} submitted: {job.nodes} node(s) x {job.ranks_per_node} rank(s)"
    print("\n".join([said, *_command_lines(run.folder), *tensorboard_lines(run.folder)]), flush=True)


def _command_lines(folder: RunFolder) -> list[str]:
    shown = shlex.quote(str(folder.root))
    return [
        f"  state: python -m launch status {shown}",
        f"  watch: python -m launch logs {shown} --follow",
        f"  stop:  python -m launch cancel {shown} --save",
    ]


def tensorboard_lines(folder: RunFolder) -> list[str]:
    """How to look at the curves: TensorBoard on this machine for this machine only, and a tunnel to it."""
    port = 6006
    return [
        f"  curves: tensorboard --host localhost --port {port} --logdir {shlex.quote(str(folder.tensorboard))}",
        f"          from your own machine: ssh -L {port}:localhost:{port} {socket.gethostname()}, then"
        f" http://localhost:{port}",
    ]


def _watch_slurm(job: TrainJob, folder: RunFolder, submitit_folder: Path) -> int:
    """Show the job until it ends; returns its exit code, 0 where the user leaves first."""
    job_id = job.job
    with StopSignals() as stop:
        log, own_log = folder.rank_log(job_id, 0), submitit_folder / f"{job_id}_0_log.out"
        alive = seldom(lambda: slurm.may_go_on(job_id), QUEUE_POLL_S)
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
