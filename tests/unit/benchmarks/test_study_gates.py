"""The page of the gate study says what its runs found."""

from pathlib import Path

import pytest

from benchmarks.study_gates import CPU_CONFIG, GPU_CONFIG, Result, count_parameters, step_rates, write
from ii_dist.config import load_config
from ii_dist.config.networks import GATE_NAMES
from ii_dist.models import create_model

ROOT = Path(__file__).parents[3]


def test_the_page_has_mean_spread_and_picture(tmp_path: Path) -> None:
    results = [
        Result(gate, seed, 80.0 + seed + place, 100.0 + seed, 1000 + place, 59904)
        for place, gate in enumerate(GATE_NAMES)
        for seed in range(3)
    ]
    cfg = load_config(ROOT / CPU_CONFIG)
    write(cfg, CPU_CONFIG, results, tmp_path / "study.md", on_gpu=False)
    page = (tmp_path / "study.md").read_text()
    assert "| `none` | 81.00 | 80.00 .. 82.00 | 3 | 1,000 | 101 |" in page
    assert "| `se` | 82.00 | 81.00 .. 83.00 | 3 | 1,001 | 101 |" in page
    assert "59,904 training images a run (epochs: 1)" in page
    assert "lie within 5.00 points; the seeds of one gate within up to 2.00" in page
    assert "a difference that seeds alone do not explain" in page
    assert "images a CPU second" in page
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("config", [CPU_CONFIG, GPU_CONFIG])
def test_both_settings_train_every_gate(config: Path) -> None:
    for gate in GATE_NAMES:
        cfg = load_config(ROOT / config, [f"model.gate={gate}"])
        create_model(cfg.model, num_classes=10)


def test_every_gate_has_a_speed_and_no_gate_is_free() -> None:
    cfg = load_config(ROOT / CPU_CONFIG, ["train.global_batch=12"])
    rates = step_rates(cfg, turns=5)
    assert list(rates) == list(GATE_NAMES)
    assert rates["none"] > rates["fold3x3"]


def test_parameters_are_those_that_have_an_optimizer_state() -> None:
    tensors = {
        "model.w": {"shape": [3, 4]},
        "optimizer.w.momentum_buffer": {"shape": [3, 4]},
        "optimizer.b.momentum_buffer": {"shape": [5]},
    }
    assert count_parameters(tensors) == 17
