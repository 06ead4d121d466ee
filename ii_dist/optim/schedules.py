"""Learning rate of each update. Pure functions of the step.

In: a step, `OptimConfig`, `Plan`. Out: the rate. Steps count from 0: step s is the update that is about to be made.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from ii_dist.config.errors import ConfigError
from ii_dist.config.plan import Plan
from ii_dist.config.schema import OptimConfig


@dataclass(frozen=True, slots=True)
class After:
    """A place after the warm-up."""

    step: int
    share: float
    """Of the steps after the peak that is over: 0 at the peak, 1 at the last step."""
    cfg: OptimConfig
    plan: Plan


def learning_rate(step: int, cfg: OptimConfig, plan: Plan) -> float:
    """Rate of update `step`: a straight line up to the peak at `plan.warmup_steps`, then the schedule of `cfg`.

    The line starts above zero (at peak / (warmup_steps + 1)), so that no update is made for nothing.
    """
    if cfg.schedule not in SCHEDULES:
        raise ConfigError(f"optim.schedule {cfg.schedule!r} is not one of {', '.join(SCHEDULES)}")
    if step < plan.warmup_steps:
        return plan.peak_lr * (step + 1) / (plan.warmup_steps + 1)
    step = min(step, plan.total_steps - 1)
    falling_steps = plan.total_steps - 1 - plan.warmup_steps
    share = (step - plan.warmup_steps) / falling_steps if falling_steps > 0 else 0.0
    return SCHEDULES[cfg.schedule](After(step, share, cfg, plan))


def _cosine(at: After) -> float:
    """Half a cosine from the peak to the last rate."""
    return _between(at.plan, 0.5 * (1.0 + math.cos(math.pi * at.share)))


def _constant(at: After) -> float:
    """The peak until the end."""
    return at.plan.peak_lr


def _linear(at: After) -> float:
    """A straight line from the peak to the last rate."""
    return _between(at.plan, 1.0 - at.share)


def _polynomial(at: After) -> float:
    """(1 - share)^power, as the large-batch recipes have it."""
    return _between(at.plan, (1.0 - at.share) ** at.cfg.polynomial_power)


def _step(at: After) -> float:
    """The peak, multiplied by the factor at each of the epochs; never below the last rate."""
    drops = (round(epoch * at.plan.steps_per_epoch) for epoch in at.cfg.step_epochs)
    passed = sum(at.plan.warmup_steps < drop <= at.step for drop in drops)
    return max(at.plan.final_lr, at.plan.peak_lr * at.cfg.step_factor**passed)


def _between(plan: Plan, share: float) -> float:
    # Rounding may lift a share of 1 above the peak.
    return min(plan.peak_lr, plan.final_lr + (plan.peak_lr - plan.final_lr) * share)


SCHEDULES: dict[str, Callable[[After], float]] = {
    "cosine": _cosine,
    "constant": _constant,
    "linear": _linear,
    "polynomial": _polynomial,
    "step": _step,
}
"""name -> rate after the warm-up."""
