"""Shares of the machine's peaks: by hand from images/s, over changing image sizes, in the boards and the summary."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from ii_dist.config import ConfigError, DataFacts, RunConfig, make_plan
from ii_dist.metrics.peaks import Device, MachineFile, write_machine
from ii_dist.runtime import World
from ii_dist.train.efficiency import Efficiency, open_efficiency
from tests.tiny_run import train_tiny_run

PEAKS = Device("a CPU", {"fp32": 0.1}, 10.0, kind="cpu", threads=1)


def _config(**data: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "x",
            "data": {"source": "synthetic", "image_size": 32, "eval_resize": 32, "eval_image_size": 32, **data},
            "model": {"network": "ini_resnet20", "gate": "none"},
            "train": {"global_batch": 8, "epochs": 4},
            "optim": {"warmup_epochs": 0},
        }
    )


def test_mfu_is_the_networks_operations_over_the_peak() -> None:
    cfg = _config()
    plan = make_plan(cfg, 2, DataFacts(80, 8, 10))
    shares = Efficiency(cfg, plan, PEAKS).tags(10, 100.0)
    macs = 40_551_040 + 640 - 640  # of ini_resnet20 at 32 px and its classifier of 10 classes, by `ii-dist models`
    # 100 images/s on two ranks, each of 1e11 operations a second
    assert shares["throughput/mfu_share"] == pytest.approx(6 * macs * 100 / 2e11, rel=0.01)
    assert shares["throughput/roofline_share"] > shares["throughput/mfu_share"], "memory bounds some kernels"
    assert Efficiency(cfg, plan, PEAKS).tags(10, 0.0) == {}


def test_each_epoch_is_measured_at_its_own_size() -> None:
    cfg = _config(size_schedule=[[0, 32], [1, 32], [2, 64]])
    plan = make_plan(cfg, 1, DataFacts(80, 8, 10))
    assert plan.image_sizes == ((0, 32), (2, 64))
    found = Efficiency(cfg, plan, PEAKS)
    at = {step: found.tags(step, 50.0)["throughput/mfu_share"] for step in (10, 20, 21, 40)}
    assert at[10] == at[20]
    assert at[21] == at[40] == pytest.approx(4 * at[20], rel=0.02), "epoch 2 begins with step 21"


def test_the_whole_attempt_leaves_out_its_cold_start() -> None:
    cfg = _config()
    plan = make_plan(cfg, 1, DataFacts(80, 8, 10))
    found = Efficiency(cfg, plan, PEAKS)
    assert (found.mfu_share, found.roofline_share) == (None, None)
    cold = found.tags(5, 10.0)["throughput/mfu_share"]
    assert found.mfu_share == pytest.approx(cold), "there is nothing else yet"
    warm = [found.tags(10, 100.0), found.tags(30, 50.0)]
    # 5 steps at 100 images/s and 20 at 50: the mean over time
    for name, share in (("mfu", found.mfu_share), ("roofline", found.roofline_share)):
        fast, slow = (line[f"throughput/{name}_share"] for line in warm)
        times = (5 / 100, 20 / 50)
        assert share == pytest.approx((fast * times[0] + slow * times[1]) / sum(times))
    assert found.bound in ("memory", "arithmetic")


def test_only_rank_0_measures_and_only_where_peaks_are_known(tmp_path: Path) -> None:
    cfg, device = _config(), torch.device("cpu")
    plan = make_plan(cfg, 1, DataFacts(80, 8, 10))
    assert open_efficiency(cfg, plan, World(), device) is None
    write_machine(tmp_path / "m.json", MachineFile((PEAKS,), 1))
    named = cfg.model_copy(update={"metrics": cfg.metrics.model_copy(update={"machine": f"{tmp_path}/m.json"})})
    assert open_efficiency(named, plan, World(), device) is not None
    wrong = cfg.model_copy(update={"metrics": cfg.metrics.model_copy(update={"machine": "H1000"})})
    with pytest.raises(Exception, match=r"metrics.machine 'H1000'") as error:
        open_efficiency(wrong, plan, World(), device)
    assert error.value.exit_code == ConfigError.exit_code  # type: ignore[attr-defined]


def test_a_real_run_writes_its_shares_and_says_them_last(tmp_path: Path) -> None:
    write_machine(tmp_path / "m.json", MachineFile((dataclasses.replace(PEAKS, tflops={"fp32": 1.0}),), 1))
    run = train_tiny_run(tmp_path, f"metrics.machine={tmp_path}/m.json", "metrics.log_every_steps=2")
    lines = [json.loads(line) for line in (run / "metrics" / "rank_00000.jsonl").read_text().splitlines()]
    shares = [line for line in map(_values, lines) if "throughput/mfu_share" in line]
    assert len(shares) == 2
    summary = json.loads((run / "summary.json").read_text())
    # The first line is the cold start.
    for name in ("mfu_share", "roofline_share"):
        assert summary[name] == pytest.approx(shares[-1][f"throughput/{name}"])
    assert summary["bound"] in ("memory", "arithmetic")


def _values(line: dict[str, object]) -> dict[str, float]:
    """A line's numbers, wherever it keeps them."""
    inner = line.get("values", line)
    assert isinstance(inner, dict)
    return inner
