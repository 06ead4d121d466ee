"""What every schedule of the table must do."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ii_dist.config.plan import DataFacts, Plan, make_plan
from ii_dist.config.schema import OptimConfig, RunConfig, TrainConfig
from ii_dist.optim import SCHEDULES, learning_rate

BASE = make_plan(RunConfig(name="t", train=TrainConfig(global_batch=1)), 1, DataFacts(1, 1, 1))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    total = draw(st.integers(1, 400))
    warmup = draw(st.integers(0, total))
    peak = draw(st.floats(1e-4, 10))
    final = peak * draw(st.floats(0, 1))
    return dataclasses.replace(BASE, total_steps=total, warmup_steps=warmup, peak_lr=peak, final_lr=final)


@pytest.mark.parametrize("name", SCHEDULES)
@given(plan=plans())
@settings(deadline=None, max_examples=60)
def test_one_rise_to_the_peak_then_never_up_again(name: str, plan: Plan) -> None:
    cfg = OptimConfig.model_validate({"schedule": name})
    rates = [learning_rate(step, cfg, plan) for step in range(plan.total_steps)]
    up, down = rates[: plan.warmup_steps + 1], rates[plan.warmup_steps :]
    assert all(type(rate) is float for rate in rates)
    assert all(a < b for a, b in itertools.pairwise(up))
    assert all(a >= b for a, b in itertools.pairwise(down))
    assert 0 < rates[0] <= plan.peak_lr
    assert min(down, default=plan.final_lr) >= plan.final_lr * (1 - 1e-12)
    if plan.warmup_steps < plan.total_steps:
        assert rates[plan.warmup_steps] == pytest.approx(plan.peak_lr)


@pytest.mark.parametrize("name", SCHEDULES)
@given(plan=plans(), steps=st.lists(st.integers(0, 500), min_size=1, max_size=5))
@settings(deadline=None, max_examples=30)
def test_a_rate_depends_on_its_step_only(name: str, plan: Plan, steps: list[int]) -> None:
    cfg = OptimConfig.model_validate({"schedule": name})
    first = [learning_rate(step, cfg, plan) for step in steps]
    again = [learning_rate(step, cfg, plan) for step in reversed(steps)]
    assert first == again[::-1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_beyond_the_plan_keep_the_last_rate(name: str) -> None:
    cfg = OptimConfig.model_validate({"schedule": name})
    plan = dataclasses.replace(BASE, total_steps=10, warmup_steps=2, peak_lr=1.0, final_lr=0.1)
    assert learning_rate(25, cfg, plan) == learning_rate(9, cfg, plan)
