"""One step that has the same bits on any number of ranks: V virtual shards, added up in one fixed order.

A virtual shard is a micro-batch: shard k * ranks + r is micro-batch k of rank r, the same images on any number of
ranks. What comes of it depends on the shard alone: its forward and backward pass starts from the weights and running
statistics of the step, with random numbers from (seed, step, shard) and norm statistics of its own images. Then
`FixedSum` adds up gradients, running statistics and loss. The running statistics after a step are the mean of what the
V shards make of them, which is one move a step, whatever V is; the counts of batches go up by one.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ii_dist.engine.engine import BatchLike
from ii_dist.engine.fixed_sum import FixedSum
from ii_dist.engine.step_engine import EngineParts
from ii_dist.engine.whole_engine import WholeEngine
from ii_dist.runtime.seeds import seed_step


class CanonicalEngine(WholeEngine):
    """The `Engine` of `runtime.canonical_shards`, without DistributedDataParallel.

    Rank 0 tells the sums of the whole global batch, the other ranks zeros: added up over ranks they are the same bits.
    """

    def __init__(self, model: nn.Module, parts: EngineParts) -> None:
        super().__init__(model, parts, torch.channels_last if parts.engine.channels_last else torch.contiguous_format)
        plan = parts.plan
        self._shards = plan.canonical_shards
        assert self._shards == plan.accumulate_steps * plan.world_size
        self._sum = FixedSum(self._shards, parts.rank, plan.world_size, phases=parts.phases)
        self._images_per_step = self._zero + (plan.global_batch if parts.rank == 0 else 0)
        self._share = self._zero + 1 / plan.global_batch
        if parts.engine.compile:
            self._module.compile()

    def close(self) -> None:
        pass

    def _backward_all(self, micro_batches: Sequence[BatchLike]) -> list[torch.Tensor]:
        ranks, before = self._parts.plan.world_size, self._take_statistics()
        self._forget_gradients()

        def shard(number: int) -> list[torch.Tensor]:
            self._put_statistics(before)
            seed_step(self._parts.seed, self._step, number, self._device)
            sums = torch.stack(self._pass(micro_batches[number // ranks], last=True))
            self._phases.begin("backward")
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
            for parameter in self._parameters:
                parameter.grad = None
            return [*gradients, self._buffers.flat.clone(), sums]

        *gradients, statistics, sums = self._sum.over_ranks(shard)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        _, counts = before
        self._put_statistics((statistics.div_(self._shards), [count + 1 for count in counts]))
        return list(sums if self._parts.rank == 0 else torch.zeros_like(sums))

    def _micro_batch(self, last: bool) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def _forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        with self._autocast():
            logits_NC: torch.Tensor = self._module(images_NCHW)
        return logits_NC

    def _backward(self, loss: torch.Tensor) -> None:
        self._scaler.scale(loss).backward(self._share)  # type: ignore[no-untyped-call]

    def _scalars(self) -> dict[str, Any]:
        rng = {"rule": "set for each virtual shard from (seed, step, shard)", "seed": self._parts.seed}
        return super()._scalars() | {"rng": rng}
