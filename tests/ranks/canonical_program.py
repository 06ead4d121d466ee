"""What every rank of test_canonical runs: OUT. Four processes are 4 ranks, then 3, 2 and 1; rank 0 writes OUT."""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import PrefixStore, TCPStore

from ii_dist.config import DataFacts, EngineConfig, OptimConfig, RunConfig, RuntimeConfig, TrainConfig, make_plan
from ii_dist.engine import Engine, EngineParts, EngineState, make_engine
from ii_dist.engine.canonical_engine import CanonicalEngine
from ii_dist.engine.fixed_sum import FixedSum, Tensors
from tests.ranks.engine_program import Images, bits

STEPS, BATCH, SHARDS, CLASSES, BAD_STEP = 12, 24, 12, 7, 5


class RankOrder(FixedSum):
    """The sum that everybody writes first: each rank its own pieces, then the ranks' sums."""

    def over_ranks(self, piece: Callable[[int], Tensors]) -> Tensors:
        numbers = range(self._rank, self._pieces, self._world_size)
        total = piece(numbers[0])
        for number in numbers[1:]:
            torch._foreach_add_(total, piece(number))
        for tensor in total:
            if dist.is_initialized():
                dist.all_reduce(tensor)
        return total


class Mutant(CanonicalEngine):
    def __init__(self, model: nn.Module, parts: EngineParts) -> None:
        super().__init__(model, parts)
        self._sum = RankOrder(self._shards, parts.rank, parts.plan.world_size)


def network(dropout: float) -> nn.Module:
    torch.manual_seed(0)
    head = [nn.Flatten(), nn.Dropout(dropout), nn.Linear(5 * 36, CLASSES)]
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), *head)


def build(
    rank: int,
    world_size: int,
    make: Callable[[nn.Module, EngineParts], Engine] = make_engine,
    shards: int = SHARDS,
    dropout: float = 0.2,
    **engine: object,
) -> Engine:
    cfg = RunConfig(
        name="x",
        engine=EngineConfig.model_validate({"device": "cpu", "ema_half_life_epochs": 0.5, **engine}),
        optim=OptimConfig(lr=0.1, lr_reference_batch=0, warmup_epochs=1, weight_decay=0.01, clip_norm=2.0),
        runtime=RuntimeConfig(canonical_shards=shards),
        train=TrainConfig(global_batch=BATCH, max_images_per_rank=BATCH // SHARDS, epochs=8),
    )
    plan = make_plan(cfg, world_size, DataFacts(4 * BATCH, 8, CLASSES))
    parts = EngineParts(cfg.engine, cfg.optim, plan, torch.device("cpu"), seed=3, rank=rank, image_size=8)
    return make(network(dropout), parts)


def my_batches(step: int, rank: int, world_size: int) -> list[Images]:
    """As the schedule of training deals them out: micro-batch k of rank r is part k * ranks + r."""
    g = torch.Generator().manual_seed(step)
    images_NCHW = torch.randn(BATCH, 3, 8, 8, generator=g) * torch.rand(BATCH, 1, 1, 1, generator=g)
    if step == BAD_STEP:
        images_NCHW[-1, 0, 0, 0] = math.nan
    whole = (images_NCHW, torch.randint(CLASSES, (BATCH,), generator=g), torch.ones(BATCH))
    shards = [Images(*each) for each in zip(*(t.chunk(SHARDS) for t in whole), strict=True)]
    return shards[rank::world_size]


def run(engine: Engine, first: int, last: int, rank: int, world_size: int) -> list[tuple[str, ...]]:
    """(loss, top1, images, norm, skipped) of all ranks, every bit."""
    curve = []
    for step in range(first, last):
        sums = engine.train_step(my_batches(step, rank, world_size))
        shared = torch.stack([sums["loss"], sums["top1"], sums["images"]]).double()
        if dist.is_initialized():
            dist.all_reduce(shared)
        curve.append(
            tuple(value.hex() for value in (*shared.tolist(), float(sums["grad_norm"]), float(sums["skipped"])))
        )
    return curve


def digest(engine: Engine) -> dict[str, str]:
    whole = engine.state().whole()
    return {name: hashlib.sha256(bits(tensor)).hexdigest() for name, tensor in sorted(whole.items())}


def small_buckets(model: nn.Module, parts: EngineParts) -> Engine:
    engine = CanonicalEngine(model, parts)
    engine._sum._bucket_elements = 100
    return engine


def work(rank: int, world_size: int, moved: EngineState) -> tuple[dict[str, Any], EngineState]:
    seen: dict[str, Any] = {}
    rows = {"whole": make_engine, "mutant": Mutant, "small_buckets": small_buckets}
    for name, make in rows.items():
        engine = build(rank, world_size, make)
        seen[name] = {"curve": run(engine, 0, STEPS, rank, world_size), "state": digest(engine)}
    if world_size != 3:  # a chain of 4 ranks, 2 ranks, 1 rank, four steps each
        engine = build(rank, world_size)
        if moved.tensors:
            engine.load_state(moved)
        first = engine.step
        seen["moved"] = {"curve": run(engine, first, first + 4, rank, world_size), "state": digest(engine)}
        state = engine.state()
        moved = EngineState(state.whole(), dict(state.scalars))
    more: dict[str, dict[str, Any]] = {"plain": {"shards": 0}, "undropped": {}}
    more |= {"static": {"shards": 0, "static_graph": True}, "compressed": {"shards": 0, "compress_gradients": "bf16"}}
    for name, keys in more.items():
        engine = build(rank, world_size, dropout=0.0, **keys)
        seen[name] = {"curve": run(engine, 0, STEPS, rank, world_size)}
        engine.close()
    static = [build(rank, world_size, dropout=0.0, **more["static"]) for _ in range(2)]
    curve = run(static[0], 0, 4, rank, world_size)
    state = static[0].state()
    static[1].load_state(EngineState(state.whole(), dict(state.scalars)))
    seen["static_resumed"] = {"curve": curve + run(static[1], 4, STEPS, rank, world_size)}
    for engine in static:
        engine.close()
    return seen, moved


def main() -> None:
    torch.set_num_threads(1)
    rank, out = int(os.environ["RANK"]), Path(sys.argv[1])
    port, limit = int(os.environ["MASTER_PORT"]), timedelta(seconds=120)
    store = TCPStore("127.0.0.1", port, 4, is_master=rank == 0, timeout=limit)
    seen, moved = {}, EngineState()
    for world_size in (4, 3, 2, 1):
        if rank < world_size:
            if world_size > 1:
                mine = PrefixStore(f"ranks_{world_size}", store)
                dist.init_process_group("gloo", store=mine, rank=rank, world_size=world_size, timeout=limit)
            seen[world_size], moved = work(rank, world_size, moved)
            if world_size > 1:
                dist.destroy_process_group()
    if rank == 0:
        out.write_text(json.dumps(seen))
        for other in range(1, 4):
            store.wait([f"left_{other}"])
    else:
        store.set(f"left_{rank}", "yes")


if __name__ == "__main__":
    main()
