"""Names of everything in a run folder, format and parse side by side. Pure: touches no disk.

runs/<name>/
  config.yaml  plan.json  lease.json     what runs, who owns the folder
  index.json                             what tells its training images from others
  jobs/<job>.json  jobs/submitit/        one record a job of the chain; Submitit's own files
  jobs/submitted.jsonl                   one line a submission: job, who, when, which code
  code/<digest>/                         the code that the jobs run
  logs/<job>_rank_00000.log              what each rank printed
  tb/  metrics/rank_00000.jsonl          numbers
  profile/steps_000000100-000000104_rank_00000.json.gz   a trace of steps; profile_now asks for one
  checkpoints/step_000001000/            a committed step (made only by rename)
    COMMITTED.json  state.json  shard_00000-of-00002.safetensors ...
  summary.json                           figures of a finished run
  quarantine.jsonl                       images that could not be read, each once; not there where there are none
"""

import re
from dataclasses import dataclass
from pathlib import Path

COMMITTED = "COMMITTED.json"
STATE = "state.json"
LAST_STEP = 10**9 - 1
_STEP = re.compile(r"step_(\d{9})")
_SHARD = re.compile(r"shard_(\d{5})-of-(\d{5})\.safetensors")
_RANK_METRICS = re.compile(r"rank_(\d{5})\.jsonl")


def step_name(step: int) -> str:
    return f"step_{step:09d}"


def parse_step(name: str) -> int | None:
    """The step of a committed folder's name, or None for any other name (partial folders, backups)."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def partial_name(step: int, fence: int) -> str:
    """The hidden folder that a save is written into. `fence` keeps an earlier attempt's ghosts out of it."""
    return f".partial_{step_name(step)}_fence_{fence:06d}"


def shard_name(number: int, count: int) -> str:
    return f"shard_{number:05d}-of-{count:05d}.safetensors"


def parse_shard(name: str) -> tuple[int, int] | None:
    match = _SHARD.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths below one run folder."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def index(self) -> Path:
        """What is remembered of the training index (`ii_dist.config.index_change`)."""
        return self.root / "index.json"

    @property
    def lease(self) -> Path:
        return self.root / "lease.json"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine.jsonl"

    @property
    def jobs(self) -> Path:
        return self.root / "jobs"

    @property
    def submitted(self) -> Path:
        """One line a submission, written by whoever submits."""
        return self.jobs / "submitted.jsonl"

    @property
    def code(self) -> Path:
        """Snapshots of the code, one a submitted version."""
        return self.root / "code"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tb"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics"

    @property
    def profile(self) -> Path:
        return self.root / "profile"

    @property
    def profile_now(self) -> Path:
        """Put here by a person: trace some steps now."""
        return self.root / "profile_now"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def job(self, job: str) -> Path:
        return self.jobs / f"{job}.json"

    def rank_log(self, job: str, rank: int) -> Path:
        return self.logs / f"{job}_rank_{rank:05d}.log"

    def rank_metrics(self, rank: int) -> Path:
        return self.metrics / f"rank_{rank:05d}.jsonl"

    def trace(self, first_step: int, last_step: int, rank: int) -> Path:
        return self.profile / f"steps_{first_step:09d}-{last_step:09d}_rank_{rank:05d}.json.gz"

    def step(self, step: int) -> Path:
        return self.checkpoints / step_name(step)


def parse_rank_metrics(name: str) -> int | None:
    match = _RANK_METRICS.fullmatch(name)
    return int(match[1]) if match else None
