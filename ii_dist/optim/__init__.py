"""Parameter groups, optimizers, learning rates. Knows no ranks and no steps but the one it is asked for.

In: a network, `OptimConfig`, `Plan`. Out: a torch optimizer; the rate of a step.

    groups       which parameters are decayed, and which learn more slowly
    optimizers   table `OPTIMIZERS`; `pieces`: those that look at whole layers, for engines that cut layers up
    schedules    table `SCHEDULES`; `learning_rate(step, cfg, plan)` is pure
"""

from ii_dist.optim.groups import param_groups
from ii_dist.optim.optimizers import LAYER_WISE, OPTIMIZERS, make_optimizer, set_learning_rate, takes_found_inf
from ii_dist.optim.pieces import ON_PIECES, PieceOptimizer
from ii_dist.optim.schedules import SCHEDULES, learning_rate

__all__ = [
    "LAYER_WISE",
    "ON_PIECES",
    "OPTIMIZERS",
    "SCHEDULES",
    "PieceOptimizer",
    "learning_rate",
    "make_optimizer",
    "param_groups",
    "set_learning_rate",
    "takes_found_inf",
]
