"""One step under DeepSpeed: stage 0 keeps all on every rank, stages 1-3 share out what ZeRO shares out.

1: optimizer state and average; 2: gradients too; 3: weights too. The only file that knows DeepSpeed. It hands it a
client optimizer (so nothing is compiled), a group that is open, and every setting whose default would change training.
"""

import argparse
import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore

from ii_dist.config.errors import ClusterError
from ii_dist.engine.engine import BatchLike, Engine, EngineState
from ii_dist.engine.partitions import Partitions, take_template
from ii_dist.engine.states import check_fits, loaded_tensors
from ii_dist.engine.step_engine import EngineParts, StepEngine
from ii_dist.engine.whole_engine import WholeEngine
from ii_dist.optim import ON_PIECES, PieceOptimizer
from ii_dist.runtime.group import add_over_ranks
from ii_dist.runtime.world import tell_libraries

_BUCKET_ELEMENTS = 1 << 23


def make_deepspeed_engine(model: nn.Module, parts: EngineParts) -> Engine:
    """The engine of `parts.engine.zero_stage`. Raises ClusterError where DeepSpeed is not installed. Collective."""
    deepspeed = import_deepspeed(parts.device)
    if parts.engine.zero_stage == 0:
        return ZeroStage0Engine(model, parts, deepspeed)
    return ZeroEngine(model, parts, deepspeed)


class ZeroStage0Engine(WholeEngine):
    """DeepSpeed's exchange of gradients; all the rest as under DDP."""

    _exchanges_at_the_end = True

    def __init__(self, model: nn.Module, parts: EngineParts, deepspeed: Any) -> None:
        super().__init__(model, parts, torch.contiguous_format)
        self._run = DeepSpeedRun(self._module, self._optimizer, parts, deepspeed)

    def close(self) -> None:
        self._run.close()

    def _backward_all(self, micro_batches: Sequence[BatchLike]) -> list[torch.Tensor]:
        self._forget_gradients()
        return super()._backward_all(micro_batches)

    def _micro_batch(self, last: bool) -> contextlib.AbstractContextManager[object]:
        return self._run.micro_batch(last)

    def _forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return self._run.forward(images_NCHW)

    def _backward(self, loss: torch.Tensor) -> None:
        self._run.backward(loss * self._share)


class ZeroEngine(StepEngine):
    """ZeRO stages 1-3. The average is cut like the weights: a stretch a rank; evaluation swaps the two."""

    def __init__(self, model: nn.Module, parts: EngineParts, deepspeed: Any) -> None:
        super().__init__(model, parts, torch.contiguous_format)
        on_pieces = ON_PIECES.get(parts.optim.optimizer)
        if on_pieces is not None:
            self._optimizer = on_pieces(self._optimizer)
        shapes = {name: tensor.shape for name, tensor in self._module.state_dict().items()}
        template = take_template(self._optimizer)
        self._run = DeepSpeedRun(self._module, self._optimizer, parts, deepspeed)
        self._zero_optimizer = self._run.engine.optimizer
        stage = parts.engine.zero_stage
        self._partitions = Partitions(self._module, self._zero_optimizer, stage, self._optimizer)
        self._partitions.start_state(template)
        if isinstance(self._optimizer, PieceOptimizer):
            self._optimizer.cuts, self._optimizer.sum_over_ranks = self._partitions.cuts(), add_over_ranks
        self._shapes = shapes
        self._ema_share = 1.0 - parts.plan.ema_decay
        self._averages = [flat.clone() for flat in self._partitions.flats] if parts.plan.ema_decay else []
        self._average_buffers = self._buffers.flat.clone()
        self._shows_average = False

    def begin_eval(self) -> None:
        super().begin_eval()
        self._show_average(bool(self._averages))

    def state(self) -> EngineState:
        self._share_buffers()
        buffers = dict(self._module.named_buffers())
        tensors: dict[str, Any] = {f"model.{n}": buffers[n] for n in self._shapes if n in buffers}
        if self._parts.engine.zero_stage == 3:
            tensors |= self._partitions.scattered("model", self._partitions.flats)
        else:  # the weights stand whole on every rank
            tensors |= {f"model.{name}": p.detach() for name, p in self._module.named_parameters()}
        if self._averages:
            buffers |= self._buffers.named(self._average_buffers)
            tensors |= {f"ema.{n}": buffers[n] for n in self._shapes if n in buffers}
            tensors |= self._partitions.scattered("ema", self._averages)
        return EngineState(tensors | self._partitions.optimizer_tensors(), self._scalars())

    @torch.no_grad()
    def load_state(self, state: EngineState) -> None:
        saved, partitions = loaded_tensors(state), self._partitions
        prefixes = ("model", "ema") if self._averages else ("model",)
        check_fits({f"{prefix}.{n}": shape for prefix in prefixes for n, shape in self._shapes.items()}, saved)
        self._show_average(False)
        for name, buffer in self._module.named_buffers():
            if name in self._shapes:
                buffer.copy_(saved[f"model.{name}"])
        partitions.fill(partitions.flats, "model", saved)
        partitions.fill_optimizer(saved)
        if self._averages:
            partitions.fill(self._averages, "ema", saved)
            for name, buffer in self._buffers.named(self._average_buffers).items():
                if name in self._shapes:
                    buffer.copy_(saved[f"ema.{name}"])
        partitions.publish()
        self._load_scalars(state.scalars)

    def close(self) -> None:
        self._run.close()

    def _backward_all(self, micro_batches: Sequence[BatchLike]) -> list[torch.Tensor]:
        self._show_average(False)
        return super()._backward_all(micro_batches)

    def _micro_batch(self, last: bool) -> contextlib.AbstractContextManager[object]:
        return self._run.micro_batch(last)

    def _forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return self._run.forward(images_NCHW)

    def _backward(self, loss: torch.Tensor) -> None:
        self._run.backward(loss * self._share)

    def _update(self) -> tuple[torch.Tensor, torch.Tensor]:
        """ZeRO clips, and leaves an update out when the norm over all ranks is not finite; it waits for the device."""
        self._run.engine.step()
        norm = torch.as_tensor(self._run.engine.get_global_grad_norm(), dtype=torch.float32, device=self._device)
        return norm, self._count_skipped(bool(self._zero_optimizer.overflow))

    @torch.no_grad()
    def _follow(self) -> None:
        if self._averages:
            torch._foreach_lerp_(self._averages, self._partitions.flats, self._ema_share)
            self._average_buffers.lerp_(self._buffers.flat, self._ema_share)

    def _evaluated(self) -> nn.Module:
        return self._module  # `begin_eval` put the average into it

    def _share_buffers(self) -> None:
        self._show_average(False)
        if dist.is_initialized():
            dist.broadcast(self._buffers.flat, src=0)
            dist.broadcast(self._average_buffers, src=0)

    @torch.no_grad()
    def _show_average(self, wanted: bool) -> None:
        """Swap weights and average, or swap them back; nothing to do where that is so already. Collective."""
        if wanted == self._shows_average:
            return
        pairs = zip(
            [*self._partitions.flats, self._buffers.flat], [*self._averages, self._average_buffers], strict=True
        )
        for shown, hidden in pairs:
            kept = shown.clone()
            shown.copy_(hidden)
            hidden.copy_(kept)
        self._partitions.publish()
        self._shows_average = wanted


