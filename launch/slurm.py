"""Submission to SLURM through Submitit.

In: a `RunConfig` and a `TrainJob`. Out: the sbatch text, or a submitted job's id. Everything that reaches sbatch is
checked here once more, wherever it came from: a newline in a `#SBATCH` value would be a command on the node.
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ii_dist.config import ClusterError, ConfigError, RunConfig
from launch.job import TrainJob
from launch.scheduler import may_go_on
from launch.task import task_command

Parameters = dict[str, Any]
Words = tuple[str, ...]
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_WORD = re.compile(_NAME)
_LISTS = {"constraint": re.compile(rf"{_NAME}([&|]{_NAME})*"), "exclude": re.compile(rf"{_NAME}(,{_NAME})*")}
"""Parameters whose value may be several words, and how they are joined."""
_KEY = re.compile(r"[a-z][a-z_]{0,31}")
_FOLDER = re.compile(r"/[\w./+=@,~-]*")
_ARGUMENT = re.compile(r"--[a-z-]+=[A-Za-z0-9._/:@#+,-]+")
_SETUP = re.compile(
    r"module load( [A-Za-z0-9][A-Za-z0-9._+/-]*)+|export [A-Za-z_][A-Za-z0-9_]*=(|[\w.,:=/@%+-]+|'[\w.,:;=/@%+ -]*')",
    re.ASCII,
)
"""The only lines of a shell that a submission may bring: modules and variables."""

__all__ = [
    "check_folder",
    "check_parameters",
    "may_go_on",
    "require_slurm",
    "sbatch_parameters",
    "sbatch_text",
    "submit",
    "submit_array",
]


def sbatch_parameters(cfg: RunConfig, ranks_per_node: int, mounts: Sequence[Path] = ()) -> Parameters:
    """Parameters of Submitit's SlurmExecutor: one task a node. Raises ConfigError for a value sbatch must not see.

    mounts: folders that a container must see as they are.
    """
    launch = cfg.launch
    _check_sizes(cfg, ranks_per_node)
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
    if launch.exclude:
        parameters["exclude"] = ",".join(launch.exclude)
    if launch.exclusive:
        parameters["exclusive"] = True
    if launch.reservation:
        parameters["additional_parameters"]["reservation"] = launch.reservation
    if launch.cpus_per_rank:
        cpus = launch.cpus_per_rank * ranks_per_node
        parameters["cpus_per_task"] = cpus
        srun_args.append(f"--cpus-per-task={cpus}")  # since SLURM 22.05 a step does not take it from sbatch
    if setup := setup_lines(cfg):
        parameters["setup"] = setup
    if launch.container.kind == "pyxis":
        srun_args.append(f"--container-image={launch.container.image}")
        srun_args.append(f"--container-mounts={','.join(_mounts(cfg, mounts))}")
    check_parameters(parameters)
    return parameters


def setup_lines(cfg: RunConfig) -> list[str]:
    """Shell lines that stand before the job's own: modules, then variables."""
    lines = [f"module load {' '.join(cfg.launch.modules)}"] if cfg.launch.modules else []
    return lines + [f"export {name}={shlex.quote(value)}" for name, value in cfg.launch.environment.items()]


def python_words(cfg: RunConfig, variables: Mapping[str, str], mounts: Sequence[Path] = ()) -> Words:
    """The command that is Python on a node, in the container where there is one, with `variables` set."""
    container = cfg.launch.container
    python = sys.executable if container.kind == "none" else container.python
    words = ("env", *(f"{name}={value}" for name, value in variables.items()), python)
    if container.kind != "apptainer":
        return words
    binds = [word for mount in _mounts(cfg, mounts) for word in ("--bind", mount)]
    gpus = ["--nv"] if cfg.launch.gpus_per_node else []
    return ("apptainer", "exec", *gpus, *binds, container.image, *words)


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
        elif key == "setup":
            if not all(_SETUP.fullmatch(line) for line in value):
                raise ConfigError(f"sbatch setup {value!r}: only modules and plain variables")
        elif not (
            value is None
            or isinstance(value, int)
            or (isinstance(value, str) and _LISTS.get(key, _WORD).fullmatch(value))
        ):
            raise ConfigError(f"sbatch {key} {value!r}: needs 1 to 64 letters, digits, '.', '_' or '-'")


