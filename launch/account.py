"""What a run will cost, before anything is paid for: jobs, GPU-hours, disk; and what cannot be, refused.

In: a planned run and what it measured before, if it did. Out: an `Account`, as text or JSON. Reads the headers of the
data set's indexes and the end of one metrics file; no torch, no SLURM.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ii_dist.config import ConfigError, DataError, Plan, RunConfig, data_facts, make_plan
from launch.numbers import Numbers, duration, gigabytes, per_second, read_numbers
from launch.planned import PlannedRun
from launch.weights import checkpoint_bytes

START_S = 120.0
"""Taken off each job for its start: imports, rendezvous, the first batch."""


@dataclass(frozen=True, slots=True)
class Account:
    """What a run comes to. None where it depends on a speed that nobody has named or measured."""

    needed_images_per_s: float
    """All ranks, to be done within one job."""
    images_per_s: float | None
    speed_from: str
    epochs_per_job: float | None
    jobs: int | None
    requeues: int | None
    hours: float | None
    """In jobs; waiting in the queue comes on top."""
    gpu_hours: float | None
    """Without GPUs: rank-hours."""
    checkpoint_bytes: int
    kept_checkpoints: int
    disk_bytes: int


def plan_of(cfg: RunConfig, ranks: int) -> Plan:
    """Raises DataError where the data set is not readable here, ConfigError where the numbers do not fit."""
    return make_plan(cfg, ranks, data_facts(cfg.data))


def refuse_impossible(run: PlannedRun, before: Numbers) -> None:
    """Raise ConfigError for settings with which the run could not end well."""
    lead_s = run.cfg.launch.signal_lead_s
    if run.on_slurm and before.save_s is not None and lead_s <= before.save_s:
        raise ConfigError(
            f"launch.signal_lead_s {lead_s}: this run's saves took up to {before.save_s:.0f} s, so the time limit "
            f"would come first; use {math.ceil(2 * before.save_s / 10) * 10} or more"
        )


def account_of(run: PlannedRun, plan: Plan, before: Numbers) -> Account:
    """The account of a run from its first step. before: what it measured in earlier jobs."""
    launch = run.cfg.launch
    usable_s = max(1.0, launch.time_minutes * 60 - launch.signal_lead_s - START_S)
    images = plan.total_steps * plan.global_batch
    speed, source = _speed(run, before)
    size = before.checkpoint_bytes or checkpoint_bytes(run.cfg, plan.num_classes)
    kept = run.cfg.checkpoint.keep_last
    if every := run.cfg.checkpoint.keep_every_steps:
        kept += plan.total_steps // every
    jobs = hours = None
    if speed:
        jobs = math.ceil(images / (speed * usable_s)) if run.on_slurm else 1
        hours = (images / speed + jobs * START_S) / 3600
    epoch_images = plan.steps_per_epoch * plan.global_batch
    return Account(
        needed_images_per_s=images / usable_s,
        images_per_s=speed,
        speed_from=source,
        epochs_per_job=speed * usable_s / epoch_images if speed else None,
        jobs=jobs,
        requeues=None if jobs is None else jobs - 1,
        hours=hours,
        gpu_hours=None if hours is None else hours * run.ranks,
        checkpoint_bytes=size,
        kept_checkpoints=kept,
        disk_bytes=size * kept,
    )


def describe(run: PlannedRun) -> dict[str, Any]:
    """What this submission would be, as JSON. Raises ConfigError where it cannot be."""
    before = read_numbers(run.folder)
    refuse_impossible(run, before)
    facts: dict[str, Any] = {
        "run": run.cfg.name,
        "folder": str(run.folder.root),
        "ranks": run.ranks,
        "nodes": run.cfg.launch.nodes,
        "choice": list(run.choice),
    }
    try:
        plan = plan_of(run.cfg, run.ranks)
    except DataError as error:
        return facts | {"plan": None, "account": None, "unknown": str(error)}
    account = account_of(run, plan, before)
    return facts | {"plan": dataclasses.asdict(plan), "account": dataclasses.asdict(account)}


def account_lines(run: PlannedRun, facts: dict[str, Any]) -> list[str]:
    """`describe` for people."""
    cfg = run.cfg
    lines = [
        f"run     {cfg.name} in {run.folder.root}",
        f"ranks   {run.ranks} = {cfg.launch.nodes} node(s) x {run.ranks_per_node}",
    ]
    if facts["plan"] is None:
        return [*lines, f"data    not readable here, so steps are unknown: {facts['unknown']}"]
    plan, account = Plan(**facts["plan"]), Account(**facts["account"])
    lines += [
        f"data    {plan.train_images} training and {plan.eval_images} evaluation images, {plan.num_classes} classes",
        f"batch   {plan.global_batch} = {run.ranks} ranks x {plan.images_per_rank} images"
        f" ({_micro_batches(cfg, plan)})",
        f"steps   {plan.steps_per_epoch} an epoch, {plan.total_steps} in {cfg.train.epochs:g} epoch(s);"
        f" {plan.dropped_images_per_epoch} images of each epoch fill no batch",
        f"rate    peak learning rate {plan.peak_lr:g}",
    ]
    if run.on_slurm:
        lines.append(
            f"time    {duration(cfg.launch.time_minutes * 60)} a job, told to stop {cfg.launch.signal_lead_s} s before;"
            f" {per_second(account.needed_images_per_s)} images/s"
            f" ({per_second(account.needed_images_per_s / run.ranks)} a rank)"
            " would do it in one job"
        )
    return [*lines, *_speed_lines(run, account), _disk_line(cfg, account)]


def _speed_lines(run: PlannedRun, account: Account) -> list[str]:
    if account.images_per_s is None or account.hours is None or account.gpu_hours is None:
        return ["speed   unknown: set launch.expected_images_per_s_per_rank for jobs, requeues and GPU-hours"]
    unit = "GPU-hours" if run.cfg.engine.device != "cpu" and _gpus(run.cfg) else "rank-hours"
    lines = [
        f"speed   {per_second(account.images_per_s)} images/s ({per_second(account.images_per_s / run.ranks)} a rank;"
        f" {account.speed_from})"
    ]
    if run.on_slurm:
        lines.append(
            f"jobs    {account.epochs_per_job:.1f} epochs a job: {account.jobs} job(s), {account.requeues} requeue(s)"
        )
    return [*lines, f"cost    {duration(account.hours * 3600)} in jobs, {account.gpu_hours:,.1f} {unit}"]


def _disk_line(cfg: RunConfig, account: Account) -> str:
    lead = ""
    if cfg.launch.executor == "slurm":
        rate = account.checkpoint_bytes / cfg.launch.signal_lead_s
        lead = f"; a save within the lead needs {gigabytes(rate)}/s"
    return (
        f"disk    {gigabytes(account.checkpoint_bytes)} a checkpoint x {account.kept_checkpoints} kept ="
        f" {gigabytes(account.disk_bytes)}{lead}"
    )


def _speed(run: PlannedRun, before: Numbers) -> tuple[float | None, str]:
    """Images/s of all ranks, and where that comes from."""
    if before.images_per_s and before.world_size:
        return before.images_per_s / before.world_size * run.ranks, f"as this run did on {before.world_size} rank(s)"
    if expected := run.cfg.launch.expected_images_per_s_per_rank:
        return expected * run.ranks, "launch.expected_images_per_s_per_rank"
    return None, ""


def _gpus(cfg: RunConfig) -> bool:
    return cfg.launch.gpus_per_node > 0 or cfg.launch.executor == "local"


def _micro_batches(cfg: RunConfig, plan: Plan) -> str:
    if cfg.train.max_images_per_rank == "auto":
        return "in micro-batches that fit, found when the run starts"
    return f"{plan.accumulate_steps} micro-batch(es) of {plan.micro_batch}"