class DeepSpeedRun:
    """DeepSpeed's engine around a network and a client optimizer, and the group it needs also for one rank."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, parts: EngineParts, deepspeed: Any) -> None:
        self._deepspeed = deepspeed
        self._own_group = not dist.is_initialized()
        if self._own_group:
            backend = "cpu:gloo,cuda:nccl" if parts.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        index = parts.device.index or 0
        tell_libraries(LOCAL_RANK=str(index))  # DeepSpeed takes it for the number of the device
        deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=False, verbose=False)
        largest = max(parameter.numel() for parameter in module.parameters())
        self.engine, *_ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=index),
            model=module,
            optimizer=optimizer,
            config=deepspeed_config(parts, largest),
            dist_init_required=False,
        )

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        logits_NC: torch.Tensor = self.engine(images_NCHW)
        return logits_NC

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def close(self) -> None:
        self.engine.destroy()
        del self.engine
        if self._own_group:
            self._deepspeed.comm.destroy_process_group()


def deepspeed_config(parts: EngineParts, largest: int) -> dict[str, Any]:
    """Every setting whose default is not what our own config says, or that would cost memory or a compiler."""
    engine, plan, stage = parts.engine, parts.plan, parts.engine.zero_stage
    buckets = max(_BUCKET_ELEMENTS, largest)
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": buckets,
        "allgather_bucket_size": buckets + buckets % 2,
    }
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": parts.device.type == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulate_steps,
        "train_batch_size": plan.global_batch,
        # It clips at 1.0 if nothing is said. Stage 0 is clipped by `WholeEngine`.
        "gradient_clipping": parts.optim.clip_norm if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "torch_autocast": {
            "enabled": engine.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # gradients and weights travel in float32, as under DDP
        },
        "wall_clock_breakdown": False,
    }


def import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        # With no LOCAL_SIZE it would count the devices in each backward pass, by starting numactl.
        tell_libraries(DS_ACCELERATOR="cpu", LOCAL_SIZE="1")
    try:
        import deepspeed
        from deepspeed.runtime import compiler
    except ImportError:
        raise ClusterError("engine.kind deepspeed: DeepSpeed is not installed; pip install deepspeed==0.19.8") from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    for old in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # DeepSpeed calls them by the names of torch 2.12
        warnings.filterwarnings("ignore", f".*{old}` is deprecated", FutureWarning)
    # No operators of its own. On CPU it would compile an all-reduce over shared memory: minutes, and a lock that a
    # killed job leaves for ever. It would also start a compiler to find out what it could compile.
    deepspeed.ops.__compatible_ops__ = {}
    # ZeRO asks whether the optimizer is DeepSpeed's Muon, whose file starts torch's compiler: 2 s a rank for nothing.
    compiler.compile = lambda: compiler.dummy_decorator
    return deepspeed
