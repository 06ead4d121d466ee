"""Submission to SLURM through Submitit.

In: a `RunConfig` and a `TrainJob`. Out: the sbatch text, or a submitted job's id. Everything that reaches sbatch is
checked here once more, wherever it came from: a newline in a `#SBATCH` value would be a command on the node.
"""

import contextlib
import io
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ii_dist.config import ClusterError, ConfigError, RunConfig
from launch.job import TrainJob

Parameters = dict[str, Any]
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(r"[a-z][a-z_]{0,31}")
_FOLDER = re.compile(r"/[\w./+=@,~-]*")
_ARGUMENT = re.compile(r"--[a-z-]+=[A-Za-z0-9._-]+")
_NO_EXIT_YET = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED", "STOPPED", "RESIZING")


def sbatch_parameters(cfg: RunConfig, ranks_per_node: int) -> Parameters:
    """Parameters of Submitit's SlurmExecutor: one task a node. Raises ConfigError for a value sbatch must not see."""
    launch = cfg.launch
    if launch.signal_lead_s >= launch.time_minutes * 60:
        raise ConfigError(
            f"launch.signal_lead_s {launch.signal_lead_s}: needs less than launch.time_minutes ({launch.time_minutes})"
        )
    srun_args = ["--kill-on-bad-exit=1"]
    parameters: Parameters = {
        "job_name": cfg.name,
        "nodes": launch.nodes,
        "ntasks_per_node": 1,
        "time": launch.time_minutes,
        "signal_delay_s": launch.signal_lead_s,
        "stderr_to_stdout": True,
        "wckey": None,
        "additional_parameters": {"requeue": True},
        "srun_args": srun_args,
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
    }
    if launch.gpus_per_node:
        parameters["gpus_per_node"] = launch.gpus_per_node
    if launch.mem_gb:
        parameters["mem"] = f"{launch.mem_gb}GB"
    if launch.cpus_per_rank:
        cpus = launch.cpus_per_rank * ranks_per_node
        parameters["cpus_per_task"] = cpus
        srun_args.append(f"--cpus-per-task={cpus}")  # since SLURM 22.05 a step does not take it from sbatch
    check_parameters(parameters)
    return parameters


def check_parameters(parameters: Mapping[str, Any]) -> None:
    """Raise ConfigError unless every key and value is a plain word or number."""
    for key, value in parameters.items():
        if not _KEY.fullmatch(key):
            raise ConfigError(f"sbatch parameter {key!r}: needs a plain name")
        if key == "additional_parameters":
            check_parameters(value)
        elif key == "srun_args":
            if not all(_ARGUMENT.fullmatch(argument) for argument in value):
                raise ConfigError(f"srun arguments {value!r}: need the form --name=word")
        elif not (value is None or isinstance(value, int) or (isinstance(value, str) and _WORD.fullmatch(value))):
            raise ConfigError(f"sbatch {key} {value!r}: needs 1 to 64 letters, digits, '.', '_' or '-'")


def check_folder(folder: Path) -> None:
    """Raise ConfigError for a folder whose name sbatch or srun would read as more than a path."""
    if not _FOLDER.fullmatch(str(folder)) or not str(folder).isprintable():
        raise ConfigError(
            f"runs_folder: {str(folder)!r} reaches sbatch; use letters, digits and . _ + = @ , ~ - in its path"
        )


def sbatch_text(folder: Path, parameters: Parameters) -> str:
    """What Submitit would hand to sbatch, from its own renderer. Needs no SLURM and writes nothing."""
    executor = _executor(folder, parameters, needs_srun=False)
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def require_slurm() -> None:
    """Raise ClusterError where SLURM's commands are missing."""
    if missing := [name for name in ("sbatch", "srun") if shutil.which(name) is None]:
        raise ClusterError(f"{' and '.join(missing)} not on the PATH: submit from a login node, or use --dry-run")


def submit(job: TrainJob, folder: Path, parameters: Parameters) -> str:
    """Submit `job`, return SLURM's job id. `folder` is Submitit's, private. Raises ClusterError when sbatch refuses."""
    executor = _executor(folder, parameters, needs_srun=True)
    umask = os.umask(0o077)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # Submitit prints sbatch's words, and raises them
            submitted = executor.submit(job)
    except RuntimeError as error:  # the base of Submitit's submission errors
        words = [line.removeprefix("sbatch: error: ") for line in str(error).splitlines() if line.strip()]
        raise ClusterError(f"sbatch refused the job: {'; '.join(words)}") from None
    finally:
        os.umask(umask)
    return str(submitted.job_id)


def may_go_on(job_id: str) -> bool:
    """Whether SLURM still has the job waiting, running or to be run again. An unanswered question counts as yes."""
    done = subprocess.run(
        ["squeue", "--noheader", f"--jobs={job_id}", "--states=all", "--format=%T"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode:
        return "Invalid job id" not in done.stderr
    return done.stdout.strip() in _NO_EXIT_YET


def _executor(folder: Path, parameters: Parameters, needs_srun: bool) -> Any:
    check_parameters(parameters)
    check_folder(folder)
    try:
        import submitit
    except ImportError:
        raise ClusterError("Submitit is not installed: pip install submitit==1.5.4") from None
    kind = submitit.SlurmExecutor
    if not needs_srun:
        kind = type("TextOnly", (kind,), {"affinity": classmethod(lambda cls: 2)})
    executor = kind(folder)
    executor.update_parameters(**parameters)
    return executor
