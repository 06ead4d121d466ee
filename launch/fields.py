"""What a job carries from its submission to its nodes: plain fields, no code.

In: nothing. Out: `JobFields`, the base of `launch.job.TrainJob`, which Submitit pickles by reference.
"""

import secrets
import sys
from dataclasses import dataclass, field

from ii_dist.config import LaunchConfig
from launch.ranks import GRACE_S

TRAIN_COMMAND = (sys.executable, "-m", "ii_dist", "train")
CHECK_COMMAND = (sys.executable, "-m", "ii_dist", "check-nodes")


@dataclass(frozen=True, slots=True)
class Watch:
    """What the supervisor goes by; as in `ii_dist.config.supervision`, which says what each is."""

    hang_after_s: float = 30.0
    hang_steps: float = 5.0
    start_timeout_s: float = 1800.0
    max_restarts: int = 3
    requeue: bool = True
    bind_cores: bool = True
    preflight: bool = False
    signal_lead_s: int = 120


def watch_of(launch: LaunchConfig) -> Watch:
    return Watch(
        hang_after_s=launch.hang_after_s,
        hang_steps=launch.hang_steps,
        start_timeout_s=launch.start_timeout_s,
        max_restarts=launch.max_restarts,
        requeue=launch.requeue,
        bind_cores=launch.bind_cores,
        preflight=launch.preflight,
        signal_lead_s=launch.signal_lead_s,
    )


@dataclass(frozen=True)
class JobFields:
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
    watch: Watch = Watch()
    check_command: tuple[str, ...] = CHECK_COMMAND
    """What each rank runs for the check of the nodes; the config and a file for the answer are appended."""
    submitit_folder: str = ""
    """Where Submitit's files of this job lie; "" = jobs/submitit of the run folder."""
    secret: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    """Known to the supervisors of this submission only."""
