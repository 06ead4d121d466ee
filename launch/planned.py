"""One run that is about to be submitted: its config, its folder, and what its job will be.

In: a resolved config. Out: the same as sbatch parameters, as the command that is Python on a node, as a `TrainJob`.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ii_dist.config import RunConfig, RunFolder
from launch import local, slurm
from launch.fields import CHECK_COMMAND, TRAIN_COMMAND, watch_of
from launch.job import TrainJob
from launch.snapshot import python_variables


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """Everything that is known of a run before it is handed over."""

    cfg: RunConfig
    folder: RunFolder
    ranks_per_node: int
    cuda_visible_devices: str | None = None
    """The submitter's CUDA_VISIBLE_DEVICES; None: not set."""
    choice: tuple[str, ...] = ()
    """key=value of this run in a sweep."""

    @property
    def ranks(self) -> int:
        return self.cfg.launch.nodes * self.ranks_per_node

    @property
    def on_slurm(self) -> bool:
        return self.cfg.launch.executor == "slurm"

    @property
    def mounts(self) -> tuple[Path, ...]:
        """What a container must see at the same place: the run folder, and the data where their path is absolute."""
        root = Path(self.cfg.data.root)
        return (self.folder.root, *([root] if root.is_absolute() else []))

    def sbatch_parameters(self) -> slurm.Parameters:
        return slurm.sbatch_parameters(self.cfg, self.ranks_per_node, self.mounts)

    def python_words(self, code: Path) -> slurm.Words:
        return slurm.python_words(self.cfg, python_variables(code, os.environ), self.mounts)

    def train_job(self) -> TrainJob:
        """The job that Submitit pickles: plain fields taken from the config."""
        umask = os.umask(0o077)
        os.umask(umask)
        launch = self.cfg.launch
        python = launch.container.python if launch.container.kind != "none" else sys.executable
        return TrainJob(
            run_folder=str(self.folder.root),
            executor=launch.executor,
            nodes=launch.nodes,
            ranks_per_node=self.ranks_per_node,
            job="" if self.on_slurm else local.new_job_name(),
            command=(python, *TRAIN_COMMAND[1:]),
            check_command=(python, *CHECK_COMMAND[1:]),
            cpus_per_rank=launch.cpus_per_rank if self.on_slurm else 0,
            master_port=launch.master_port,
            network_interface=launch.network_interface or "",
            cuda_visible_devices=None if self.on_slurm else self.cuda_visible_devices,
            umask=umask,
            watch=watch_of(launch),
        )
