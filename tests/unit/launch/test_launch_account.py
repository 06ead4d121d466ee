"""What a run will cost: sizes counted on paper, time, jobs, disk, and refusals."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ii_dist.config import ConfigError, ModelConfig, RunConfig, make_plan
from ii_dist.config.plan import DataFacts
from launch.account import account_lines, account_of, describe, refuse_impossible
from launch.folder import run_folder
from launch.numbers import Numbers, duration, gigabytes, read_numbers
from launch.planned import PlannedRun
from launch.weights import checkpoint_bytes, count_numbers
from tests.tiny_run import train_tiny_run
from tests.unit.launch.cases import ROOT
from tests.unit.launch.made_runs import MadeRun

IMAGENET = DataFacts(1_281_167, 50_000, 1000)


def planned(tmp_path: Path, nodes: int = 2, **more: Any) -> PlannedRun:
    launch = {"executor": "slurm", "nodes": nodes, "gpus_per_node": 8, "time_minutes": 720, "signal_lead_s": 300}
    data = {"source": "synthetic", "synthetic_images": 1_281_167}
    values: dict[str, Any] = {"name": "r", "runs_folder": str(tmp_path), "data": data, "train": {"global_batch": 1024}}
    values |= {key: value for key, value in more.items() if key != "launch"}
    cfg = RunConfig.model_validate(values | {"launch": launch | more.get("launch", {})})
    return PlannedRun(cfg, run_folder(cfg), 8)


@pytest.mark.parametrize(
    ("network", "gate", "more"),
    [
        ("ini_resnet18", "se", {}),
        ("ini_resnet50", "fold3x3", {}),
        ("ini_resnet50d", "pair1x1", {}),
        ("ini_resnext50_32x4d", "none", {}),
        ("ini_resnet20", "double_fc", {"gate_reduction": 2}),
        ("ini_preresnet20", "pair2x1", {"lens_filters": 3}),
        ("ini_preresnet20", "fold3x3", {"lens_kernel": 1, "fold_width": 4}),
        ("ini_wrn16_8", "fold3x3", {}),
    ],
)
def test_numbers_counted_on_paper_are_those_of_the_network(network: str, gate: str, more: dict[str, Any]) -> None:
    import torch

    from ii_dist.models import create_model

    cfg = ModelConfig(network=network, gate=gate, **more)
    with torch.device("meta"):
        model = create_model(cfg, 10)
    kept = model.state_dict()
    statistics = sum(b.numel() for name, b in model.named_buffers() if name in kept and b.is_floating_point())
    counted = count_numbers(cfg, 10)
    assert (counted.weights, counted.statistics) == (sum(p.numel() for p in model.parameters()), statistics)


def test_a_real_checkpoint_is_as_large_as_it_was_said_to_be(tmp_path: Path) -> None:
    folder = train_tiny_run(tmp_path)
    from ii_dist.config import load_config

    real = sum(path.stat().st_size for path in (folder / "checkpoints/step_000000004").glob("*.safetensors"))
    assert checkpoint_bytes(load_config(folder / "config.yaml"), 4) == pytest.approx(real, rel=0.05)


def test_time_jobs_and_cost(tmp_path: Path) -> None:
    """By hand: 1251 steps x 1024 images x 90 epochs at 2500 x 16 images/s, 12 h less 300 s and 120 s a job."""
    run = planned(tmp_path, launch={"expected_images_per_s_per_rank": 250.0})
    account = account_of(run, make_plan(run.cfg, 16, IMAGENET), Numbers())
    images, usable_s = 1251 * 1024 * 90, 720 * 60 - 300 - 120
    assert account.needed_images_per_s == pytest.approx(images / usable_s)
    assert account.images_per_s == 4000
    assert account.epochs_per_job == pytest.approx(4000 * usable_s / (1251 * 1024))
    assert (account.jobs, account.requeues) == (math.ceil(images / 4000 / usable_s), 0)
    slower = account_of(run, make_plan(run.cfg, 16, IMAGENET), Numbers(images_per_s=1000.0, world_size=16))
    assert (slower.jobs, slower.requeues) == (3, 2)
    assert slower.hours == pytest.approx((images / 1000 + 3 * 120) / 3600)
    assert slower.gpu_hours == pytest.approx((images / 1000 + 3 * 120) / 3600 * 16)


def test_disk(tmp_path: Path) -> None:
    run = planned(tmp_path, checkpoint={"keep_last": 4, "keep_every_steps": 10_000})
    plan = make_plan(run.cfg, 16, IMAGENET)
    account = account_of(run, plan, Numbers())
    assert account.kept_checkpoints == 4 + plan.total_steps // 10_000
    assert account.disk_bytes == account.checkpoint_bytes * account.kept_checkpoints
    measured = account_of(run, plan, Numbers(checkpoint_bytes=10**9))
    assert measured.checkpoint_bytes == 10**9


def test_without_a_speed_nothing_is_made_up(tmp_path: Path) -> None:
    run = planned(tmp_path)
    facts = describe(run)
    assert facts["account"]["jobs"] is None
    lines = account_lines(run, facts)
    assert any(line.startswith("speed   unknown: set launch.expected_images_per_s_per_rank") for line in lines)
    assert json.loads(json.dumps(facts))["plan"]["steps_per_epoch"] == 1251


def test_a_lead_shorter_than_the_measured_save_is_refused(tmp_path: Path) -> None:
    run = planned(tmp_path)
    refuse_impossible(run, Numbers(save_s=299.0))
    with pytest.raises(ConfigError, match=r"launch\.signal_lead_s 300: this run's saves took up to 350 s.*use 700"):
        refuse_impossible(run, Numbers(save_s=350.0))


def test_numbers_are_read_from_the_end_of_what_the_run_wrote(tmp_path: Path) -> None:
    run = MadeRun(tmp_path)
    assert read_numbers(run.folder) == Numbers()
    run.numbers(0, event=1, world_size=2)
    run.numbers(50, throughput__images_per_s=100.0, checkpoint__seconds=9.0, checkpoint__bytes=5e6)
    run.numbers(100, throughput__images_per_s=200.0, checkpoint__seconds=3.0)
    with run.folder.rank_metrics(0).open("a") as file:
        file.write('{"step": 150, "thr')
    found = read_numbers(run.folder)
    assert (found.step, found.images_per_s, found.world_size) == (100, 200.0, 2)
    assert (found.save_s, found.checkpoint_bytes) == (9.0, 5_000_000)


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5 s"), (89, "89 s"), (600, "10 min"), (7200, "2.0 h"), (259200, "3.0 d")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes() -> None:
    assert [gigabytes(n) for n in (1500, 2.5e6, 3.4e9, 5e12)] == ["1.5 kB", "2.5 MB", "3.4 GB", "5.0 TB"]


def test_a_dry_run_of_128_nodes_takes_less_than_a_second(tmp_path: Path) -> None:
    """CPU time of the whole process, start of Python included."""
    code = (
        "import sys, time; from launch.__main__ import main; rc = main(sys.argv[1:]); "
        "print(rc, 'torch' in sys.modules, time.process_time(), file=sys.stderr)"
    )
    command = ["submit", "configs/imagenet/ini_resnet50.yaml", "--cluster", "configs/clusters/h100.yaml", "--nodes"]
    more = ["128", "--dry-run", "train.global_batch=8192", "data.source=synthetic", "data.synthetic_images=1281167"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, *command, *more, f"runs_folder={tmp_path}"],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    rc, torch_loaded, spent_s = done.stderr.split()
    assert (rc, torch_loaded) == ("0", "False")
    assert float(spent_s) < 1.0
    assert "# ranks   1024 = 128 node(s) x 8" in done.stdout
    assert "#SBATCH --nodes=128" in done.stdout
