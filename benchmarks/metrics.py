"""What numbers cost a step (C2): step clock, phases, means, ranks compared, boards, looks at the machine.

    python -m benchmarks.metrics [--quick] [--out FILE]

Method, as in benchmarks/step.py: process CPU time (threads that write included), one thread, blocks of steps in turn,
medians of the differences within a turn. Both sides are the trainer with one linear layer, so that nothing hides behind
the network; one has its numbers taken out. That one runs twice a turn: the difference of these twins is the noise. The
line of numbers comes every `metrics.log_every_steps` (default) and holds a table of 64 ranks. Looks at the machine come
by time, not by step: they are counted for steps of 58 ms. Counting right answers (top-1, top-5), which is part of a
step with or without lines, has a row of its own.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.step import BATCH, CLASSES, OneBatch, config, cpu_seconds, trainer_block
from ii_dist.config import data_facts, make_plan
from ii_dist.data import Batch
from ii_dist.engine import EngineParts, make_engine, step_engine
from ii_dist.metrics.clock import StepClock
from ii_dist.metrics.machine import LOOK_EVERY_S, node_look
from ii_dist.metrics.means import RunningMeans
from ii_dist.metrics.phases import make_phase_timer
from ii_dist.metrics.ranks import PLACES, RankTable, own_phases
from ii_dist.runtime import World
from ii_dist.train.opening import open_session
from ii_dist.train.session import Session

RANKS, STEP_S, LIMIT_US = 64, 0.058, 60


class Crowd(RankTable):
    """A table in which every rank did what this one did."""

    def row(self, seconds: Mapping[str, float]) -> list[int]:
        return super().row(seconds)[: len(PLACES)] * RANKS


class NoClock(StepClock):
    """Asks nobody for the time."""

    def tick(self, images: int) -> None:
        pass

    def data_wait(self) -> Any:
        return _NOTHING


class NoMeans(RunningMeans):
    """Keeps nothing."""

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        pass


class Unwatched(Session):
    """The same loop, in which no line is ever due."""

    def log_is_due(self) -> bool:
        return False


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def two_trainers(batch: Batch) -> Iterator[tuple[Session, Session]]:
    """With all its numbers, and without."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        cfg = config(folder)
        plan = make_plan(cfg, 1, data_facts(cfg.data))
        run = stack.enter_context(open_session(cfg, plan, World(threads=1)))
        run.train_source = OneBatch(batch)
        run.clock = StepClock(phases=make_phase_timer("cpu", plan.log_every_steps))
        run.ranks = Crowd(0, [f"node{rank}" for rank in range(RANKS)], own_phases(cfg.engine))
        parts = EngineParts(cfg.engine, cfg.optim, plan, torch.device("cpu"), phases=run.clock.phases)
        run.engine = make_engine(copy.deepcopy(model), parts)
        fields = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
        bare = Unwatched(**fields | {"clock": NoClock(), "means": NoMeans("cpu")})
        bare.engine = make_engine(copy.deepcopy(model), EngineParts(cfg.engine, cfg.optim, plan, torch.device("cpu")))
        yield run, bare
        run.saved_step = run.engine.step


def without_counting(block: Callable[[int], None]) -> Callable[[int], None]:
    zeros = torch.zeros(()), torch.zeros(())

    def uncounted(steps: int) -> None:
        with mock.patch.object(step_engine, "count_correct", return_value=zeros):
            block(steps)

    return uncounted


def look_seconds(looks: int) -> float:
    """CPU seconds of one look at the node."""
    look = node_look()
    assert look is not None
    start = time.process_time()
    for _ in range(looks):
        look()
    return (time.process_time() - start) / looks


def run_benchmark(quick: bool) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = Batch(torch.randn(BATCH, 3, 4, 4), torch.arange(BATCH) % CLASSES, torch.ones(BATCH), torch.arange(BATCH))
    steps, turns = 200, 5 if quick else 25
    with two_trainers(batch) as (run, bare):
        blocks = {"with": trainer_block(run), "without": trainer_block(bare), "without_twin": trainer_block(bare)}
        blocks["uncounted"] = without_counting(blocks["without"])
        for block in blocks.values():
            block(steps)
        found: dict[str, list[float]] = {name: [] for name in blocks}
        for turn in range(turns):
            for name in list(blocks)[turn % 4 :] + list(blocks)[: turn % 4]:  # nobody is always first
                found[name].append(1e6 * cpu_seconds(blocks[name], steps))
    look_us = 1e6 * look_seconds(20)

    def more(one: str, other: str) -> float:
        return statistics.median(a - b for a, b in zip(found[one], found[other], strict=True))

    return {name: statistics.median(values) for name, values in found.items()} | {
        "numbers_us": more("with", "without"),
        "noise_us": abs(more("without", "without_twin")),
        "counting_us": more("without", "uncounted"),
        "look_us": look_us,
        "looks_us": look_us * STEP_S / LOOK_EVERY_S,
    }


def to_markdown(found: dict[str, float]) -> str:
    noise = f"{found['noise_us']:.0f} us"
    return "\n".join(
        [
            "| numbers, CPU time a step, 1 thread | measured | A/A noise | goal |",
            "| --- | --- | --- | --- |",
            f"| clock, phases, means, {RANKS} ranks compared, boards, looks at the machine | "
            f"{found['numbers_us'] + found['looks_us']:.0f} us | {noise} | <= {LIMIT_US} us |",
            f"| of it looks at the machine, steps of {1000 * STEP_S:.0f} ms | {found['looks_us']:.1f} us | | |",
            f"| counting right answers, batch {BATCH} | {found['counting_us']:.0f} us | {noise} | |",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    found = run_benchmark(args.quick)
    print(to_markdown(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
