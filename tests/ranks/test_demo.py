"""What `make demo` runs: real digits, two ranks, DALI, the launcher; then the tools on what it leaves."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ii_dist.models  # noqa: F401  (makes timm importable and knows our names)

import timm  # isort: skip

pytestmark = pytest.mark.ranks
ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, float]:
    """The demo in a folder of its own: run folder, what it printed, seconds."""
    folder = tmp_path_factory.mktemp("demo")
    start = time.monotonic()
    run("tools.import_dataset", "digits", "--out", str(folder / "digits"))
    said = run(
        *["launch", "submit", "configs/demo/digits.yaml"],
        *[f"runs_folder={folder}/runs", f"data.root={folder}/digits", "engine.device=cpu"],
    )
    return folder / "runs" / "digits", said, time.monotonic() - start


def test_the_demo_learns_in_time_and_sums_up(demo: tuple[Path, str, float]) -> None:
    folder, said, seconds = demo
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["top1"] >= 97.0
    assert summary["world_size"] == 2
    assert seconds < 240
    assert said.count("images/s") > 5  # progress while it works
    for part in ("top-1", "images/s", "data wait", "step_000000198", f"tensorboard --logdir {folder}/tb"):
        assert part in said.split("digits: finished")[1]


def test_tensorboard_shows_every_step_once(demo: tuple[Path, str, float]) -> None:
    events = EventAccumulator(str(demo[0] / "tb"), size_guidance={"scalars": 0}).Reload()
    assert {"train/loss", "eval/top1", "throughput/images_per_s", "time/data_wait_share"} <= set(
        events.Tags()["scalars"]
    )
    steps = [e.step for e in events.Scalars("train/loss")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 198
    assert events.Scalars("eval/images")[-1].value == 355


def test_tools_read_the_run_back(demo: tuple[Path, str, float], tmp_path: Path) -> None:
    folder = demo[0]
    listed = run("tools.list_checkpoints", str(folder)).splitlines()
    assert [line.split()[0] for line in listed[1:4]] == ["66", "132", "198"]
    run("tools.verify_checkpoint", str(folder))
    merged = tmp_path / "digits.safetensors"
    run("tools.merge_checkpoint", str(folder / "checkpoints" / "step_000000198"), "--out", str(merged))
    model = timm.create_model("ini_resnet20", gate="fold3x3", num_classes=10, checkpoint_path=str(merged))
    saved = load_file(merged)
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    run("tools.report_run", str(folder), "--out", str(tmp_path / "report.md"))
    top1 = json.loads((folder / "summary.json").read_text())["top1"]
    assert f"| top-1 | {top1:.2f} % at step 198" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.png").stat().st_size > 10_000
    found = json.loads(run("tools.report_run", str(folder), "--json", "--html", str(tmp_path / "report.html")))["runs"][
        0
    ]
    assert (found["ranks"], found["last_step"], found["top1"]) == (2, 198, pytest.approx(top1))
    assert sum(found["goodput"]["parts_rank_s"].values()) == pytest.approx(found["goodput"]["allocated_rank_s"])
    assert found["expected_top1"] == 99.15
    assert "<svg" in (tmp_path / "report.html").read_text()
