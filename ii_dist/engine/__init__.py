"""ONE STEP: micro-batches to an update, sharded or not.

In: a network, its config slices, a plan. Out: an `Engine`: device tensors a step, the whole state by name.

    engine            the seam: `Engine`, `EngineState`
    step_engine       what all engines do alike; `losses`, `numerics`, `states`: its pieces
    whole_engine      weights, optimizer state and average whole on every rank > ddp_engine, DeepSpeed's stage 0
    canonical_engine  the same bits on any number of ranks; `fixed_sum`: its order of additions
    deepspeed_engine  DeepSpeed, stages 0-3; `partitions`: where stages 1-3 keep what
    exchange          when computing gradients ends and waiting for others begins
    peak              bytes of tensors at the peak of a computation, without computing it
"""

from collections.abc import Callable

from torch import nn

from ii_dist.config.errors import ConfigError
from ii_dist.engine.canonical_engine import CanonicalEngine
from ii_dist.engine.ddp_engine import DDPEngine
from ii_dist.engine.deepspeed_engine import make_deepspeed_engine
from ii_dist.engine.engine import BatchLike, Engine, EngineState, Sums
from ii_dist.engine.step_engine import EngineParts

ENGINES: dict[str, Callable[[nn.Module, EngineParts], Engine]] = {
    "ddp": DDPEngine,
    "canonical": CanonicalEngine,
    "deepspeed": make_deepspeed_engine,
}


def make_engine(model: nn.Module, parts: EngineParts) -> Engine:
    """The engine that `parts.engine.kind` names; with virtual shards the canonical one. Collective."""
    kind = "canonical" if parts.plan.canonical_shards else parts.engine.kind
    if kind not in ENGINES:
        raise ConfigError(f"engine.kind {kind!r} is not one of {', '.join(ENGINES)}")
    return ENGINES[kind](model, parts)


__all__ = ["ENGINES", "BatchLike", "CanonicalEngine", "Engine", "EngineParts", "EngineState", "Sums", "make_engine"]
