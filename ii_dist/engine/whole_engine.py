"""A step where every rank holds all weights, the whole optimizer state and the whole average.

In: gradients that are exchanged already. Out: the update, the average, the state. A non-finite gradient (a non-finite
loss on any rank makes it so on all, through the exchange) leaves the update out on every rank alike, on a GPU without
asking the device.
"""

import copy
import math

import torch
from torch import nn

from ii_dist.engine.engine import EngineState
from ii_dist.engine.numerics import Average, global_norm
from ii_dist.engine.states import fill, loaded_tensors, model_tensors, named_optimizer_tensors, restore_optimizer
from ii_dist.engine.step_engine import EngineParts, StepEngine, broadcast_flat
from ii_dist.optim import takes_found_inf


class WholeEngine(StepEngine):
    """Update, average and state of an engine that keeps everything on every rank."""

    def __init__(self, model: nn.Module, parts: EngineParts, weights_format: torch.memory_format) -> None:
        super().__init__(model, parts, weights_format)
        decay = parts.plan.ema_decay
        twin = copy.deepcopy(self._module) if decay else None
        self._average = Average(self._module, self._buffers, twin, decay) if twin is not None else None
        self._parameters = [p for p in self._module.parameters() if p.requires_grad]
        self._scaler = torch.amp.GradScaler("cuda", enabled=parts.engine.precision == "fp16")

    def state(self) -> EngineState:
        self._share_buffers()
        tensors = model_tensors("model", self._module)
        if self._average is not None:
            tensors |= model_tensors("ema", self._average.model)
        tensors |= named_optimizer_tensors(self._optimizer, self._module)
        return EngineState(tensors, self._scalars() | {"scaler": self._scaler.state_dict()})

    def load_state(self, state: EngineState) -> None:
        saved = loaded_tensors(state)
        fill(model_tensors("model", self._module), saved)
        if self._average is not None:
            fill(model_tensors("ema", self._average.model), saved)
        restore_optimizer(self._optimizer, self._module, saved)
        self._load_scalars(state.scalars)
        if self._scaler.is_enabled() and state.scalars["scaler"]:
            self._scaler.load_state_dict(state.scalars["scaler"])

    def _follow(self) -> None:
        if self._average is not None:
            self._average.update()

    def _evaluated(self) -> nn.Module:
        return self._average.model if self._average is not None else self._module

    def _share_buffers(self) -> None:
        if self._average is None:
            broadcast_flat(self._buffers)
        else:
            broadcast_flat(self._buffers, self._average.buffers)
            self._average.take_counters(self._module)

    def _forget_gradients(self) -> None:
        # What the optimizer's zero_grad does, without its profiler marks: they cost more than this.
        for parameter in self._parameters:
            parameter.grad = None

    def _update(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._scaler.is_enabled():
            self._scaler.unscale_(self._optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = global_norm(gradients)
        clip = self._parts.optim.clip_norm
        if clip:
            torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp(max=1.0))
        if self._device.type == "cpu" or not (takes_found_inf(self._optimizer) or self._scaler.is_enabled()):
            # On a CPU the host may look, and only the step that is taken costs anything; some optimizers need it.
            finite = math.isfinite(norm.item())
            if finite:
                self._optimizer.step()
            return norm, self._count_skipped(not finite)
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
