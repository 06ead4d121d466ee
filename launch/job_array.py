"""The runs of a sweep as one job array: each element is a run of its own, with its own folder, records and requeues.

In: planned runs that differ in keys of training. Out: the array's sbatch text, or its jobs, such as 12_0 and 12_1. What
the elements share lies beside the run folders:

    <name>.sweep/runs.json       the table of the runs, of the newest submission
    <name>.sweep/code/<digest>/  the code that all of them run
    <name>.sweep/jobs/submitit/  Submitit's own files; nobody else may enter
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ii_dist.config import ConfigError, DataError, RunFolder, UserError
from ii_dist.config.errors import EXIT_DONE
from launch import slurm
from launch.account import account_lines, plan_of
from launch.folder import own_folder, prepare_run_folder, private_folder
from launch.history import read_attempts, standing
from launch.numbers import duration, newest_commit
from launch.owner import last_submitted, one_submission, require_free
from launch.planned import PlannedRun
from launch.scheduler import LiveJob, live_jobs
from launch.snapshot import python_variables, snapshot, snapshot_folder
from launch.submitted import note_submitted
from launch.sweep import SWEEP_SUFFIX, SWEEP_TABLE, sweep_table, write_sweep


@dataclass(frozen=True, slots=True)
class Sweep:
    """Runs that are submitted together."""

    name: str
    runs: tuple[PlannedRun, ...]
    parallel: int
    """How many may run at once."""

    @property
    def folder(self) -> RunFolder:
        """What the runs share; laid out as a run folder, as far as it goes."""
        return RunFolder(self.runs[0].folder.root.parent / f"{self.name}{SWEEP_SUFFIX}")

    @property
    def submitit_folder(self) -> Path:
        return self.folder.jobs / "submitit"

    @property
    def mounts(self) -> tuple[Path, ...]:
        """What a container must see: the folder of all runs, and the data."""
        roots = [Path(run.cfg.data.root) for run in self.runs]
        return (self.folder.root.parent, *dict.fromkeys(root for root in roots if root.is_absolute()))

    def sbatch_parameters(self) -> slurm.Parameters:
        """Parameters of one element: the same for all, for keys of `launch` cannot be swept over."""
        slurm.check_folder(self.folder.root)
        first = self.runs[0]
        cfg = first.cfg.model_copy(update={"name": self.name})
        parameters = slurm.sbatch_parameters(cfg, first.ranks_per_node, self.mounts)
        return parameters | {"array_parallelism": self.parallel}

    def python_words(self, code: Path) -> slurm.Words:
        return slurm.python_words(self.runs[0].cfg, python_variables(code, os.environ), self.mounts)

    def sbatch_text(self) -> str:
        python = self.python_words(snapshot_folder(self.folder))
        return slurm.sbatch_text(self.submitit_folder, self.sbatch_parameters(), python, len(self.runs))


@dataclass(slots=True)
class Entry:
    """What becomes of one run of a sweep."""

    run: PlannedRun
    state: Literal["", "submitted", "done", "refused"] = ""
    job: str = ""
    error: UserError | None = None

    def go(self, step: Callable[["Entry"], None]) -> None:
        """Take one step towards the submission, where nothing has ended it yet."""
        if self.state == "":
            try:
                step(self)
            except UserError as error:
                self.state, self.error = "refused", error

    def row(self) -> dict[str, Any]:
        """Line of the table. The job of a run that got none now is its last one."""
        last = last_submitted(self.run.folder)
        job = self.job or (last.job if last is not None else "")
        return {"job": job, **sweep_row(self.run, None), "state": self.state, "folder": str(self.run.folder.root)}


def start_sweep(sweep: Sweep, new_config: Sequence[str], as_json: bool) -> int:
    """Submit the runs that are not done; one that is refused does not keep the others from theirs."""
    slurm.require_slurm()
    own_folder(sweep.folder.root)
    if sweep.folder.config.exists():
        raise ConfigError(f"--sweep: {sweep.folder.root} is the folder of a run; give the sweep another name=...")
    entries = [Entry(run) for run in sweep.runs]
    with one_submission(sweep.folder), contextlib.ExitStack() as locks:
        for entry in entries:
            entry.go(lambda entry: _lock(entry.run.folder, locks))
        live = live_jobs()
        for entry in entries:
            entry.go(lambda entry: _prepare(entry, live, new_config))
        if ready := [entry for entry in entries if entry.state == ""]:
            _hand_over(sweep, ready)
        rows = [entry.row() for entry in entries]
        write_sweep(sweep.folder.root / SWEEP_TABLE, rows)
    errors = [entry.error for entry in entries if entry.error is not None]
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if as_json:
        print(json.dumps({"sweep": str(sweep.folder.root), "runs": rows}))
    else:
        print("\n".join(_said(sweep, ready, rows)))
    return errors[-1].exit_code if errors else EXIT_DONE


def _lock(folder: RunFolder, locks: contextlib.ExitStack) -> None:
    own_folder(folder.root)
    locks.enter_context(one_submission(folder))


def _prepare(entry: Entry, live: Sequence[LiveJob] | None, new_config: Sequence[str]) -> None:
    """Write the run's folder, unless it is done. Raises UserError where a job has it, or another recipe."""
    run = entry.run
    if is_done(run, live):
        entry.state = "done"
        return
    require_free(run.folder, live)
    if said := prepare_run_folder(run.folder, run.cfg, new_config):
        print(said, file=sys.stderr)
    own_folder(run.folder.jobs)


