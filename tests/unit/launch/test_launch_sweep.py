"""Several runs from one config: combinations, names, tables, refusals."""

import json
from pathlib import Path

import pytest

from ii_dist.config import ConfigError, RunConfig
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


def test_dry_run_of_a_sweep_and_its_json(tmp_path: Path) -> None:
    config, cluster = tmp_path / "trial.yaml", tmp_path / "cluster.yaml"
    config.write_text(CONFIG.format(folder=tmp_path))
    cluster.write_text(CLUSTER)
    swept = ("--sweep", "optim.lr=0.5,1", "seed=0,1,2", "train.epochs=2")
    asked = ("submit", config, "--cluster", cluster, "--dry-run", *swept)
    shown = launch(*asked)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("#!/bin/bash") == 6
    assert "# trial-lr_1-seed_2    1         2" in shown.stdout
    runs = json.loads(launch(*asked, "--json").stdout)["runs"]
    assert [run["choice"] for run in runs][-1] == ["optim.lr=1", "seed=2"]
    assert {run["plan"]["total_steps"] for run in runs} == {8}  # one value is an override like any other
    assert all(f"#SBATCH --job-name={run['run']}\n" in run["sbatch"] for run in runs)
    on_this_machine = launch("submit", config, "--sweep", "optim.lr=0.5,1")
    assert on_this_machine.returncode == 2
    assert "--sweep: on this machine" in on_this_machine.stderr
    assert not (tmp_path / "runs").exists()
