"""ONE STEP: micro-batches to an update, sharded or not.

In: a network, its config slices, a plan. Out: an `Engine`: device tensors a step, the whole state by name.
"""

from collections.abc import Callable

from torch import nn

from ii_dist.config.errors import ConfigError
from ii_dist.engine.ddp_engine import DDPEngine, EngineParts
from ii_dist.engine.engine import BatchLike, Engine, EngineState, Sums

ENGINES: dict[str, Callable[[nn.Module, EngineParts], Engine]] = {
    "ddp": DDPEngine,
}


def make_engine(model: nn.Module, parts: EngineParts) -> Engine:
    """The engine that `parts.engine.kind` names. Collective."""
    kind = parts.engine.kind
    if kind not in ENGINES:
        raise ConfigError(f"engine.kind {kind!r} is not one of {', '.join(ENGINES)}")
    return ENGINES[kind](model, parts)


__all__ = ["ENGINES", "BatchLike", "Engine", "EngineParts", "EngineState", "Sums", "make_engine"]
