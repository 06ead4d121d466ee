"""This rank's shards in host memory, byte for byte as they will be on disk.

In: named tensors of a step (CPU or CUDA; whole, or scattered over the ranks). Out: images of shard files that later
updates do not reach. The memory is made once and used again; a file is then written from one piece of it.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import cast

import torch
from torch import Tensor

from ii_dist.checkpoint.disk import PAGE_BYTES
from ii_dist.checkpoint.shards import ShardImage, TensorSpec, encode_shard_header, file_order, plan_shards, spec_of
from ii_dist.config.errors import CheckpointError
from ii_dist.runtime.scattered import Scattered


class Readiness:
    """Told by the thread that fills an image, asked by the thread that writes it."""

    def __init__(self) -> None:
        self._said = threading.Event()
        self._wait: Callable[[], object] | None = None

    def reset(self) -> None:
        self._said.clear()
        self._wait = None

    def tell(self, wait: Callable[[], object] | None) -> None:
        """Say that the image is whole once `wait` has returned; None: that it never will be. Said once."""
        if not self._said.is_set():
            self._wait = wait
            self._said.set()

    def ask(self) -> None:
        """Wait for the image. Raises CheckpointError if filling it was given up."""
        self._said.wait()
        if self._wait is None:
            raise CheckpointError("the copy of the tensors in host memory was given up")
        self._wait()


class Staging:
    """Host copies of one rank's share. Laid out anew only when names, types or shapes change."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._kinds: object = None
        self._order: list[tuple[str, int]] = []
        self._parts = 1
        self._views: dict[str, Tensor] = {}
        self._ready: list[Readiness] = []
        self.layout: list[tuple[TensorSpec, int]] = []
        """Every tensor of every rank, by name, and the number of its shard."""
        self.images: list[ShardImage] = []
        """This rank's shards, in their order."""

    def begin(self, tensors: Mapping[str, Tensor | Scattered]) -> None:
        """Lay out the shards of these tensors: `layout` and `images` are known, no image is ready yet."""
        kinds = {name: (tensor.dtype, tensor.shape, tensor.is_cuda) for name, tensor in tensors.items()}
        if kinds != self._kinds:
            self._lay_out(tensors)
            self._kinds = kinds
        for ready in self._ready:
            ready.reset()

    def fill(self, tensors: Mapping[str, Tensor | Scattered]) -> None:
        """Copy this rank's share, shard by shard: a shard is ready, and may be written, before the next one is begun.

        From CUDA the copies are queued on the current stream, so that later updates of the tensors come after them and
        this call does not wait. Collective where tensors are scattered: every rank then takes part in all of them, in
        the order of the shards.
        """
        first = self._rank * self._parts
        try:
            with torch.no_grad():
                for number, members in groupby(self._order, key=lambda entry: entry[1]):
                    mine = 0 <= number - first < self._parts
                    for name, _ in members:
                        tensor = tensors[name]
                        whole = tensor.collect(number // self._parts) if isinstance(tensor, Scattered) else tensor
                        if mine:
                            assert whole is not None
                            self._views[name].copy_(whole, non_blocking=True)
                    if mine:
                        self._ready[number - first].tell(_copied(tensors[name].is_cuda))
            for ready, image in zip(self._ready, self.images, strict=True):
                if not image.specs:
                    ready.tell(_copied(False))
        finally:
            for ready in self._ready:
                ready.tell(None)

    def _lay_out(self, tensors: Mapping[str, Tensor | Scattered]) -> None:
        specs = {name: spec_of(name, tensors[name]) for name in sorted(tensors)}
        shards = plan_shards(list(specs.values()), self._world_size)
        self._parts = len(shards) // self._world_size
        self._order = [(name, number) for number, names in enumerate(shards) for name in names]
        numbers = dict(self._order)
        self.layout = [(spec, numbers[name]) for name, spec in specs.items()]
        pinned = any(tensor.is_cuda for tensor in tensors.values())
        self._views, self._ready, self.images = {}, [], []
        for names in shards[self._rank * self._parts :][: self._parts]:
            ready = Readiness()
            image, views = make_image((specs[name] for name in names), pinned, ready.ask)
            self._ready.append(ready)
            self.images.append(image)
            self._views |= views


def _copied(cuda: bool) -> Callable[[], object]:
    """What to wait for until the copies that were begun so far are there."""
    if not cuda:
        return lambda: None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return cast("Callable[[], object]", event.synchronize)


def make_image(
    specs: Iterable[TensorSpec], pinned: bool = False, ready: Callable[[], None] = lambda: None
) -> tuple[ShardImage, dict[str, Tensor]]:
    """Room for a shard, and its tensors as row-major views of that room, to be filled."""
    ordered = tuple(file_order(specs))
    at = len(encode_shard_header(ordered, 0))
    total = at + sum(spec.bytes for spec in ordered)
    # Writing past the page cache wants memory that begins with a page.
    block = torch.empty(total + PAGE_BYTES, dtype=torch.uint8, pin_memory=pinned)
    block = block[-block.data_ptr() % PAGE_BYTES :][:total]
    image = ShardImage(ordered, at, memoryview(block.numpy().data), ready)
    views = {}
    for spec in ordered:
        views[spec.name] = block[at : at + spec.bytes].view(spec.torch_dtype).view(spec.shape)
        at += spec.bytes
    return image, views
