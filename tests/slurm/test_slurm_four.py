"""Four nodes of two ranks on a real SLURM: who they are, and a real training on all of them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ii_dist.config import RunFolder
from launch import slurm as submission
from launch.records import read_record
from tests.slurm.test_slurm_run import CONFIG, launch, status
from tests.unit.launch.cases import ROOT, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("four_nodes")]

HOSTS = ("node1", "node2", "node3", "node4")


def test_eight_ranks_on_four_nodes_train_one_run(tmp_path: Path) -> None:
    config, folder = tmp_path / "trial.yaml", RunFolder(tmp_path / "runs" / "trial")
    config.write_text(CONFIG)
    asked = [sys.executable, "-m", "launch", "submit", str(config), f"runs_folder={tmp_path}/runs", "train.epochs=1"]
    cluster = ["--cluster", "configs/clusters/slurm_test.yaml", "--nodes", "4", "launch.ranks_per_node=2"]
    done = subprocess.run([*asked, *cluster], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (job,) = re.findall(r"^job (\d+) submitted: 4 node\(s\) x 2 rank\(s\)$", done.stdout, re.MULTILINE)
    wait_until(lambda: not submission.may_go_on(job), 240)

    record = read_record(folder.job(job))
    assert record is not None
    assert (record.exit_code, record.nodes, record.ranks) == (0, HOSTS, 8), launch("logs", folder.root).stdout
    others = [read_record(folder.job(f"{job}_node_{node:05d}")) for node in (1, 2, 3)]
    assert [other and other.host for other in others] == list(HOSTS[1:])
    starts = [json.loads(folder.rank_metrics(rank).read_text().splitlines()[0]) for rank in range(8)]
    assert [(start["rank"], start["host"]) for start in starts] == [(r, HOSTS[r // 2]) for r in range(8)]
    told = status(folder)
    assert (told["state"], told["step"], told["ranks"]) == ("done", 4, 8)
    (committed,) = folder.checkpoints.iterdir()
    assert json.loads((committed / "COMMITTED.json").read_text())["world_size"] == 8
    assert len(list(committed.glob("shard_*-of-00008.safetensors"))) == 8
