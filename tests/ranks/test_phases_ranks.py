"""Two real ranks, one of them slow: who waits in which phase, and who is named. The files are read back as they lie."""

import json
import socket
from pathlib import Path

import pytest

from ii_dist.config import RunFolder
from ii_dist.metrics import read_rank_metrics, read_run
from tests.ranks.phases_program import LATE_S
from tests.ranks.start import ROOT, output, run_ranks

pytestmark = pytest.mark.ranks

# The command itself, with a data set that takes its time on rank 1.
SLOW_TRAIN = """
import os, sys, time
from ii_dist.data import synthetic
if os.environ["RANK"] == "1":
    make = synthetic.SyntheticProducer.next
    def late(producer):
        time.sleep(0.06)
        return make(producer)
    synthetic.SyntheticProducer.next = late
from ii_dist.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
CONFIG = """
name: run
data: {source: synthetic, synthetic_images: 120, synthetic_classes: 4, image_size: 16, eval_image_size: 16,
       eval_resize: 16, prefetch_batches: 1}
model: {network: ini_resnet20, gate: none}
optim: {lr: 0.05, lr_reference_batch: 0, warmup_epochs: 0}
engine: {device: cpu}
train: {epochs: 2, global_batch: 12, eval_every_epochs: 2, eval_batch_per_rank: 4}
metrics: {log_every_steps: 4, boards: [jsonl]}
"""


@pytest.fixture(scope="module")
def slow_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, str]:
    """A run of 20 steps on two ranks, and what the ranks said."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "slow.py").write_text(SLOW_TRAIN)
    (folder / "run.yaml").write_text(CONFIG + f"runs_folder: {folder}/runs\n")
    arguments = [str(folder / "slow.py"), "train", str(folder / "run.yaml")]
    assert run_ranks(arguments, 2, folder / "out", PYTHONPATH=str(ROOT)) == [0, 0]
    return RunFolder(folder / "runs" / "run"), output(folder / "out")


def test_the_slow_rank_is_named_with_host_phase_and_by_how_much(slow_run: tuple[RunFolder, str]) -> None:
    folder, said = slow_run
    warnings = [line for line in said.splitlines() if "is slow" in line]
    assert len(warnings) == 1  # five lines of numbers, one word about it
    assert f"rank 1 on {socket.gethostname()[:64]} is slow: the others wait for it" in warnings[0]
    assert "its data wait takes" in warnings[0]
    rows = [row for row in read_rank_metrics(folder.rank_metrics(0)) if "ranks/slowest_rank" in row.values]
    assert len(rows) == 5
    for row in rows:
        assert row.values["ranks/slowest_rank"] == 1
        assert row.values["ranks/slowest_excess_share"] > 0.15
        assert row.values["ranks/data_wait_max_s"] > 0.06 > row.values["ranks/data_wait_min_s"]


def test_the_fast_rank_waits_in_the_all_reduce(slow_run: tuple[RunFolder, str]) -> None:
    folder, _ = slow_run
    fast, slow = (read_rank_metrics(folder.rank_metrics(rank))[1].values for rank in range(2))
    assert slow["time/data_wait_s"] > 0.06 > fast["time/data_wait_s"]
    assert fast["time/allreduce_s"] > 0.03 + slow["time/allreduce_s"]
    assert fast["time/backward_s"] > fast["time/allreduce_s"]
    assert fast["time/step_s"] == pytest.approx(slow["time/step_s"], rel=0.3)  # they step together


def test_phases_of_a_real_run_add_up_to_its_step(slow_run: tuple[RunFolder, str]) -> None:
    folder, _ = slow_run
    parts = ("data_wait", "copy", "forward", "backward", "optimizer", "metrics", "other")
    for rank in range(2):
        lines = read_rank_metrics(folder.rank_metrics(rank))
        assert [("ranks/slowest_rank" in row.values) for row in lines if "time/step_s" in row.values] == [rank == 0] * 5
        for row in (row for row in lines if "time/step_s" in row.values):  # all four steps of a line are measured
            whole = sum(row.values[f"time/{part}_s"] for part in parts)
            assert whole == pytest.approx(row.values["time/step_s"], rel=0.02, abs=2e-4)
        starts = [row.values["time/startup_s"] for row in lines if "time/startup_s" in row.values]
        assert len(starts) == 1  # once an attempt
        assert 0.5 < starts[0] < 100
        assert all(0 < row.values["run/goodput_share"] < 1 for row in lines if "run/goodput_share" in row.values)


def test_the_summary_says_where_a_step_went(slow_run: tuple[RunFolder, str]) -> None:
    folder, said = slow_run
    phases_s = json.loads(folder.summary.read_text())["phases_s"]
    assert phases_s["allreduce"] > 0.03
    (line,) = [line for line in said.splitlines() if line.startswith("  a step")]
    assert "waiting for other ranks" in line
    assert read_run(folder).last("ranks/slowest_rank") == 1


def test_every_engine_tells_the_wait_for_others_apart(tmp_path: Path) -> None:
    program = str(ROOT / "tests" / "ranks" / "phases_program.py")
    assert run_ranks([program, str(tmp_path)], 2, tmp_path / "out", PYTHONPATH=str(ROOT)) == [0, 0]
    fast, slow = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for row in ("ddp", "static", "zero0", "canonical"):
        assert slow[row]["data_wait"] >= LATE_S > 2 * fast[row]["data_wait"], row
        assert fast[row]["allreduce"] > 0.6 * LATE_S, row  # it waits there, and in no other phase
        assert slow[row]["allreduce"] < 0.4 * LATE_S, row
        others = sum(seconds for phase, seconds in fast[row].items() if phase != "allreduce")
        assert others < fast[row]["allreduce"], row
    assert fast["zero2"]["allreduce"] == 0  # in the middle of backward, where it cannot be told apart
    assert fast["zero2"]["backward"] + fast["zero2"]["optimizer"] > 0.6 * LATE_S
