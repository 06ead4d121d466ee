"""Parameter groups, optimizers, learning rates. Knows no ranks and no steps but the one it is asked for.

In: a network, `OptimConfig`, `Plan`. Out: a torch optimizer; the rate of a step.

    groups       which parameters are decayed, and which learn more slowly
    optimizers   table `OPTIMIZERS`
    schedules    table `SCHEDULES`; `learning_rate(step, cfg, plan)` is pure
"""

from ii_dist.optim.groups import param_groups
from ii_dist.optim.optimizers import LAYER_WISE, OPTIMIZERS, make_optimizer, set_learning_rate, takes_found_inf
from ii_dist.optim.schedules import SCHEDULES, learning_rate

__all__ = [
    "LAYER_WISE",
    "OPTIMIZERS",
    "SCHEDULES",
    "learning_rate",
    "make_optimizer",
    "param_groups",
    "set_learning_rate",
    "takes_found_inf",
]