def is_done(run: PlannedRun, live: Sequence[LiveJob] | None) -> bool:
    """Whether nothing is left to train, by what its last job said and by the steps that this config asks for."""
    if standing(run.folder, live, read_attempts(run.folder)).state != "done":
        return False
    try:
        wanted = plan_of(run.cfg, run.ranks).total_steps
    except DataError:  # a login node need not see the data
        return True
    return (newest_commit(run.folder) or 0) >= wanted


def _hand_over(sweep: Sweep, entries: Sequence[Entry]) -> None:
    own_folder(sweep.folder.jobs)
    folder = private_folder(sweep.submitit_folder)
    code = snapshot(sweep.folder)
    jobs = [replace(entry.run.train_job(), submitit_folder=str(folder)) for entry in entries]
    ids = slurm.submit_array(jobs, folder, sweep.sbatch_parameters(), sweep.python_words(code))
    for entry, job, job_id in zip(entries, jobs, ids, strict=True):
        entry.state, entry.job = "submitted", job_id
        note_submitted(
            entry.run.folder,
            job_id,
            job.executor,
            nodes=job.nodes,
            ranks_per_node=job.ranks_per_node,
            time_minutes=entry.run.cfg.launch.time_minutes,
            code=code.name,
            sweep=str(sweep.folder.root),
        )


def _said(sweep: Sweep, submitted: Sequence[Entry], rows: Sequence[dict[str, Any]]) -> list[str]:
    """What was done, for people."""
    lines = sweep_table([{key: value for key, value in row.items() if key != "folder"} for row in rows])
    array = submitted[0].job.partition("_")[0] if submitted else ""
    many = len(submitted)
    if many:
        kind = "job" if many == 1 else "job array"
        lines.append(f"{kind} {array}: {many} run(s), at most {min(sweep.parallel, many)} at once")
    else:
        lines.append("nothing submitted")
    shown = sweep.folder.root
    return [*lines, f"  state: python -m launch status {shown}", f"  stop:  python -m launch cancel {shown} --save"]


def sweep_row(run: PlannedRun, told: dict[str, Any] | None) -> dict[str, Any]:
    """The run and its values; with what `describe` told, what it will cost."""
    row: dict[str, Any] = {"run": run.cfg.name} | dict(choice.split("=", 1) for choice in run.choice)
    if told is not None and (account := told["account"]) is not None and account["hours"] is not None:
        row |= {"jobs": account["jobs"], "time": duration(account["hours"] * 3600)}
        row |= {"rank-hours": f"{account['gpu_hours']:.1f}"}
    return row


def dry_lines(sweep: Sweep, facts: Sequence[dict[str, Any]]) -> list[str]:
    """The account of the first run, the table of all, and what they come to. facts: what `describe` told of each."""
    lines = account_lines(sweep.runs[0], facts[0])
    lines += ["", f"the first of {len(sweep.runs)} runs; all of them, at most {sweep.parallel} at once:"]
    lines += sweep_table([sweep_row(run, told) for run, told in zip(sweep.runs, facts, strict=True)])
    accounts = [told["account"] for told in facts if told["account"] is not None]
    hours = [account["hours"] for account in accounts if account["hours"] is not None]
    if len(hours) == len(facts):
        least_s = 3600 * max(max(hours), sum(hours) / sweep.parallel)
        cost = sum(account["gpu_hours"] for account in accounts)
        jobs = sum(account["jobs"] for account in accounts)
        lines.append(f"in all  {jobs} job(s), {cost:,.1f} rank-hours, {duration(least_s)} or more")
    return lines
