"""One step under torch's DistributedDataParallel, on one rank or many, on CPU or GPU.

In: micro-batches. Out: sums as device tensors. A non-finite gradient (a non-finite loss on any rank makes it so on
all, through the all-reduce) leaves the update out on every rank alike, without asking the device.
"""

import contextlib
import copy
import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ii_dist.config.plan import Plan
from ii_dist.config.schema import EngineConfig, OptimConfig
from ii_dist.engine.engine import BatchLike, EngineState, Sums
from ii_dist.engine.losses import Labels, loss_sum
from ii_dist.engine.numerics import Average, FlatBuffers, count_correct, global_norm, image_losses
from ii_dist.engine.states import fill, model_tensors, named_optimizer_tensors, restore_optimizer
from ii_dist.optim import learning_rate, make_optimizer, set_learning_rate, takes_found_inf
from ii_dist.runtime.seeds import seed_step

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made from; `seed` and `rank` set the random numbers of each step."""

    engine: EngineConfig
    optim: OptimConfig
    plan: Plan
    device: torch.device
    seed: int = 0
    rank: int = 0
    image_size: int = 224


class DDPEngine:
    """The `Engine` over DistributedDataParallel. `model` must hold the same weights on every rank."""

    def __init__(self, model: nn.Module, parts: EngineParts) -> None:
        self._parts, self._device = parts, parts.device
        self._format = torch.channels_last if parts.engine.channels_last else torch.contiguous_format
        self._module = model.to(parts.device, memory_format=self._format).train()  # type: ignore[call-overload]
        self._buffers = FlatBuffers(self._module)
        self._kept_buffers = torch.empty_like(self._buffers.flat)
        decay = parts.plan.ema_decay
        twin = copy.deepcopy(self._module) if decay else None
        self._average = Average(self._module, self._buffers, twin, decay) if twin is not None else None
        self._optimizer = make_optimizer(self._module, parts.optim)
        self._parameters = [p for p in self._module.parameters() if p.requires_grad]
        self._scaler = torch.amp.GradScaler("cuda", enabled=parts.engine.precision == "fp16")
        self._zero = torch.zeros((), device=parts.device)
        self._skipped_in_row = self._zero
        self._images_per_step = self._zero + parts.plan.images_per_rank
        self._share = 1 / self._images_per_step
        self._step = 0
        if parts.engine.compile:
            self._module.compile()
        self._network: nn.Module = self._module
        if dist.is_initialized():
            self._network = DistributedDataParallel(
                self._module,
                device_ids=[parts.device.index] if parts.device.type == "cuda" else None,
                forward_sync_buffers=False,  # rank 0's running statistics are sent when they are read, not each step
                gradient_as_bucket_view=True,
            )
            self._warm_up()

    @property
    def step(self) -> int:
        return self._step

    def train_step(self, micro_batches: Sequence[BatchLike]) -> Sums:
        parts = self._parts
        seed_step(parts.seed, self._step, parts.rank, self._device)
        set_learning_rate(self._optimizer, learning_rate(self._step, parts.optim, parts.plan))
        self._kept_buffers.copy_(self._buffers.flat)
        sums = self._backward_all(micro_batches)
        norm, skipped = self._update()
        if self._average is not None:
            self._average.update()
        self._step += 1
        loss, top1, top5 = sums
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
        model = self._average.model if self._average is not None else self._module
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

    def state(self) -> EngineState:
        self._share_buffers()
        tensors = model_tensors("model", self._module)
        if self._average is not None:
            tensors |= model_tensors("ema", self._average.model)
        tensors |= named_optimizer_tensors(self._optimizer, self._module)
        scalars = {
            "step": self._step,
            "skipped_in_row": int(self._skipped_in_row.item()),
            "scaler": self._scaler.state_dict(),
            "rng": {"rule": "set each step from (seed, step, rank)", "seed": self._parts.seed},
        }
        return EngineState(tensors, scalars)

    def load_state(self, state: EngineState) -> None:
        fill(model_tensors("model", self._module), state.tensors)
        if self._average is not None:
            fill(model_tensors("ema", self._average.model), state.tensors)
        restore_optimizer(self._optimizer, self._module, state.tensors)
        self._step = int(state.scalars["step"])
        self._skipped_in_row = self._zero + float(state.scalars["skipped_in_row"])
        if self._scaler.is_enabled() and state.scalars["scaler"]:
            self._scaler.load_state_dict(state.scalars["scaler"])

    def close(self) -> None:
        # The reducer holds the process group. Were it the last to do so, it would end the group's threads while holding
        # the interpreter lock, which those threads may be waiting for.
        self._network = self._module
        gc.collect()

    # One step -------------------------------------------------------------------------------------------------------

    def _backward_all(self, micro_batches: Sequence[BatchLike]) -> list[torch.Tensor]:
        """Gradients of the mean loss over the global batch; returns this rank's [loss, top1, top5] sums.

        Training batches hold no padding (their weights are 1), so weights are not looked at.
        """
        self._optimizer.zero_grad(set_to_none=True)
        total: list[torch.Tensor] = []
        last = len(micro_batches) - 1
        for k, batch in enumerate(micro_batches):
            labels = Labels.of(batch, self._device)
            with self._no_sync() if k < last else contextlib.nullcontext():
                with self._autocast():
                    logits_NC = self._network(self._images(batch))
                loss = loss_sum(logits_NC, labels, self._parts.optim)
                # Started with 1 / images of this rank: DDP takes the mean over ranks, the engine over images.
                self._scaler.scale(loss).backward(self._share)  # type: ignore[no-untyped-call]
            sums = [loss.detach(), *count_correct(logits_NC.detach(), labels.main_N)]
            total = sums if not total else [a + b for a, b in zip(total, sums, strict=True)]
        return total

    def _update(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip and step, or leave both out; returns (gradient norm, 1.0 if left out)."""
        if self._scaler.is_enabled():
            self._scaler.unscale_(self._optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = global_norm(gradients)
        clip = self._parts.optim.clip_norm
        if clip:
            torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp(max=1.0))
        if self._device.type == "cpu" or not (takes_found_inf(self._optimizer) or self._scaler.is_enabled()):
            return norm, self._step_as_host_says(math.isfinite(norm.item()))
        skipped = (~torch.isfinite(norm)).to(torch.float32)
        self._skipped_in_row = (self._skipped_in_row + skipped) * skipped
        # On a GPU the decision stays there: the fused optimizer reads found_inf on the device.
        self._buffers.flat.copy_(torch.where(skipped > 0, self._kept_buffers, self._buffers.flat))
        if self._scaler.is_enabled():
            self._scaler.step(self._optimizer)
            self._scaler.update()
        else:
            self._optimizer.found_inf = skipped  # type: ignore[attr-defined]
            self._optimizer.step()
        return norm, skipped

    def _step_as_host_says(self, finite: bool) -> torch.Tensor:
        """On a CPU the host may look at the norm, and only the step that is taken costs anything; some optimizers leave
        no choice."""
        if finite:
            self._optimizer.step()
            self._skipped_in_row = self._zero
            return self._zero
        self._buffers.flat.copy_(self._kept_buffers)
        self._skipped_in_row = self._skipped_in_row + 1
        return self._zero + 1

    def _images(self, batch: BatchLike) -> torch.Tensor:
        return batch.images_NCHW.to(self._device, non_blocking=True, memory_format=self._format)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        precision = self._parts.engine.precision
        if precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, PRECISIONS[precision])

    def _no_sync(self) -> contextlib.AbstractContextManager[object]:
        if isinstance(self._network, DistributedDataParallel):
            return self._network.no_sync()
        return contextlib.nullcontext()

    # Ranks ----------------------------------------------------------------------------------------------------------

    def _share_buffers(self) -> None:
        """Give rank 0's running statistics to all: the ones that are saved and evaluated."""
        if dist.is_initialized():
            dist.broadcast(self._buffers.flat, src=0)
            if self._average is not None:
                dist.broadcast(self._average.buffers.flat, src=0)
        if self._average is not None:
            self._average.take_counters(self._module)

    def _warm_up(self) -> None:
        """One forward and backward that leaves no trace.

        DDP lays its gradient buckets out anew after the first backward, and with three ranks or more the order of
        additions depends on that layout. Doing it before step 1 makes a resumed run add in the order of an
        uninterrupted one. It also moves compilation and cuDNN's choice of kernels out of the first step.
        """
        parts = self._parts
        keep = {name: tensor.clone() for name, tensor in self._module.named_buffers()}
        whole = self._device.type == "cuda" or parts.engine.compile
        images = parts.plan.micro_batch if whole else min(2, parts.plan.micro_batch)
        zeros_NCHW = torch.zeros(images, 3, parts.image_size, parts.image_size, device=self._device)
        with self._autocast():
            logits_NC = self._network(zeros_NCHW.contiguous(memory_format=self._format))
        logits_NC.float().sum().backward()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, tensor in self._module.named_buffers():
                tensor.copy_(keep[name])
