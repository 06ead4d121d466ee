"""The whole path on a real SLURM: `python -m launch submit` trains on two nodes, stops, and goes on."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ii_dist.config import RunFolder
from launch import slurm as submission
from launch.records import JobRecord, read_record
from tests.unit.launch.cases import ROOT, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm")]

CONFIG = ROOT / "configs" / "demo" / "digits.yaml"
LIMIT_S = 150.0


def submit(config: Path, *overrides: str) -> str:
    """The job id that the command prints."""
    command = [sys.executable, "-m", "launch", "submit", str(config), *overrides]
    done = subprocess.run(
        [*command, "--cluster", "configs/clusters/slurm_test.yaml", "--no-follow"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return re.findall(r"^job (\d+) submitted: 2 node\(s\) x 1 rank\(s\)$", done.stdout, re.MULTILINE)[0]


def ended(folder: RunFolder, job: str) -> JobRecord:
    wait_until(lambda: not submission.may_go_on(job), LIMIT_S)
    record = read_record(folder.job(job))
    logs = "\n".join(path.read_text() for path in sorted(folder.logs.glob(f"{job}_rank_*.log")))
    assert record is not None, logs
    print(logs)  # shown when the test fails
    return record


def test_the_demo_s_config_trains_on_two_nodes_stops_and_goes_on(tmp_path: Path) -> None:
    """Real digits through DALI, one rank a node: the config of the demo with a cluster file laid over it."""
    digits = [sys.executable, "-m", "tools.import_dataset", "digits", "--out", str(tmp_path / "digits")]
    subprocess.run(digits, cwd=ROOT, check=True, capture_output=True, timeout=60)
    place = (f"runs_folder={tmp_path}/runs", f"data.root={tmp_path}/digits", "train.epochs=1")
    folder = RunFolder(tmp_path / "runs" / "digits")

    first = ended(folder, submit(CONFIG, *place, "train.stop_after_steps=2"))
    assert (first.exit_code, first.nodes, first.ranks) == (75, ("node1", "node2"), 2)
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step_000000002"]
    assert json.loads(folder.plan.read_text())["world_size"] == 2
    shards = {path.name for path in folder.step(2).glob("*.safetensors")}
    assert shards == {"shard_00000-of-00002.safetensors", "shard_00001-of-00002.safetensors"}

    second = ended(folder, submit(CONFIG, *place))
    assert (second.exit_code, second.why) == (0, "done")
    assert "resuming after step 2" in folder.rank_log(second.job, 0).read_text()
    assert folder.step(22).is_dir()
    steps = [json.loads(line)["step"] for line in folder.rank_metrics(1).read_text().splitlines()]
    assert max(steps) == 22
