"""`launch why` after real runs that fail for real: the cause in its class, with the record and from the logs alone."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.small_disk import mounted
from tests.tiny_run import CONFIG
from tests.unit.launch.cases import ROOT

pytestmark = pytest.mark.ranks

CAUSES = {
    "nan": (2, ["optim.lr=1e25", "optim.warmup_epochs=0", "train.max_skipped_in_a_row=2"]),
    "out_of_memory": (1, ["data.image_size=30000"]),
    "exception": (1, ["model.network=ini_resnet18", "train.global_batch=1", "data.image_size=32"]),
    "disk_full": (4, []),
}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Room for the copy of the code and for no checkpoint."""
    with mounted(tmp_path / "disk", "4m") as path:
        yield path


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=150)


@pytest.mark.parametrize("kind", CAUSES)
def test_the_cause_is_named(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    code, overrides = CAUSES[kind]
    runs = request.getfixturevalue("small_disk") if kind == "disk_full" else tmp_path / "runs"
    config, folder = tmp_path / "run.yaml", runs / "run"
    config.write_text(CONFIG + f"runs_folder: {runs}\n")
    ended = launch("submit", str(config), "name=run", "launch.max_restarts=1", *overrides)
    assert ended.returncode == code, ended.stdout + ended.stderr
    told = json.loads(launch("why", str(folder), "--json").stdout)
    assert (told["kind"], told["source"], told["rank"]) == (kind, "supervisor", 0)
    assert len(list((folder / "logs").glob("*"))) == 1
    assert "restart 1" not in (folder / "logs" / f"{told['job']}_rank_00000.log").read_text()  # it would fail again

    (record,) = (folder / "jobs").glob("local-*.json")
    facts = json.loads(record.read_text())
    facts |= {"end": None, "exit_code": None, "why": "running", "ended_as": "", "last_line": "", "failed_rank": None}
    record.write_text(json.dumps(facts))  # as a supervisor that was killed leaves it
    told = json.loads(launch("why", str(folder), "--json").stdout)
    assert (told["kind"], told["source"]) == (kind, "logs")
