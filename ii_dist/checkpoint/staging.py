"""This rank's shards in host memory, byte for byte as they will be on disk.

In: named tensors of a step (CPU or CUDA; whole, or scattered over the ranks). Out: images of shard files that later
updates do not reach. The memory is made once and used again; a file is then written from one piece of it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ii_dist.checkpoint.disk import PAGE_BYTES
from ii_dist.checkpoint.shards import ShardImage, TensorSpec, encode_shard_header, file_order, plan_shards, spec_of
from ii_dist.runtime.scattered import Scattered


@dataclass(frozen=True, slots=True)
class StagedShares:
    """layout: every tensor of every rank and the number of its shard. images: this rank's shards, in their order."""

    layout: list[tuple[TensorSpec, int]]
    images: list[ShardImage]


class Staging:
    """Host copies of one rank's share. Laid out anew only when names, types or shapes change."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._kinds: object = None
        self._owner: dict[str, int] = {}
        self._views: dict[str, Tensor] = {}
        self._staged = StagedShares([], [])

    def copy(self, tensors: Mapping[str, Tensor | Scattered]) -> "tuple[StagedShares, torch.cuda.Event | None]":
        """Copies of this rank's share, and the event after which they hold the values (None: they do now).

        From CUDA the copies are queued on the current stream, so that later updates of the tensors come after them and
        this call does not wait. Collective where tensors are scattered: every rank then takes part in all of them, in
        the order of their names.
        """
        kinds = {name: (tensor.dtype, tensor.shape, tensor.is_cuda) for name, tensor in tensors.items()}
        if kinds != self._kinds:
            self._lay_out(tensors)
            self._kinds = kinds
        with torch.no_grad():
            for name, rank in self._owner.items():
                tensor = tensors[name]
                whole = tensor.collect(rank) if isinstance(tensor, Scattered) else tensor
                if rank == self._rank:
                    assert whole is not None
                    self._views[name].copy_(whole, non_blocking=True)
        if not any(tensors[name].is_cuda for name in self._views):
            return self._staged, None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return self._staged, event

    def _lay_out(self, tensors: Mapping[str, Tensor | Scattered]) -> None:
        specs = {name: spec_of(name, tensors[name]) for name in sorted(tensors)}
        shards = plan_shards(list(specs.values()), self._world_size)
        parts = len(shards) // self._world_size
        number = {name: i for i, names in enumerate(shards) for name in names}
        self._owner = {name: number[name] // parts for name in specs}
        pinned = any(tensor.is_cuda for tensor in tensors.values())
        images = []
        self._views = {}
        for names in shards[self._rank * parts : (self._rank + 1) * parts]:
            image, views = make_image((specs[name] for name in names), pinned)
            images.append(image)
            self._views |= views
        self._staged = StagedShares([(spec, number[name]) for name, spec in specs.items()], images)


def make_image(specs: Iterable[TensorSpec], pinned: bool = False) -> tuple[ShardImage, dict[str, Tensor]]:
    """Room for a shard, and its tensors as row-major views of that room, to be filled."""
    ordered = tuple(file_order(specs))
    at = len(encode_shard_header(ordered, 0))
    total = at + sum(spec.bytes for spec in ordered)
    # Writing past the page cache wants memory that begins with a page.
    block = torch.empty(total + PAGE_BYTES, dtype=torch.uint8, pin_memory=pinned)
    block = block[-block.data_ptr() % PAGE_BYTES :][:total]
    image = ShardImage(ordered, at, memoryview(block.numpy().data))
    views = {}
    for spec in ordered:
        views[spec.name] = block[at : at + spec.bytes].view(spec.torch_dtype).view(spec.shape)
        at += spec.bytes
    return image, views
