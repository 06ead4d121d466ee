"""What reaches sbatch. The same text is compared with the submitted one, and run, in tests/slurm."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ii_dist.config import ConfigError, LaunchConfig, RunConfig
from launch.slurm import check_parameters, sbatch_parameters, sbatch_text

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
    types = {type(value) for value in dataclasses.asdict(cloudpickle.loads(data)).values()}
    assert types <= {str, int, float, tuple, type(None)}
