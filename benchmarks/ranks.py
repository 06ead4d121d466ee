"""What the trainer adds to a step of two ranks: to a plain DDP script (C15), and to DeepSpeed's own loop at each stage;
and what it costs that losses have the same bits on any number of ranks (`runtime.canonical_shards`).

    python -m benchmarks.ranks [--quick] [--out FILE]

Method, as in benchmarks/step.py: CPU time of the processes (mean of both ranks), one thread each, blocks of steps of
the loops in turn, medians of the ratios within a turn. The plain loop runs twice a turn, from two networks: the ratio
of these twins is the noise to read the other ratio by. The trainer is whole: `fit` with votes, clock, metrics and
boards; only the images are a fixed batch for all. ResNet-18 at 64 px, 8 images a rank, gloo on one machine. DeepSpeed's
own loop gets the same settings as our engine.
"""

import argparse
import copy
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.step import BATCH, CLASSES, SIDE, OneBatch, config, cpu_seconds, trainer_block
from ii_dist.config import RunConfig, data_facts, make_plan
from ii_dist.data import Batch
from ii_dist.engine import EngineParts, make_engine
from ii_dist.engine.deepspeed_engine import DeepSpeedRun, import_deepspeed
from ii_dist.models import create_model
from ii_dist.optim import make_optimizer
from ii_dist.runtime import World
from ii_dist.train.opening import open_session
from ii_dist.train.session import Session

RANKS = 2
ROWS: dict[str, dict[str, object]] = {
    "ddp": {"kind": "ddp"},
    **{f"canonical{shards}": {"canonical_shards": shards} for shards in (2, 4)},
    **{f"zero{stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in range(4)},
}
Block = Callable[[int], None]


def ranks_config(folder: str, engine: dict[str, object]) -> RunConfig:
    tree = config(folder).model_dump()
    tree["runtime"]["canonical_shards"] = engine.get("canonical_shards", 0)
    tree["engine"] |= {key: value for key, value in engine.items() if key != "canonical_shards"}
    tree["train"]["global_batch"] = RANKS * BATCH
    return RunConfig.model_validate(tree)


def plain_ddp(model: nn.Module, cfg: RunConfig, batch: Batch) -> Block:
    """The script that everybody writes first, with the same optimizer and memory format."""
    model = model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = make_optimizer(model, cfg.optim)
    network = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def block(steps: int) -> None:
        for _ in range(steps):
            loss = F.cross_entropy(network(batch.images_NCHW), batch.labels_N, label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return block


def plain_deepspeed(model: nn.Module, parts: EngineParts, batch: Batch) -> Block:
    """The loop of DeepSpeed's own tutorials."""
    deepspeed = import_deepspeed(parts.device)
    engine = DeepSpeedRun(model.train(), make_optimizer(model, parts.optim), parts, deepspeed).engine

    def block(steps: int) -> None:
        for _ in range(steps):
            loss = F.cross_entropy(engine(batch.images_NCHW), batch.labels_N, label_smoothing=0.1)
            engine.backward(loss)
            engine.step()

    return block


def mean_over_ranks(seconds: float) -> float:
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value)
    return value.item() / RANKS


def measure(run: Session, model: nn.Module, batch: Batch, steps: int, turns: int) -> dict[str, float]:
    """Median CPU seconds a step of the trainer, the plain loop and its twin, and the ratios of each turn."""
    parts = EngineParts(
        *(run.cfg.engine, run.cfg.optim, run.plan, run.device),
        rank=run.world.rank,
        image_size=SIDE,
        phases=run.clock.phases,
    )
    run.engine = make_engine(copy.deepcopy(model), parts)
    micro = run.plan.micro_batch
    run.train_source = OneBatch(
        Batch(batch.images_NCHW[:micro], batch.labels_N[:micro], batch.weight_N[:micro], batch.index_N[:micro])
    )
    if run.cfg.engine.kind == "ddp":
        plain = [plain_ddp(copy.deepcopy(model), run.cfg, batch) for _ in range(2)]
    else:
        plain = [plain_deepspeed(copy.deepcopy(model), parts, batch) for _ in range(2)]
    blocks = {"trainer": trainer_block(run), "plain": plain[0], "plain_twin": plain[1]}
    for block in blocks.values():
        block(2)
    found: dict[str, list[float]] = {name: [] for name in blocks}
    for turn in range(turns):
        for name in list(blocks)[turn % 3 :] + list(blocks)[: turn % 3]:  # nobody is always first
            dist.barrier()
            found[name].append(mean_over_ranks(cpu_seconds(blocks[name], steps)))
    run.saved_step = run.engine.step
    pairs = list(zip(found["trainer"], found["plain"], found["plain_twin"], strict=True))
    return {name: statistics.median(values) for name, values in found.items()} | {
        "ratio": statistics.median(t / ((p + w) / 2) for t, p, w in pairs),
        "noise": statistics.median(w / p for _, p, w in pairs),
    }


def work(row: str, folder: str, out: Path, quick: bool) -> None:
    """One rank of one row."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    world = World.from_environ(os.environ)
    cfg = ranks_config(folder, ROWS[row])
    images_NCHW = torch.randn(BATCH, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    batch = Batch(images_NCHW, torch.arange(BATCH) % CLASSES, torch.ones(BATCH), torch.arange(BATCH))
    with ExitStack() as stack:
        run = stack.enter_context(open_session(cfg, make_plan(cfg, RANKS, data_facts(cfg.data)), world))
        stack.callback(lambda: run.engine.close())
        model = create_model(cfg.model, CLASSES)
        found = measure(run, model, batch, steps=2 if quick else 5, turns=3 if quick else 5)
    if world.rank == 0:
        out.write_text(json.dumps(found))


def start_row(row: str, quick: bool) -> dict[str, float]:
    """Both ranks of one row in processes of their own."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "benchmarks.ranks", "--row", row, "--folder", folder, "--out", str(out)]
        shared = {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_PORT": str(port)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        ranks = []
        for rank in range(RANKS):
            env = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen([*command, *(["--quick"] if quick else [])], env=env))
        started_s = time.monotonic()
        codes = [process.wait() for process in ranks]
        if any(codes):
            raise SystemExit(f"benchmarks.ranks: the ranks of {row} ended with {codes}")
        print(f"... ranks {row}: {time.monotonic() - started_s:.0f} s", file=sys.stderr, flush=True)
        found: dict[str, float] = json.loads(out.read_text())
        return found


def to_markdown(found: dict[str, Any]) -> str:
    lines = [
        "| step of 2 gloo ranks, CPU time | ii_dist / plain | A/A noise | goal | plain |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row, figures in found.items():
        canonical = row.startswith("canonical")
        plain = f"DeepSpeed's own loop, ZeRO {row[-1]}" if row.startswith("zero") else "a plain DDP script"
        trainer = f"trainer with {row[-1]} virtual shards" if canonical else "trainer"
        goal = "none" if canonical else "<= 1.05 (1.02)" if row == "ddp" else "<= 1.05"
        lines.append(
            f"| {trainer} / {plain} | {figures['ratio']:.3f} | {figures['noise']:.3f} | {goal} | "
            f"{1000 * figures['plain']:.0f} ms |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        work(args.row, args.folder, args.out, args.quick)
        return
    found = {row: start_row(row, args.quick) for row in ([args.row] if args.row else ROWS)}
    print(to_markdown(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
