"""What every rank of test_phases_ranks runs: OUT. Two ranks, rank 1 late with its batches; each engine in turn."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from ii_dist.engine import make_engine
from ii_dist.metrics.phases import PhaseTimer
from ii_dist.runtime import World
from tests.ranks.canonical_program import build as build_canonical
from tests.ranks.canonical_program import my_batches
from tests.ranks.engine_program import my_images, network, parts_of

LATE_S, STEPS = 0.1, 4
ROWS: dict[str, dict[str, object]] = {
    "ddp": {"kind": "ddp"},
    "static": {"kind": "ddp", "static_graph": True},
    "zero0": {"kind": "deepspeed", "zero_stage": 0},
    "zero2": {"kind": "deepspeed", "zero_stage": 2},
}


def measure(row: str, world: World) -> dict[str, float]:
    timer = PhaseTimer(1)
    if row == "canonical":
        engine = build_canonical(
            world.rank, 2, lambda model, parts: make_engine(model, replace(parts, phases=timer)), dropout=0.0
        )
        batches = [my_batches(step, world.rank, 2) for step in range(STEPS)]
    else:
        engine = make_engine(network(0), replace(parts_of(ROWS[row], world), phases=timer))
        batches = [my_images(step, world, 2) for step in range(STEPS)]
    engine.train_step(batches[0])  # what only a first step does
    dist.barrier()
    timer.start()
    for mine in batches:
        timer.begin("data_wait")
        time.sleep(LATE_S * world.rank)
        timer.begin("other")
        engine.train_step(mine)
        timer.end_step()
    engine.close()
    return timer.read().means_s()


def main() -> None:
    torch.set_num_threads(1)
    world = World.from_environ(os.environ)
    dist.init_process_group("gloo")
    found = {row: measure(row, world) for row in (*ROWS, "canonical")}
    Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
