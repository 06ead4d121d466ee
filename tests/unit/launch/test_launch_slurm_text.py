"""What reaches sbatch. The same text is compared with the submitted one, and run, in tests/slurm."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from ii_dist.config import ConfigError, EngineConfig, LaunchConfig, RunConfig
from launch.slurm import check_parameters, python_words, sbatch_parameters, sbatch_text

FOLDER = Path("/shared/runs/trial/jobs/submitit")


def config(**launch: Any) -> RunConfig:
    return RunConfig(name="trial", launch=LaunchConfig(executor="slurm", **launch))


def flags(text: str) -> set[str]:
    return {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")}


def test_all_flags_of_a_gpu_job() -> None:
    cfg = config(
        nodes=4,
        gpus_per_node=8,
        cpus_per_rank=16,
        mem_gb=480,
        time_minutes=90,
        signal_lead_s=240,
        partition="gpu",
        account="proj-1",
        qos="long",
        constraint="a100",
    )
    text = sbatch_text(FOLDER, sbatch_parameters(cfg, ranks_per_node=8))
    assert flags(text) == {
        "--job-name=trial",
        "--nodes=4",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
        "--cpus-per-task=128",
        "--mem=480GB",
        "--time=90",
        "--signal=USR2@240",
        "--requeue",
        "--partition=gpu",
        "--account=proj-1",
        "--qos=long",
        "--constraint=a100",
        "--open-mode=append",
        f"--output={FOLDER}/%j_0_log.out",
    }
    (command,) = [line for line in text.splitlines() if line.startswith("srun ")]
    assert "--kill-on-bad-exit=1 --cpus-per-task=128 " in command
    assert command.endswith(f"-u -m launch.task {FOLDER}")


def test_what_is_not_asked_for_is_not_sent() -> None:
    text = sbatch_text(FOLDER, sbatch_parameters(config(), ranks_per_node=1))
    named = {flag.partition("=")[0] for flag in flags(text)}
    assert not named & {"--gpus-per-node", "--mem", "--cpus-per-task", "--partition", "--account", "--qos", "--wckey"}


def test_modules_variables_and_lists_of_words() -> None:
    cfg = config(
        modules=["cuda/13.0", "gcc/13.2.0+nvptx"],
        environment={"NCCL_DEBUG": "WARN", "NOTE": "a b; c", "EMPTY": ""},
        exclude=["node3", "node7"],
        constraint="a100|h100",
        reservation="course",
        exclusive=True,
    )
    text = sbatch_text(FOLDER, sbatch_parameters(cfg, ranks_per_node=1))
    assert {"--exclude=node3,node7", "--constraint='a100|h100'", "--reservation=course", "--exclusive"} <= flags(text)
    lines = text.splitlines()
    setup = lines[lines.index("# setup") + 1 : lines.index("# command") - 1]
    assert setup == [
        "module load cuda/13.0 gcc/13.2.0+nvptx",
        "export NCCL_DEBUG=WARN",
        "export NOTE='a b; c'",
        "export EMPTY=''",
    ]


def test_the_step_starts_from_the_snapshot(tmp_path: Path) -> None:
    words = python_words(config(), {"PYTHONPATH": "/runs/trial/code/1", "PYTHONSAFEPATH": "1"})
    text = sbatch_text(FOLDER, sbatch_parameters(config(), 1), words)
    started = f"env PYTHONPATH=/runs/trial/code/1 PYTHONSAFEPATH=1 {sys.executable} -u -m launch.task {FOLDER}"
    assert next(line for line in text.splitlines() if line.startswith("srun ")).endswith(started)


def test_apptainer_runs_the_step_in_its_image() -> None:
    container = {"kind": "apptainer", "image": "/images/ii.sif", "mounts": ("/scratch:/scratch:ro",)}
    cfg = config(gpus_per_node=4, container=container)
    words = python_words(cfg, {"PYTHONPATH": "/c"}, [Path("/runs/trial"), Path("/data")])
    assert words == (
        *("apptainer", "exec", "--nv", "--bind", "/runs/trial:/runs/trial", "--bind", "/data:/data"),
        *("--bind", "/scratch:/scratch:ro", "/images/ii.sif", "env", "PYTHONPATH=/c", "python3"),
    )


def test_pyxis_gives_the_image_to_srun() -> None:
    cfg = config(container={"kind": "pyxis", "image": "nvcr.io#nvidia/pytorch:25.01-py3"})
    text = sbatch_text(FOLDER, sbatch_parameters(cfg, 1, [Path("/runs/trial")]), python_words(cfg, {}))
    (step,) = [line for line in text.splitlines() if line.startswith("srun ")]
    assert "--container-image=nvcr.io#nvidia/pytorch:25.01-py3" in shlex.split(step)
    assert "--container-mounts=/runs/trial:/runs/trial" in shlex.split(step)
    assert step.endswith(f"env python3 -u -m launch.task {FOLDER}")


ATTACK = "x\ntouch /tmp/canary"


@pytest.mark.parametrize(
    "launch",
    [
        {"modules": [ATTACK]},
        {"modules": ["x; id"]},
        {"modules": ["-x"]},
        {"exclude": [ATTACK]},
        {"exclude": ["a b"]},
        {"reservation": ATTACK},
        {"constraint": "a&&b"},
        {"constraint": f"a|{ATTACK}"},
        {"environment": {"A": ATTACK}},
        {"environment": {"A": "$(id)"}},
        {"environment": {"A": "'; id; '"}},
        {"environment": {ATTACK: "1"}},
        {"environment": {"LD_PRELOAD": "/x.so"}},
        {"environment": {"PYTHONPATH": "/x"}},
        {"environment": {"RANK": "0"}},
        {"environment": {"SLURM_JOB_ID": "1"}},
        {"container": {"kind": "apptainer"}},
        {"container": {"kind": "apptainer", "image": ATTACK}},
        {"container": {"kind": "apptainer", "image": "--fakeroot"}},
        {"container": {"kind": "pyxis", "image": "x,y"}},
        {"container": {"kind": "pyxis", "image": "x", "mounts": ["/a:/b,/etc:/etc"]}},
        {"container": {"kind": "pyxis", "image": "x", "mounts": [ATTACK]}},
        {"container": {"kind": "pyxis", "image": "x", "python": "python3 -c x"}},
    ],
)
def test_attacks_on_the_other_settings_of_a_cluster_are_refused(launch: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="LaunchConfig"):
        config(**launch)


@pytest.mark.parametrize(
    "line",
    [
        "id",
        "module load x; id",
        "module load x\nid",
        "module load $(id)",
        "module unload x",
        "export A=1; id",
        "export A='1' id",
        "export A='x\nid'",
        "export A=$(id)",
        "export A='$(id)''",
    ],
)
def test_setup_lines_are_checked_again_at_the_border(line: str) -> None:
    with pytest.raises(ConfigError, match="only modules and plain variables"):
        check_parameters({"setup": [line]})


@pytest.mark.parametrize("word", ["python\nid", "a\x00b", "a\u2028b"])
def test_the_jobs_command_is_made_of_plain_words(word: str) -> None:
    with pytest.raises(ConfigError, match="no plain word"):
        sbatch_text(FOLDER, sbatch_parameters(config(), 1), ("env", word))


def test_more_ranks_than_gpus_are_refused() -> None:
    cfg = config(gpus_per_node=4).model_copy(update={"engine": EngineConfig(device="cuda")})
    sbatch_parameters(cfg, 4)
    with pytest.raises(ConfigError, match=r"launch\.ranks_per_node 8: needs a GPU each; launch\.gpus_per_node is 4"):
        sbatch_parameters(cfg, 8)


PAYLOADS = [
    "x\ntouch /tmp/canary",
    "x\\'\"\ntouch /tmp/canary\n#",  # passes Submitit's quoting and sbatch's parser
    "x\n",
    "x\rtouch /tmp/canary",
    "x\u2028touch /tmp/canary",
    "x\x00y",
    "$(touch /tmp/canary)",
    "`touch /tmp/canary`",
    "x;touch /tmp/canary",
    "x --wrap=touch",
    "-rf",
    "--wrap=id",
    "%j",
    "",
    "x" * 65,
]
WORDS = ["job_name", "partition", "account", "qos", "constraint"]


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("key", WORDS)
def test_attacks_are_refused_by_the_config_and_again_at_the_border(key: str, payload: str) -> None:
    cfg = config(partition="ok", account="ok", qos="ok", constraint="ok")
    if key == "job_name":
        with pytest.raises(ValueError, match="name"):
            RunConfig(name=payload)
        bad = cfg.model_copy(update={"name": payload})  # model_copy does not validate
    else:
        with pytest.raises(ValueError, match=key):
            LaunchConfig(**{key: payload})
        bad = cfg.model_copy(update={"launch": cfg.launch.model_copy(update={key: payload})})
    with pytest.raises(ConfigError, match=f"sbatch {key} ") as error:
        sbatch_parameters(bad, 1)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError):
        sbatch_text(FOLDER, {**sbatch_parameters(cfg, 1), key: payload})


@pytest.mark.parametrize(
    "parameters",
    [
        {"additional_parameters": {"x\ntouch": "y"}},
        {"additional_parameters": {"requeue": "x\ny"}},
        {"srun_args": ["--export=ALL\nid"]},
        {"srun_args": ["; id"]},
        {"setup": ["id"]},
    ],
)
def test_keys_arguments_and_commands_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        check_parameters(parameters)


@pytest.mark.parametrize("folder", ["/runs/a b", "/runs/a\nb", "/runs/%j", "/runs/$(id)", "/runs/a'b", "/runs/a\u2028"])
def test_folders_that_sbatch_would_read_are_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match="runs_folder") as error:
        sbatch_text(Path(folder), sbatch_parameters(config(), 1))
    assert "\n" not in str(error.value)


def test_lead_longer_than_the_job_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"launch\.signal_lead_s 120: needs less than launch\.time_minutes \(2\)"):
        sbatch_parameters(config(time_minutes=2, signal_lead_s=120), 1)


def test_the_job_is_pickled_by_reference_and_holds_plain_fields() -> None:
    import cloudpickle

    from launch.job import TrainJob

    data = cloudpickle.dumps(TrainJob(run_folder="/r", executor="slurm", nodes=2, ranks_per_node=1))
    assert b"launch.job" in data
    assert len(data) < 1000
    fields = dataclasses.asdict(cloudpickle.loads(data))
    types = {type(value) for value in (*fields.pop("watch").values(), *fields.values())}
    assert types <= {str, int, float, bool, tuple, type(None)}
