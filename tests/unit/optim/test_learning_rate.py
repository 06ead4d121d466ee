"""The cosine with warm-up against torch's own schedulers and against numbers written out."""

import warnings
from typing import Literal

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from ii_dist.config.errors import ConfigError
from ii_dist.config.plan import DataFacts, Plan, make_plan
from ii_dist.config.schema import OptimConfig, RunConfig, TrainConfig
from ii_dist.optim import SCHEDULES, learning_rate


def _plan(total_steps: int, warmup_steps: int, lr: float = 0.4, final_share: float = 0.1) -> tuple[OptimConfig, Plan]:
    """One step an epoch, so that epochs are steps."""
    optim = OptimConfig(lr=lr, lr_reference_batch=0, warmup_epochs=warmup_steps, final_lr_share=final_share)
    cfg = RunConfig(name="t", optim=optim, train=TrainConfig(epochs=total_steps, global_batch=10))
    plan = make_plan(cfg, 1, DataFacts(10, 10, 2))
    assert (plan.total_steps, plan.warmup_steps) == (total_steps, warmup_steps)
    return optim, plan


def _rates(optim: OptimConfig, plan: Plan) -> list[float]:
    return [learning_rate(step, optim, plan) for step in range(plan.total_steps)]


@pytest.mark.parametrize(("total", "warmup"), [(50, 5), (200, 1), (33, 20), (1000, 50)])
@pytest.mark.parametrize("final_share", [0.0, 0.1])
def test_cosine_with_warmup_equals_torchs_schedulers(total: int, warmup: int, final_share: float) -> None:
    optim, plan = _plan(total, warmup, final_share=final_share)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=plan.peak_lr)
    line = LinearLR(optimizer, start_factor=1 / (warmup + 1), end_factor=1.0, total_iters=warmup)
    fall = CosineAnnealingLR(optimizer, T_max=total - 1 - warmup, eta_min=plan.final_lr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own `epoch` argument when schedulers follow each other
        scheduler = SequentialLR(optimizer, [line, fall], milestones=[warmup])
        theirs = []
        for _ in range(total):
            theirs.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    assert _rates(optim, plan) == pytest.approx(theirs, rel=1e-6, abs=1e-9)


def test_numbers_written_out() -> None:
    optim, plan = _plan(total_steps=8, warmup_steps=3, lr=0.8, final_share=0.25)
    # 3 steps up (1/4, 2/4, 3/4 of the peak), the peak, then cosine over 4 steps down to 0.2.
    expected = [0.2, 0.4, 0.6, 0.8, 0.8 - 0.6 * (1 - 2**-0.5) / 2, 0.5, 0.8 - 0.6 * (1 + 2**-0.5) / 2, 0.2]
    assert _rates(optim, plan) == pytest.approx(expected, rel=1e-12)


def test_constant_keeps_the_peak() -> None:
    optim, plan = _plan(total_steps=6, warmup_steps=2)
    constant = optim.model_copy(update={"schedule": "constant"})
    assert _rates(constant, plan) == pytest.approx([0.4 / 3, 0.8 / 3, 0.4, 0.4, 0.4, 0.4])


@pytest.mark.parametrize(("total", "warmup", "expected"), [(1, 0, [1.0]), (2, 2, [1 / 3, 2 / 3]), (2, 1, [0.5, 1.0])])
def test_very_short_runs(total: int, warmup: int, expected: list[float]) -> None:
    assert _rates(*_plan(total, warmup, lr=1.0)) == pytest.approx(expected)


def test_steps_fall_at_their_epochs_and_never_below_the_last_rate() -> None:
    cfg = RunConfig.model_validate(
        {
            "name": "t",
            "optim": {"lr": 0.1, "schedule": "step", "step_epochs": [3, 6], "warmup_epochs": 1, "final_lr_share": 0.05},
            "train": {"epochs": 9, "global_batch": 256},
        }
    )
    plan = make_plan(cfg, 1, DataFacts(512, 10, 2))  # two steps an epoch
    expected = [0.1 / 3, 0.2 / 3, *[0.1] * 4, *[0.01] * 6, *[0.005] * 6]
    assert _rates(cfg.optim, plan) == pytest.approx(expected)


@pytest.mark.parametrize(("schedule", "power"), [("linear", 1.0), ("polynomial", 2.0), ("polynomial", 0.5)])
def test_lines_and_powers(schedule: str, power: float) -> None:
    optim, plan = _plan(total_steps=8, warmup_steps=3, lr=0.8, final_share=0.25)
    optim = optim.model_copy(update={"schedule": schedule, "polynomial_power": power})
    shares = [1.0, 0.75, 0.5, 0.25, 0.0]
    assert _rates(optim, plan)[3:] == pytest.approx([0.2 + 0.6 * share**power for share in shares])


def test_unknown_schedule_names_the_table() -> None:
    optim, plan = _plan(4, 1)
    with pytest.raises(ConfigError, match="'stairs' is not one of cosine, constant, linear"):
        learning_rate(0, OptimConfig.model_construct(**{**optim.model_dump(), "schedule": "stairs"}), plan)


def test_the_table_holds_what_a_config_may_say() -> None:
    assert OptimConfig.model_fields["schedule"].annotation == Literal[tuple(SCHEDULES)]  # type: ignore[comparison-overlap]