def check_folder(folder: Path) -> None:
    """Raise ConfigError for a folder whose name sbatch or srun would read as more than a path."""
    if not _FOLDER.fullmatch(str(folder)) or not str(folder).isprintable():
        raise ConfigError(
            f"runs_folder: {str(folder)!r} reaches sbatch; use letters, digits and . _ + = @ , ~ - in its path"
        )


def sbatch_text(folder: Path, parameters: Parameters, python: Words = (sys.executable,), elements: int = 1) -> str:
    """What Submitit would hand to sbatch, from its own renderer. Needs no SLURM and writes nothing.

    elements: of a job array; 1 = a plain job.
    """
    executor = _executor(folder, parameters, python, needs_srun=False)
    if elements > 1:
        executor.parameters["map_count"] = elements
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def require_slurm() -> None:
    """Raise ClusterError where SLURM's commands are missing."""
    if missing := [name for name in ("sbatch", "srun") if shutil.which(name) is None]:
        raise ClusterError(f"{' and '.join(missing)} not on the PATH: submit from a login node, or use --dry-run")


def submit(job: TrainJob, folder: Path, parameters: Parameters, python: Words = (sys.executable,)) -> str:
    """Submit `job`, return SLURM's job id. `folder` is Submitit's, private. Raises ClusterError when sbatch refuses.

    python: the command that is Python on a node (`python_words`).
    """
    return submit_array([job], folder, parameters, python)[0]


def submit_array(
    jobs: Sequence[TrainJob], folder: Path, parameters: Parameters, python: Words = (sys.executable,)
) -> list[str]:
    """Submit several jobs as the elements of one array, return their ids, such as 12_0, 12_1. One is a plain job.

    parameters: those of one job; `array_parallelism` = how many may run at once. Else as `submit`.
    """
    executor = _executor(folder, parameters, python, needs_srun=True)
    umask = os.umask(0o077)
    try:
        with _outside_an_array(), contextlib.redirect_stderr(io.StringIO()):  # Submitit prints sbatch's words
            submitted = executor.submit_array(jobs)
    except RuntimeError as error:  # the base of Submitit's submission errors
        words = [line.removeprefix("sbatch: error: ") for line in str(error).splitlines() if line.strip()]
        raise ClusterError(f"sbatch refused the job: {'; '.join(words)}") from None
    finally:
        os.umask(umask)
    return [str(job.job_id) for job in submitted]


@contextlib.contextmanager
def _outside_an_array() -> Iterator[None]:
    """sbatch hands its environment on: submitted from inside an array, a job would take itself for that element."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("SLURM_ARRAY_")}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _check_sizes(cfg: RunConfig, ranks_per_node: int) -> None:
    launch = cfg.launch
    if launch.signal_lead_s >= launch.time_minutes * 60:
        raise ConfigError(
            f"launch.signal_lead_s {launch.signal_lead_s}: needs less than launch.time_minutes ({launch.time_minutes})"
        )
    if cfg.engine.device == "cuda" and ranks_per_node > launch.gpus_per_node:
        raise ConfigError(
            f"launch.ranks_per_node {ranks_per_node}: needs a GPU each; launch.gpus_per_node is {launch.gpus_per_node}"
        )


def _mounts(cfg: RunConfig, folders: Sequence[Path]) -> list[str]:
    own = []
    for folder in folders:
        check_folder(folder)
        if "," in str(folder):
            raise ConfigError(f"{folder}: a container cannot mount a folder with a comma in its name")
        own.append(f"{folder}:{folder}")
    return [*own, *cfg.launch.container.mounts]


def _executor(folder: Path, parameters: Parameters, python: Words, needs_srun: bool) -> Any:
    check_parameters(parameters)
    check_folder(folder)
    command = task_command(python, folder)
    try:
        import submitit
    except ImportError:
        raise ClusterError("Submitit is not installed: pip install submitit==1.5.4") from None
    changes: dict[str, Any] = {"_submitit_command_str": property(lambda self: command)}
    if not needs_srun:
        changes["affinity"] = classmethod(lambda cls: 2)
    executor = type("CheckedExecutor", (submitit.SlurmExecutor,), changes)(folder)
    executor.update_parameters(**parameters)
    return executor
