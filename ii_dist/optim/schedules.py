"""Learning rate of each update. Pure functions of the step.

In: a step, `OptimConfig`, `Plan`. Out: the rate. Steps count from 0: step s is the update that is about to be made.
"""

import math
from collections.abc import Callable

from ii_dist.config.errors import ConfigError
from ii_dist.config.plan import Plan
from ii_dist.config.schema import OptimConfig


def learning_rate(step: int, cfg: OptimConfig, plan: Plan) -> float:
    """Rate of update `step`: a straight line up to the peak at `plan.warmup_steps`, then the schedule of `cfg`.

    The line starts above zero (at peak / (warmup_steps + 1)), so that no update is made for nothing.
    """
    if cfg.schedule not in SCHEDULES:
        raise ConfigError(f"optim.schedule {cfg.schedule!r} is not one of {', '.join(SCHEDULES)}")
    if step < plan.warmup_steps:
        return plan.peak_lr * (step + 1) / (plan.warmup_steps + 1)
    falling_steps = plan.total_steps - 1 - plan.warmup_steps
    share = min(1.0, (step - plan.warmup_steps) / falling_steps) if falling_steps > 0 else 0.0
    return SCHEDULES[cfg.schedule](share, plan.peak_lr, plan.final_lr)


def _cosine(share: float, peak_lr: float, final_lr: float) -> float:
    """Half a cosine from the peak to `final_lr` at the last step."""
    return final_lr + (peak_lr - final_lr) * 0.5 * (1.0 + math.cos(math.pi * share))


def _constant(share: float, peak_lr: float, final_lr: float) -> float:
    """The peak until the end."""
    return peak_lr


SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "cosine": _cosine,
    "constant": _constant,
}
"""name -> rate after the warm-up, from the share of it that is over (0 at the peak, 1 at the last step)."""
