"""The sources of all ranks of one world in this process, and their batches joined as one."""

from dataclasses import fields

import torch

from ii_dist.config import DataConfig, Plan
from ii_dist.data import Batch, BatchSource, Position, make_train_source
from ii_dist.runtime import World


def world_of(rank: int, world_size: int) -> World:
    """One rank of a world on one node."""
    return World(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size)


class SimulatedRanks:
    """Training sources of `plan.world_size` ranks, made one after the other."""

    def __init__(self, cfg: DataConfig, plan: Plan, seed: int, channels_last: bool = False) -> None:
        self.plan = plan
        self.sources: list[BatchSource] = [
            make_train_source(cfg, plan, world_of(rank, plan.world_size), seed, "cpu", channels_last)
            for rank in range(plan.world_size)
        ]

    def __enter__(self) -> "SimulatedRanks":
        self._iterators = [iter(source) for source in self.sources]
        return self

    def __exit__(self, *_: object) -> None:
        for source in self.sources:
            source.close()

    def micro(self) -> Batch:
        """The next micro-batch of all ranks, joined in rank order."""
        return joined([next(iterator) for iterator in self._iterators])

    def step(self) -> Batch:
        return joined([self.micro() for _ in range(self.plan.accumulate_steps)])

    def seek(self, position: Position) -> None:
        for source in self.sources:
            source.seek(position)

    def positions(self) -> set[Position]:
        return {source.position() for source in self.sources}


def joined(batches: list[Batch]) -> Batch:
    """One batch of all images; a field that is None in the first is None in all."""
    columns = [[getattr(batch, field.name) for batch in batches] for field in fields(Batch)]
    return Batch(*(torch.cat(column) if column[0] is not None else None for column in columns))


def same(a: Batch, b: Batch) -> bool:
    """Whether every value of every field has the same bits."""
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in fields(Batch)]
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in pairs)
