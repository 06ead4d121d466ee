"""A report over run folders that real boards wrote: figures, ranks, verdict, picture."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ii_dist.config import CheckpointError, ConfigError, Plan, RunFolder
from ii_dist.config.run_folder import COMMITTED
from ii_dist.metrics import make_boards
from tools._run_facts import read_facts
from tools.report_run import main

ROOT = Path(__file__).resolve().parents[3]
PNG_START = b"\x89PNG\r\n\x1a\n"
PLAN = Plan(
    world_size=2,
    global_batch=64,
    images_per_rank=32,
    micro_batch=32,
    accumulate_steps=1,
    train_images=1437,
    eval_images=360,
    num_classes=10,
    steps_per_epoch=20,
    dropped_images_per_epoch=0,
    total_steps=60,
    warmup_steps=0,
    peak_lr=0.05,
    final_lr=0.0,
    ema_decay=0.0,
    eval_steps=3,
    eval_every_steps=20,
    save_every_steps=(20,),
    log_every_steps=10,
)


def write_attempt(folder: RunFolder, resumed_step: int, last_step: int, wait_share: float, step_s: float = 0.5) -> None:
    """Two ranks that log every ten steps; rank 1 is a little slower and waits longer."""
    for rank in range(2):
        board = make_boards(("jsonl",), folder, rank=rank, world_size=2, total_steps=60, resumed_step=resumed_step)
        for step in range(resumed_step + 10, last_step + 1, 10):
            cold = 2.0 if step <= 20 else 1.0
            values = {
                "train/loss": 2.0 / step,
                "train/top1": float(step),
                "train/epoch": step / 20,
                "throughput/images_per_s": 64 / (step_s * cold),
                "throughput/images_per_s_rank": (32 - rank) / (step_s * cold),
                "time/step_s": step_s * cold,
                "time/step_p50_s": step_s,
                "time/step_p99_s": 2 * step_s,
                "time/data_wait_share": wait_share,
                "memory/rss_gib": 1.5 + rank,
            }
            board.write(step, values)
            if step % 20 == 0:
                board.write(
                    step, {"eval/loss": 1.0, "eval/top1": {20: 90.0, 40: 97.5, 60: 97.25}[step], "eval/top5": 99.0}
                )
        board.close()


def make_run(root: Path, wait_share: float = 0.02) -> RunFolder:
    folder = RunFolder(root)
    root.mkdir(parents=True)
    folder.config.write_text(
        f"name: {root.name}\nseed: 7\ndata: {{root: data/digits, source: dali, image_size: 32, threads_per_rank: 3}}\n"
        "model: {network: ini_resnet20, gate: fold3x3}\ntrain: {epochs: 3.0}\n"
        "optim: {optimizer: sgd, schedule: cosine}\nengine: {kind: ddp, precision: fp32, device: cpu}\n"
    )
    folder.plan.write_text(json.dumps(dataclasses.asdict(PLAN)))
    write_attempt(folder, 0, 50, wait_share)
    write_attempt(folder, 40, 60, wait_share)
    folder.step(40).mkdir(parents=True)
    (folder.step(40) / COMMITTED).write_text("{}")
    (folder.step(40) / "shard_00000-of-00001.safetensors").write_bytes(b"0" * (3 * 2**20 - 2))
    folder.step(60).mkdir()  # without its COMMITTED.json it does not count
    (folder.checkpoints / ".partial_step_000000080_fence_000001").mkdir()
    return folder


def make_jobs(folder: RunFolder) -> None:
    folder.jobs.mkdir()
    first = {
        "job": "1234",
        "attempt": 0,
        "nodes": ["node1", "node2"],
        "node_rank": 0,
        "ranks": 2,
        "start": "2026-01-02T10:00:00.000+00:00",
        "end": "2026-01-02T11:30:00.000+00:00",
        "exit_code": 75,
        "why": "time limit | asked to stop",
    }
    later = first | {
        "attempt": 1,
        "start": "2026-01-02T12:00:00.000+00:00",
        "end": None,
        "exit_code": None,
        "why": "running",
    }
    folder.job("1234").write_text(json.dumps(later | {"earlier": [first]}))
    folder.job("1234_node_00001").write_text(json.dumps(later | {"node_rank": 1, "earlier": []}))


def row(text: str, name: str) -> list[str]:
    """The cells of the one table row that begins with `name`."""
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in found.strip("|").split(" | ")]


def test_the_page_says_what_the_run_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "digits")
    make_jobs(folder)
    assert main([str(folder.root)]) == 0
    text = (folder.root / "report.md").read_text()
    assert (folder.root / "report.png").read_bytes().startswith(PNG_START)
    assert "](report.png)" in text
    assert row(text, "network")[1] == "ini_resnet20, gate fold3x3"
    assert row(text, "global batch")[1] == "64 on 2 ranks: 32 a rank"
    assert row(text, "top-1")[1] == "97.25 % at step 60, best 97.50 % at step 40"
    assert row(text, "images/s, all ranks, steady")[1] == "128 images/s"
    assert row(text, "images/s, first epoch")[1] == "64 images/s"
    assert row(text, "steps")[1] == "60 of 60"
    assert "in 2 attempts" in row(text, "running time")[1]
    assert row(text, "1")[2:5] == ["62.0", "2.0 %", "2.50 GiB"]  # 31 images in 0.5 s: the first epoch is left out
    assert "Slowest: rank 1 on " in text
    assert row(text, "step_000000040")[1] == "3 MiB"
    assert "step_000000060" not in text
    assert "partial" not in text
    assert [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| 1234 ")] == ["0", "1"]
    assert "1 h 30 min | 75 | time limit \\| asked to stop" in text
    assert "Compute bound: 2.0 %" in capsys.readouterr().out


def test_an_input_bound_run_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "slow", wait_share=0.38)
    assert main([str(folder.root), "--no-plots"]) == 0
    said = capsys.readouterr().out
    assert "Input bound: 38 % of the training time waits for data" in said
    assert "up to 206 images/s instead of 128" in said  # 128 / (1 - 0.38)
    assert "data.threads_per_rank (now 3)" in said
    assert not (folder.root / "report.png").exists()
    assert "![" not in (folder.root / "report.md").read_text()
    assert "No job records" in (folder.root / "report.md").read_text()


def test_several_runs_are_compared_on_one_page(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, share) for name, share in (("fast", 0.01), ("slow", 0.3))]
    out = tmp_path / "both.md"
    assert main([*(str(run.root) for run in runs), "--out", str(out)]) == 0
    text = out.read_text()
    assert row(text, "fast")[3:7] == ["97.25 %", "97.50 %", "128 images/s", "1.0 %"]
    assert row(text, "slow")[6] == "30 %"
    assert out.with_suffix(".png").read_bytes().startswith(PNG_START)
    assert "**Compute bound**" in text
    assert "**Input bound**" in text


def test_running_time_leaves_the_gaps_between_attempts_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.mkdir()
    start = {"event": "start", "rank": 0, "world_size": 1, "host": "h"}
    events = [(0, 1000.0, start), (10, 1030.0, {}), (20, 1050.0, {}), (20, 5000.0, start), (30, 5040.0, {})]
    lines = [json.dumps({"step": s, "time": t, **more}) for s, t, more in events]
    folder.rank_metrics(0).write_text("\n".join(lines) + "\n")
    facts = read_facts(tmp_path)
    assert facts.elapsed_s == [30.0, 50.0, 90.0]
    assert facts.running_s == 90.0
    assert facts.restart_steps() == [20]


def test_a_bare_run_folder_still_gives_a_page(tmp_path: Path) -> None:
    """Numbers only, and hardly any: started without a plan, killed after its first evaluation."""
    folder = RunFolder(tmp_path)
    board = make_boards(("jsonl",), folder, rank=0, world_size=1, total_steps=9, resumed_step=0)
    board.write(1, {"eval/top1": 10.0})
    board.close()
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "Too short to judge" in text
    assert row(text, "top-1")[1].startswith("10.00 %")


@pytest.mark.parametrize("name", ["config.yaml", "plan.json", "summary.json"])
def test_a_broken_file_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    folder = make_run(tmp_path / "run")
    (folder.root / name).write_bytes(b"{a: [\xff")
    with pytest.raises(CheckpointError, match=name) as caught:
        main([str(folder.root)])
    assert "\n" not in str(caught.value)


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="cannot be written"):
        main([str(folder.root), "--no-plots", "--out", str(tmp_path / "no" / "such" / "report.md")])


def test_no_run_folder_is_one_line_and_code_4(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.report_run", str(tmp_path / "nothing")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from tools._border import run; from tools.report_run import main; run(main)"
    )
    command = [sys.executable, "-c", code, str(folder.root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert len(done.stderr.splitlines()) == 1
    assert "pip install" in done.stderr
    assert "--no-plots" in done.stderr
    assert subprocess.run([*command, "--no-plots"], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_the_tool_starts_without_torch() -> None:
    code = (
        "import sys, tools.report_run; print([m for m in ('torch', 'matplotlib', 'tensorboard') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
