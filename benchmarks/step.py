"""What the trainer adds to a step (C1): `fit` against a bare torch loop on the same model and the same batch.

    python -m benchmarks.step [--quick] [--out FILE]

Method, made for machines whose cores are shared: process CPU time, one thread, blocks of steps of both loops in turn,
medians. The bare loop runs twice a turn: the ratio of these twins is the noise to read the other ratio by. The
trainer is whole: `fit` with its engine, votes, clock, metrics, TensorBoard and JSON lines; only the images are a fixed
batch for both, and no evaluation or save falls into a block. Fixed cost: the same with one linear layer.
"""

import argparse
import copy
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ii_dist.config import RunConfig, data_facts, make_plan
from ii_dist.data import Batch, Position
from ii_dist.data.bad_files import BadFiles
from ii_dist.data.digests import Outlook
from ii_dist.engine import EngineParts, make_engine
from ii_dist.models import create_model
from ii_dist.optim import make_optimizer
from ii_dist.runtime import World
from ii_dist.train.loop import fit
from ii_dist.train.opening import open_session
from ii_dist.train.session import Session

CLASSES, SIDE, BATCH = 100, 64, 8


class OneBatch:
    """A source that hands out the same batch for ever."""

    def __init__(self, batch: Batch) -> None:
        self._batch, self.bad_files = batch, BadFiles()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self._batch

    def position(self) -> Position:
        return Position(0, 0)

    def seek(self, position: Position) -> None:
        raise NotImplementedError("a fixed batch has no place to go to")

    def outlook(self) -> Outlook:
        raise NotImplementedError  # the ranks have compared theirs by now

    def close(self) -> None:
        pass


def config(folder: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "bench",
            "runs_folder": folder,
            "data": {
                "source": "synthetic",
                "synthetic_images": 4096,
                "synthetic_classes": CLASSES,
                "image_size": SIDE,
                "eval_resize": SIDE,
                "eval_image_size": SIDE,
            },
            "model": {"network": "ini_resnet18", "gate": "none"},
            "engine": {"device": "cpu"},
            "optim": {"schedule": "constant", "warmup_epochs": 0, "lr": 0.001},
            "train": {"global_batch": BATCH, "epochs": 10000},
            "metrics": {"boards": ["tensorboard", "jsonl"]},
        }
    )


def bare_block(model: nn.Module, cfg: RunConfig, batch: Batch) -> Callable[[int], None]:
    """The loop that everybody writes first, with the same optimizer and memory format."""
    model = model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = make_optimizer(model, cfg.optim)

    def block(steps: int) -> None:
        for _ in range(steps):
            loss = F.cross_entropy(model(batch.images_NCHW), batch.labels_N, label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return block


def trainer_block(run: Session) -> Callable[[int], None]:
    """`fit` for some more steps."""

    def block(steps: int) -> None:
        last = run.engine.step + steps
        run.plan = dataclasses.replace(run.plan, total_steps=last, eval_every_steps=10**9, save_every_steps=())
        run.results.evaluated_step = run.saved_step = last
        assert fit(run)

    return block


def cpu_seconds(block: Callable[[int], None], steps: int) -> float:
    start = time.process_time()
    block(steps)
    return (time.process_time() - start) / steps


def measure(model: nn.Module, batch: Batch, steps: int, turns: int) -> dict[str, float]:
    """Median CPU seconds a step of the trainer, the bare loop and its twin, and the ratios of each turn's pair."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        cfg = config(folder)
        world = World(threads=1)
        plan = make_plan(cfg, 1, data_facts(cfg.data))
        run = stack.enter_context(open_session(cfg, plan, world))
        parts = EngineParts(cfg.engine, cfg.optim, plan, torch.device("cpu"), image_size=SIDE, phases=run.clock.phases)
        run.engine = make_engine(copy.deepcopy(model), parts)
        run.train_source = OneBatch(batch)
        blocks = {
            "trainer": trainer_block(run),
            "bare": bare_block(copy.deepcopy(model), cfg, batch),
            "bare_twin": bare_block(copy.deepcopy(model), cfg, batch),
        }
        for block in blocks.values():
            block(3)
        found: dict[str, list[float]] = {name: [] for name in blocks}
        for turn in range(turns):
            for name in list(blocks)[turn % 3 :] + list(blocks)[: turn % 3]:  # nobody is always first
                found[name].append(cpu_seconds(blocks[name], steps))
        run.saved_step = run.engine.step
    medians = {name: statistics.median(values) for name, values in found.items()}
    pairs = zip(found["trainer"], found["bare"], found["bare_twin"], strict=True)
    ratios = [(t / b, w / b, t - b) for t, b, w in pairs]
    return medians | {
        "ratio": statistics.median(r[0] for r in ratios),
        "noise": statistics.median(r[1] for r in ratios),
        "extra_us": 1e6 * statistics.median(r[2] for r in ratios),
    }


def run_benchmark(quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images_NCHW = torch.randn(BATCH, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    batch = Batch(images_NCHW, torch.arange(BATCH) % CLASSES, torch.ones(BATCH), torch.arange(BATCH))
    small = Batch(torch.randn(BATCH, 3, 4, 4), batch.labels_N, batch.weight_N, batch.index_N)
    resnet = create_model(config("unused").model, CLASSES)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES))
    turns = 3 if quick else 9
    return {
        "resnet18_64px": measure(resnet, batch, 5 if quick else 10, turns),
        "linear": measure(linear, small, 200, turns),
    }


def to_markdown(found: dict[str, Any]) -> str:
    net, linear = found["resnet18_64px"], found["linear"]
    return "\n".join(
        [
            "| step, CPU time, 1 thread | measured | A/A noise | goal |",
            "| --- | --- | --- | --- |",
            f"| trainer / bare loop, ResNet-18, 64 px, batch {BATCH} | {net['ratio']:.3f} | {net['noise']:.3f} | "
            "<= 1.05 (1.02) |",
            f"| trainer's own cost a step (linear layer) | {linear['extra_us']:.0f} us | "
            f"{1e6 * abs(linear['bare_twin'] - linear['bare']):.0f} us | <= 200 us |",
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
