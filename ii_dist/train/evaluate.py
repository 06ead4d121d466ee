"""Exact accuracy over all ranks.

In: an engine and a source that gives each evaluation image to one rank once (padding has weight 0). Out: means over
all images, the same on every rank.
"""

from collections.abc import Callable, Iterable

import torch

from ii_dist.data import Batch
from ii_dist.engine import Engine
from ii_dist.metrics.means import EVAL_SUMS, RunningMeans


def evaluate(
    engine: Engine, batches: Iterable[Batch], device: torch.device, interrupted: Callable[[], bool]
) -> dict[str, float] | None:
    """loss (nats), top1 and top5 (per cent), images. Collective.

    `interrupted` is asked after each batch and must answer alike on all ranks; None when it said yes.
    """
    means = RunningMeans(device, sums=EVAL_SUMS, maxima=())
    engine.begin_eval()
    for batch in batches:
        means.add(engine.eval_step(batch))
        if interrupted():
            return None
    return means.read(reduce=True)
