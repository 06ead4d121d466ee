"""One step under torch's DistributedDataParallel, on one rank or many, on CPU or GPU."""

import contextlib
import gc
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from ii_dist.engine.engine import BatchLike
from ii_dist.engine.step_engine import EngineParts
from ii_dist.engine.whole_engine import WholeEngine


class DDPEngine(WholeEngine):
    """The `Engine` over DistributedDataParallel. `model` must hold the same weights on every rank."""

    def __init__(self, model: nn.Module, parts: EngineParts) -> None:
        super().__init__(model, parts, torch.channels_last if parts.engine.channels_last else torch.contiguous_format)
        if parts.engine.compile:
            self._module.compile()
        self._network: nn.Module = self._module
        if dist.is_initialized():
            self._network = DistributedDataParallel(
                self._module,
                device_ids=[parts.device.index] if parts.device.type == "cuda" else None,
                forward_sync_buffers=False,  # rank 0's running statistics are sent when they are read, not each step
                gradient_as_bucket_view=True,
                static_graph=parts.engine.static_graph,
            )
            self._exchanges_at_the_end = True
            if parts.engine.compress_gradients == "bf16":
                self._network.register_comm_hook(None, _in_bfloat16)
            self._warm_up()

    def close(self) -> None:
        # The reducer holds the process group. Were it the last to do so, it would end the group's threads while holding
        # the interpreter lock, which those threads may be waiting for.
        if self._network is not self._module:
            self._network = self._module
            gc.collect()

    def _backward_all(self, micro_batches: Sequence[BatchLike]) -> list[torch.Tensor]:
        self._forget_gradients()
        return super()._backward_all(micro_batches)

    @contextlib.contextmanager
    def _micro_batch(self, last: bool) -> Iterator[None]:
        if last or not isinstance(self._network, DistributedDataParallel):
            yield
        else:
            with self._network.no_sync():
                yield

    def _forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        with self._autocast():
            logits_NC: torch.Tensor = self._network(images_NCHW)
        return logits_NC

    def _backward(self, loss: torch.Tensor) -> None:
        # Started with 1 / images of this rank: DDP takes the mean over ranks, the engine over images.
        self._scaler.scale(loss).backward(self._share)  # type: ignore[no-untyped-call]

    def _warm_up(self) -> None:
        """A forward and backward pass (with a static graph two) that leaves no trace.

        DDP lays its gradient buckets out anew after the first backward pass whose order it notes (of a static graph
        that is the second), and with three ranks or more the order of additions depends on that layout. Doing it before
        step 1 makes a resumed run add in the order of an uninterrupted one. It also moves compilation and cuDNN's
        choice of kernels out of the first step.
        """
        parts = self._parts
        keep = {name: tensor.clone() for name, tensor in self._module.named_buffers()}
        whole = self._device.type == "cuda" or parts.engine.compile
        images = parts.plan.micro_batch if whole else min(2, parts.plan.micro_batch)
        zeros_NCHW = torch.zeros(images, 3, parts.image_size, parts.image_size, device=self._device)
        for _ in range(2 if parts.engine.static_graph else 1):
            logits_NC = self._forward(zeros_NCHW.contiguous(memory_format=self._format))
            logits_NC.float().sum().backward()  # type: ignore[no-untyped-call]
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, tensor in self._module.named_buffers():
                tensor.copy_(keep[name])


def _in_bfloat16(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """torch's own hook, which it gives by its name to NCCL only; gloo adds up bfloat16 as well."""
    return bf16_compress_hook(group, bucket)
