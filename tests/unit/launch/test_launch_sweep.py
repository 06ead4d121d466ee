"""Several runs from one config: combinations, names, tables, refusals."""

import json
from pathlib import Path

import pytest

from ii_dist.config import ConfigError, RunConfig
from launch.numbers import duration
from launch.sweep import read_sweep, require_names_of_their_own, split_values, with_name_of_point
from tests.unit.launch.test_launch_command_line import CLUSTER, CONFIG, launch


def test_every_combination_once() -> None:
    assert read_sweep(["optim.lr=0.5,1,2", "model.gate=se,fold3x3"]) == [
        ("optim.lr=0.5", "model.gate=se"),
        ("optim.lr=0.5", "model.gate=fold3x3"),
        ("optim.lr=1", "model.gate=se"),
        ("optim.lr=1", "model.gate=fold3x3"),
        ("optim.lr=2", "model.gate=se"),
        ("optim.lr=2", "model.gate=fold3x3"),
    ]
    assert read_sweep([]) == [()]


def test_commas_within_brackets_belong_to_a_value() -> None:
    assert split_values("[0.1,0.2], {a: [1,2]} ,3") == ["[0.1,0.2]", "{a: [1,2]}", "3"]


@pytest.mark.parametrize(
    "texts",
    [
        ["optim.lr"],
        ["=1,2"],
        ["optim.lr=1,,2"],
        ["optim.lr=1,1"],
        ["optim.lr=1", "optim.lr=2"],
        ["launch.nodes=1,2"],
        ["name=a,b"],
        [f"seed={','.join(map(str, range(300)))}"],
    ],
)
def test_what_is_no_sweep(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match="--sweep"):
        read_sweep(texts)


@pytest.mark.parametrize(
    ("point", "name"),
    [
        ((), "trial"),
        (("optim.lr=0.5", "model.gate=se"), "trial-lr_0.5-gate_se"),
        (("data.size_schedule=[[0, 160], [65, 160]]",), "trial-size_schedule_0_160_65_160"),
        (("optim.lr=1e-3\ntouch canary",), "trial-lr_1e-3_touch_canary"),
        ((f"model.network={'x' * 80}",), "trial-007"),
    ],
)
def test_names_say_the_values_and_are_plain_words(point: tuple[str, ...], name: str) -> None:
    named = with_name_of_point(RunConfig(name="trial"), point, 7)
    assert named.name == name
    RunConfig(name=named.name)


def test_two_runs_never_share_a_folder() -> None:
    with pytest.raises(ConfigError, match="called b"):
        require_names_of_their_own(["a", "b", "b"])


@pytest.fixture
def asked(tmp_path: Path) -> tuple[object, ...]:
    """A submission of a sweep of six runs to SLURM."""
    config, cluster = tmp_path / "trial.yaml", tmp_path / "cluster.yaml"
    config.write_text(CONFIG.format(folder=tmp_path))
    cluster.write_text(CLUSTER)
    return ("submit", config, "--cluster", cluster, "--sweep", "optim.lr=0.5,1", "seed=0,1,2", "train.epochs=2")


def test_dry_run_of_a_sweep_is_one_array_and_its_runs(asked: tuple[object, ...], tmp_path: Path) -> None:
    shown = launch(*asked, "--dry-run", "--parallel", "2")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("#!/bin/bash") == 1
    lines = shown.stdout.splitlines()
    shared = tmp_path / "runs" / "trial.sweep"
    assert "#SBATCH --array=0-5%2" in lines
    assert "#SBATCH --job-name=trial" in lines
    assert f"#SBATCH --output={shared}/jobs/submitit/%A_%a_0_log.out" in lines
    (step,) = [line for line in lines if line.startswith("srun ")]
    assert f"--output {shared}/jobs/submitit/%A_%a_%t_log.out " in step
    assert f"PYTHONPATH={shared}/code/" in step
    assert step.endswith(f"-u -m launch.task {shared}/jobs/submitit")
    assert "# trial-lr_1-seed_2    1         2" in lines
    assert "# the first of 6 runs; all of them, at most 2 at once:" in lines
    assert f"# run     trial-lr_0.5-seed_0 in {tmp_path}/runs/trial-lr_0.5-seed_0" in lines
    assert not (tmp_path / "runs").exists()


def test_dry_run_of_a_sweep_as_json_and_what_it_comes_to(asked: tuple[object, ...], tmp_path: Path) -> None:
    speed = "launch.expected_images_per_s_per_rank=0.1"
    told = json.loads(launch(*asked, "--dry-run", "--json", speed).stdout)
    assert told["parallel"] == 6
    assert "#SBATCH --array=0-5%6\n" in told["sbatch"]
    runs = told["runs"]
    assert runs[-1]["choice"] == ["optim.lr=1", "seed=2"]
    assert runs[0]["folder"] == f"{tmp_path}/runs/trial-lr_0.5-seed_0"
    assert {run["plan"]["total_steps"] for run in runs} == {8}  # one value is an override like any other
    hours = runs[0]["account"]["hours"]
    total = next(line for line in launch(*asked, "--dry-run", speed, "--parallel", "2").stdout.splitlines()[::-1])
    jobs = 6 * runs[0]["account"]["jobs"]
    assert total == f"# in all  {jobs} job(s), {6 * 2 * hours:.1f} rank-hours, {duration(3 * hours * 3600)} or more"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--parallel", "0"), "--parallel 0: needs 1 or more"),
        (("--follow",), "--follow: shows one run"),
        (("launch.executor=local", "launch.nodes=1"), "--sweep: on this machine"),
        (("name=x", "--parallel", "-3"), "--parallel -3: needs 1 or more"),
    ],
)
def test_what_a_sweep_cannot_be(asked: tuple[object, ...], more: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = launch(*asked, *more)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert words in done.stderr
    assert not (tmp_path / "runs").exists()


def test_parallel_is_for_sweeps(asked: tuple[object, ...]) -> None:
    done = launch(*asked[:4], "--sweep", "seed=1", "--parallel", "2", "--dry-run")
    assert done.returncode == 2
    assert "--parallel: says how many runs of a sweep" in done.stderr


def test_a_container_sees_what_the_runs_share_and_their_data(asked: tuple[object, ...], tmp_path: Path) -> None:
    image = ("launch.container.kind=apptainer", "launch.container.image=/images/ii.sif")
    data = ("--sweep", "data.root=/fast/a,/fast/b")
    text = launch(*asked[:4], *image, "--dry-run", *data).stdout
    for mounted in (tmp_path / "runs", Path("/fast/a"), Path("/fast/b")):
        assert text.count(f"--bind {mounted}:{mounted} ") == 1
