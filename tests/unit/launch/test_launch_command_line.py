"""`python -m launch submit` as a user types it, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.launch.cases import ROOT

CONFIG = """
name: trial
runs_folder: {folder}/runs
data: {{source: synthetic, image_size: 32, eval_resize: 32, eval_image_size: 32, synthetic_images: 64}}
model: {{network: ini_resnet20, fold_width: 8}}
train: {{epochs: 3, global_batch: 16}}
optim: {{warmup_epochs: 0}}
engine: {{device: cpu}}
"""
CLUSTER = "launch: {executor: slurm, nodes: 2, ranks_per_node: 1, partition: main, time_minutes: 10}\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "trial.yaml"
    path.write_text(CONFIG.format(folder=tmp_path))
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    return path


def launch(*arguments: object, code: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    start = ["-c", code] if code else ["-m", "launch"]
    command = [sys.executable, *start, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, timeout=60)


def test_dry_run_needs_no_slurm_no_torch_and_writes_nothing(config: Path) -> None:
    code = (
        "import sys; from launch.__main__ import main; rc = main(sys.argv[1:]); "
        "print('torch' in sys.modules, 'numpy' in sys.modules, rc)"
    )
    before = sorted(config.parent.rglob("*"))
    cluster = config.parent / "cluster.yaml"
    done = launch("submit", config, "--cluster", cluster, "--dry-run", code=code, PATH=str(config.parent))
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[-1] == "False False 0"
    assert lines[0] == "#!/bin/bash"
    assert {"#SBATCH --nodes=2", "#SBATCH --partition=main", "#SBATCH --job-name=trial"} <= set(lines)
    assert "# ranks   2 = 2 node(s) x 1" in lines
    assert "# batch   16 = 2 ranks x 8 images (1 micro-batch(es) of 8)" in lines
    assert "# steps   4 an epoch, 12 in 3 epoch(s); 0 images of each epoch fill no batch" in lines
    assert sorted(config.parent.rglob("*")) == before


def test_overrides_stand_anywhere_and_win_over_the_cluster(config: Path) -> None:
    cluster = config.parent / "cluster.yaml"
    done = launch("submit", config, "--cluster", cluster, "launch.partition=low", "--nodes", "4", "--dry-run", "seed=7")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --partition=low" in done.stdout
    assert "#SBATCH --nodes=4" in done.stdout


def test_dry_run_without_the_data_says_so(config: Path) -> None:
    done = launch("submit", config, "--dry-run", "data.source=dali", "data.root=/nowhere/at/all")
    assert done.returncode == 0, done.stderr
    assert "# data    not readable here" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train.globl_batch=4"], 2, "did you mean train.global_batch?"),
        (["launch.ranks_per_node=3"], 2, "does not divide over 3 ranks"),
        (["--nodes", "2"], 2, "this machine is one node"),
        (["data.source=dali", "data.root=/nowhere/at/all"], 3, "/nowhere/at/all"),
        (["name=x\ntouch canary"], 2, "name"),
        (["--clutser", "x"], 2, "--clutser"),
        (["runs_folder=/proc/nowhere"], 4, "cannot be written"),
    ],
)
def test_errors_are_one_line_with_their_code(config: Path, arguments: list[str], code: int, words: str) -> None:
    done = launch("submit", config, *arguments)
    assert done.returncode == code, done.stderr
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    if "--clutser" not in arguments:  # argparse shows the usage as well
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("error: ")
    assert not (config.parent / "runs").exists()


def test_submission_without_slurm_on_the_path(config: Path) -> None:
    done = launch("submit", config, "--cluster", config.parent / "cluster.yaml", PATH=str(config.parent))
    assert done.returncode == 5
    assert done.stderr == "error: sbatch and srun not on the PATH: submit from a login node, or use --dry-run\n"
    assert not (config.parent / "runs").exists()


def test_importing_launch_is_light() -> None:
    code = (
        "import sys, launch, launch.__main__; "
        "print([m for m in ('torch', 'numpy', 'submitit', 'cloudpickle') if m in sys.modules])"
    )
    assert launch(code=code).stdout.strip() == "[]"
