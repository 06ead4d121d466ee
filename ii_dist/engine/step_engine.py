"""One step, as far as it is the same however gradients are exchanged and wherever the weights lie.

In: micro-batches. Out: sums as device tensors. `StepEngine` leaves to its heirs: the forward and backward pass of one
micro-batch, the update, the average, the state. `EngineParts`: what every engine is made from.
"""

import abc
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ii_dist.config.engine import EngineConfig
from ii_dist.config.errors import ConfigError
from ii_dist.config.plan import Plan
from ii_dist.config.schema import OptimConfig
from ii_dist.engine.engine import BatchLike, EngineState, Sums
from ii_dist.engine.exchange import mark_exchange
from ii_dist.engine.losses import Labels, loss_sum
from ii_dist.engine.numerics import FlatBuffers, count_correct, image_losses
from ii_dist.optim import learning_rate, make_optimizer, set_learning_rate
from ii_dist.runtime.phases import UNTIMED, Phases
from ii_dist.runtime.seeds import seed_step

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


Statistics = tuple[torch.Tensor, list[torch.Tensor]]
"""A copy of a network's floating-point buffers, as one vector, and of its others (counts of batches)."""


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made from; `seed` and `rank` set the random numbers of each step; `phases`: who is told what a
    step does."""

    engine: EngineConfig
    optim: OptimConfig
    plan: Plan
    device: torch.device
    seed: int = 0
    rank: int = 0
    image_size: int = 224
    phases: Phases = UNTIMED


class StepEngine(abc.ABC):
    """The part of an `Engine` that all of them share."""

    _exchanges_at_the_end = False
    """Whether the wait for other ranks' gradients comes after the last one is computed, and so can be told apart."""

    def __init__(self, model: nn.Module, parts: EngineParts, weights_format: torch.memory_format) -> None:
        self._parts, self._device, self._phases = parts, parts.device, parts.phases
        self._format = torch.channels_last if parts.engine.channels_last else torch.contiguous_format
        self._module: nn.Module = model.to(parts.device, memory_format=weights_format).train()  # type: ignore[call-overload]
        if parts.engine.sync_batchnorm:
            self._module = _synced(self._module, parts.device)
        if parts.engine.checkpoint_activations:
            _checkpoint_activations(self._module)
        self._buffers = FlatBuffers(self._module)
        self._counts = [buffer for buffer in self._module.buffers() if not buffer.is_floating_point()]
        self._kept_buffers = torch.empty_like(self._buffers.flat)
        self._optimizer = make_optimizer(self._module, parts.optim)
        self._zero = torch.zeros((), device=parts.device)
        self._skipped_in_row = self._zero
        self._images_per_step = self._zero + parts.plan.images_per_rank
        self._share = 1 / self._images_per_step
        self._step = 0

    @property
    def step(self) -> int:
        return self._step

    def train_step(self, micro_batches: Sequence[BatchLike]) -> Sums:
        parts = self._parts
        seed_step(parts.seed, self._step, parts.rank, self._device)
        set_learning_rate(self._optimizer, learning_rate(self._step, parts.optim, parts.plan))
        self._kept_buffers.copy_(self._buffers.flat)
        loss, top1, top5 = self._backward_all(micro_batches)
        self._phases.begin("optimizer")
        norm, skipped = self._update()
        self._follow()
        self._phases.begin("other")
        self._step += 1
        return {
            "loss": loss,
            "images": self._images_per_step,
            "top1": top1,
            "top5": top5,
            "grad_norm": norm,
            "skipped": skipped,
            "skipped_in_row": self._skipped_in_row,
        }

    def begin_eval(self) -> None:
        self._share_buffers()

    @torch.no_grad()
    def eval_step(self, batch: BatchLike) -> Sums:
        model = self._evaluated()
        was_training = model.training
        model.eval()
        try:
            with self._autocast():
                logits_NC = model(self._images(batch))
            labels_N, weight_N = Labels.of(batch, self._device).own_N, batch.weight_N.to(self._device)
            top1, top5 = count_correct(logits_NC, labels_N, weight_N)
            loss = image_losses(logits_NC, labels_N) @ weight_N
            return {"loss": loss, "images": weight_N.sum(), "top1": top1, "top5": top5}
        finally:
            model.train(was_training)

    def evaluated(self) -> nn.Module:
        return self._evaluated()

    @abc.abstractmethod
    def state(self) -> EngineState: ...

    @abc.abstractmethod
    def load_state(self, state: EngineState) -> None: ...

    @abc.abstractmethod
    def close(self) -> None: ...

    # What heirs add -------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _micro_batch(self, last: bool) -> contextlib.AbstractContextManager[object]:
        """Entered around forward and backward pass of each micro-batch; gradients are exchanged in the last."""

    @abc.abstractmethod
    def _forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Logits_NC."""

    @abc.abstractmethod
    def _backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss` (a sum over images) / images of this rank; the mean over ranks is taken."""

    @abc.abstractmethod
    def _update(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip and step, or leave both out; returns (gradient norm, 1.0 if left out)."""

    @abc.abstractmethod
    def _follow(self) -> None:
        """Move the average, if there is one, towards the weights."""

    @abc.abstractmethod
    def _evaluated(self) -> nn.Module:
        """What evaluation looks at: the average where there is one, else the weights."""

    @abc.abstractmethod
    def _share_buffers(self) -> None:
        """Give rank 0's running statistics to all: the ones that are saved and evaluated."""

    # Pieces ---------------------------------------------------------------------------------------------------------

    def _backward_all(self, micro_batches: Sequence[BatchLike]) -> list[torch.Tensor]:
        """Gradients of the mean loss over the global batch; returns this rank's [loss, top1, top5] sums.

        Training batches hold no padding (their weights are 1), so weights are not looked at.
        """
        total: list[torch.Tensor] = []
        last = len(micro_batches) - 1
        for k, batch in enumerate(micro_batches):
            sums = self._pass(batch, k == last)
            total = sums if not total else [a + b for a, b in zip(total, sums, strict=True)]
        return total

    def _pass(self, batch: BatchLike, last: bool) -> list[torch.Tensor]:
        """Forward and backward pass of one micro-batch; its [loss, top1, top5] sums."""
        phases = self._phases
        phases.begin("copy")
        labels, images_NCHW = Labels.of(batch, self._device), self._images(batch)
        phases.begin("forward")
        with self._micro_batch(last):
            logits_NC = self._forward(images_NCHW)
            loss = loss_sum(logits_NC, labels, self._parts.optim)
            if last and phases.sampling and self._exchanges_at_the_end:
                mark_exchange(logits_NC, phases)
            phases.begin("backward")
            if not self._parts.engine.checkpoint_activations:
                self._backward(loss)
            else:  # blocks run a second time, and their norms would count this micro-batch twice
                once = self._take_statistics()
                self._backward(loss)
                self._put_statistics(once)
        phases.begin("metrics")
        return [loss.detach(), *count_correct(logits_NC.detach(), labels.main_N)]

    def _take_statistics(self) -> Statistics:
        return self._buffers.flat.clone(), [count.clone() for count in self._counts]

    @torch.no_grad()
    def _put_statistics(self, statistics: Statistics) -> None:
        flat, counts = statistics
        self._buffers.flat.copy_(flat)
        if counts:
            torch._foreach_copy_(self._counts, counts)

    def _images(self, batch: BatchLike) -> torch.Tensor:
        images_NCHW = batch.images_NCHW
        if images_NCHW.device == self._device and images_NCHW.is_contiguous(memory_format=self._format):
            return images_NCHW  # the call below would come to that as well, after some microseconds
        return images_NCHW.to(self._device, non_blocking=True, memory_format=self._format)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        precision = self._parts.engine.precision
        if precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, PRECISIONS[precision])

    def _count_skipped(self, skipped: bool) -> torch.Tensor:
        """Where the host knows it: put the statistics of a step that is left out back, count it; 1.0 or 0.0."""
        if not skipped:
            self._skipped_in_row = self._zero
            return self._zero
        self._buffers.flat.copy_(self._kept_buffers)
        self._skipped_in_row = self._skipped_in_row + 1
        return self._zero + 1

    def _scalars(self) -> dict[str, Any]:
        return {
            "step": self._step,
            "skipped_in_row": int(self._skipped_in_row.item()),
            "scaler": {},
            "rng": {"rule": "set each step from (seed, step, rank)", "seed": self._parts.seed},
        }

    def _load_scalars(self, scalars: dict[str, Any]) -> None:
        self._step = int(scalars["step"])
        self._skipped_in_row = self._zero + float(scalars["skipped_in_row"])


def broadcast_flat(*buffers: FlatBuffers) -> None:
    """Rank 0's values for all."""
    if dist.is_initialized():
        for each in buffers:
            dist.broadcast(each.flat, src=0)


def _checkpoint_activations(module: nn.Module) -> None:
    enable = getattr(module, "set_grad_checkpointing", None)
    if enable is None:
        raise ConfigError(
            f"engine.checkpoint_activations true: {type(module).__name__} has no blocks for it; use false"
        )
    enable(True)


def _synced(module: nn.Module, device: torch.device) -> nn.Module:
    if device.type != "cuda":
        raise ConfigError("engine.sync_batchnorm true: torch has it for GPUs only; use false on this machine")
    synced: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    return synced
