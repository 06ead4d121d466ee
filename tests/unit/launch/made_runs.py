"""Run folders written by hand, as supervisors and ranks leave them: whatever their size, without running anything."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ii_dist.config import RunConfig, RunFolder, dump_config
from ii_dist.config.run_folder import COMMITTED
from launch.scheduler import LiveJob

EPOCH_S = 1_800_000_000.0
"""When the runs of these tests begin, Unix time."""


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(EPOCH_S + seconds, UTC).isoformat(timespec="milliseconds")


def stamp(seconds: float) -> str:
    return iso(seconds).removesuffix("+00:00") + "Z"


class MadeRun:
    """A run of 1000 steps of 64 images. Seconds count from `EPOCH_S`."""

    def __init__(self, root: Path, name: str = "made") -> None:
        self.folder = RunFolder(root / name)
        for path in (self.folder.jobs, self.folder.logs, self.folder.metrics, self.folder.checkpoints):
            path.mkdir(parents=True)
        self.folder.config.write_text(dump_config(RunConfig(name=name, runs_folder=str(root))))
        self.folder.plan.write_text(json.dumps({"total_steps": 1000, "global_batch": 64}))

    def submitted(self, job: str, seconds: float = 0.0, **facts: Any) -> None:
        entry = {
            "job": job,
            "executor": "slurm",
            "host": "login",
            "submitted": iso(seconds),
            "nodes": 2,
            "ranks_per_node": 1,
            "time_minutes": 60,
        }
        with self.folder.submitted.open("a") as file:
            file.write(json.dumps(entry | facts) + "\n")

    def record(self, job: str, start: float = 60.0, end: float | None = None, **facts: Any) -> dict[str, Any]:
        """Write node 0's record, or with node_rank another's; returned for `earlier`."""
        record = {
            "job": job,
            "attempt": 0,
            "host": "node1",
            "nodes": ["node1", "node2"],
            "node_rank": 0,
            "ranks": 2,
            "supervisor_pid": 1,
            "start": iso(start),
            "end": None if end is None else iso(end),
            "why": "running",
        } | facts
        node = record["node_rank"]
        name = job if node == 0 else f"{job}_node_{node:05d}"
        self.folder.job(name).write_text(json.dumps(record))
        return record

    def log(self, job: str, rank: int, *texts: str, attempt: int = 0, start: float = 60.0, ranks: int = 2) -> None:
        """Append an attempt to a rank's log, a line a second."""
        with self.folder.rank_log(job, rank).open("a") as file:
            file.write(f"== job {job} attempt {attempt} rank {rank} of {ranks} on node{rank}, {iso(start)}\n")
            for number, text in enumerate(texts):
                file.write(f"{stamp(start + 1 + number)} {rank}| {text}\n")

    def numbers(self, step: int, seconds: float = 100.0, **tags: float) -> None:
        with self.folder.rank_metrics(0).open("a") as file:
            named = {name.replace("__", "/"): value for name, value in tags.items()}
            file.write(json.dumps({"step": step, "time": EPOCH_S + seconds, **named}) + "\n")

    def commit(self, step: int) -> None:
        self.folder.step(step).mkdir()
        (self.folder.step(step) / COMMITTED).write_text("{}")

    def beats(self, job: str, node: int, **lives: dict[str, Any]) -> None:
        path = self.folder.jobs / job / f"beats_node_{node:05d}.json"
        path.parent.mkdir(exist_ok=True)
        ranks = {name.removeprefix("rank"): life for name, life in lives.items()}
        path.write_text(json.dumps({"job": job, "attempt": 0, "node_rank": node, "ranks": ranks}))

    def live(self, job: str, state: str = "RUNNING", **more: Any) -> LiveJob:
        """The job as squeue shows it."""
        facts: dict[str, Any] = {
            "raw_id": job,
            "reason": "None",
            "submitted_s": EPOCH_S,
            "start_s": EPOCH_S + 59,
            "end_s": EPOCH_S + 3600,
            "dependency": "(null)",
            "nodes": "node[1-2]",
            "script": f"{self.folder.jobs}/submitit/.submission_file_0.sh",
        }
        return LiveJob(job, state=state, **(facts | more))
