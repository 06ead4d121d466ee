"""Run folders as a long training would leave them, made in a second: for benchmarks and tests of what reads them.

    python -m benchmarks.made_runs OUT [--ranks 64] [--epochs 90] [--slow-rank 37] [--failures 0.31 0.62]

In: how many ranks, lines and so on. Out: metrics of every rank, config, plan and job records. The numbers are made up
but hang together: the parts of a step add up to it, images/s follow from them, a restart goes back to a save.
"""

import argparse
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from ii_dist.config.run_folder import RunFolder

START_S = 1_790_000_000.0
START_UP_S, SHUT_DOWN_S, EVALUATION_S, STALL_S, SILENCE_S = 60.0, 5.0, 20.0, 0.4, 30.0
COLD = 1.5  # times the usual step: the first line of every start


@dataclass(frozen=True, slots=True)
class Made:
    """What kind of run."""

    ranks: int = 8
    ranks_per_node: int = 8
    epochs: int = 90
    steps_per_epoch: int = 1250
    log_every_steps: int = 50
    global_batch: int = 1024
    step_s: float = 0.2
    wait_share: float = 0.02
    slow_rank: int | None = None
    """One that takes 12 % of a step longer in forward."""
    failures: Sequence[float] = ()
    """At which shares of the run a rank is killed."""
    gpu: bool = True
    top1: float = 76.4
    settings: tuple[tuple[str, Any], ...] = ()
    """Dotted keys of the config and their values."""


def write_run(root: Path, made: Made) -> RunFolder:
    """Everything but checkpoints."""
    folder = RunFolder(root)
    folder.metrics.mkdir(parents=True)
    folder.jobs.mkdir()
    total = made.epochs * made.steps_per_epoch
    folder.config.write_text(yaml.safe_dump(_config(root.name, made)))
    folder.plan.write_text(json.dumps(_plan(made, total)))
    timeline, rounds = _timeline(made, total)
    for rank in range(made.ranks):
        with folder.rank_metrics(rank).open("w") as file:
            draw = random.Random(rank)
            for kind, step, time_s in timeline:
                file.write(json.dumps(_line(kind, step, time_s, rank, made, draw)) + "\n")
    record = {
        "job": "4242",
        "attempt": 0,
        "nodes": [f"node{k:03d}" for k in range(math.ceil(made.ranks / made.ranks_per_node))],
        "node_rank": 0,
        "ranks": made.ranks,
        **rounds[-1],
        "start": rounds[0]["start"],
        "restarts": len(rounds) - 1,
        "rounds": rounds,
    }
    folder.job("4242").write_text(json.dumps(record))
    return folder


def _timeline(made: Made, total: int) -> tuple[list[tuple[str, int, float]], list[dict[str, Any]]]:
    """Lines of a rank (kind, step, Unix time) and the job's rounds. What a failure made vain is already cut away."""
    fails = sorted(int(share * total) for share in made.failures)
    lines: list[tuple[str, int, float]] = []
    rounds = []
    now, step = START_S, 0
    for k, end in enumerate([*fails, total]):
        began, first = now, step
        now += START_UP_S
        lines.append(("start", step, now - 10))
        while step < end:
            cold = step - first < made.log_every_steps
            step += made.log_every_steps
            now += made.log_every_steps * made.step_s * (COLD if cold else 1.0)
            now += STALL_S * (step % made.steps_per_epoch == 0)
            lines.append(("cold" if cold else "train", step, now))
            if step % made.steps_per_epoch == 0:
                now += EVALUATION_S
                lines.append(("eval", step, now))
        failed = k < len(fails)
        if failed:
            now += SILENCE_S
            step = step // made.steps_per_epoch * made.steps_per_epoch
            lines = [line for line in lines if line[1] <= step or (line[0] == "start" and line[1] < step)]
        else:
            now += SHUT_DOWN_S
        rounds.append(_round(k, began, now, first, step, failed, made))
    return lines, rounds


def _round(
    number: int, start_s: float, end_s: float, first: int, last: int, failed: bool, made: Made
) -> dict[str, Any]:
    rank = made.ranks - 1
    ended = {"exit_code": 137, "ended_as": "killed_rank", "why": f"rank {rank} was killed by SIGKILL"}
    done = {"exit_code": 0, "ended_as": "finished", "why": "done"}
    return {
        "restart": number,
        "start": datetime.fromtimestamp(start_s, UTC).isoformat(),
        "end": datetime.fromtimestamp(end_s, UTC).isoformat(),
        "failed_rank": rank if failed else None,
        "failed_host": f"node{rank // made.ranks_per_node:03d}" if failed else "",
        "step_start": first,
        "step_end": last,
        **(ended if failed else done),
    }


def _line(kind: str, step: int, time_s: float, rank: int, made: Made, draw: random.Random) -> dict[str, Any]:
    line: dict[str, Any] = {"step": step, "time": round(time_s, 3)}
    if kind == "start":
        host = f"node{rank // made.ranks_per_node:03d}"
        return line | {"event": "start", "rank": rank, "world_size": made.ranks, "host": host}
    share = step / (made.epochs * made.steps_per_epoch)
    if kind == "eval":
        line["eval/seconds"] = EVALUATION_S
        top1 = made.top1 * (1 - math.exp(-6 * share)) / (1 - math.exp(-6)) + draw.gauss(0, 0.1) * (share < 1)
        return line | {"eval/loss": 7 - 6 * top1 / 100, "eval/top1": top1, "eval/top5": 100 - (100 - top1) ** 1.1 / 3}
    return line | _train_tags(step, share, rank, made, draw, COLD if kind == "cold" else 1.0)


def _train_tags(step: int, share: float, rank: int, made: Made, draw: random.Random, slower: float) -> dict[str, float]:
    step_s = made.step_s * slower * (1 + 0.01 * draw.uniform(-1, 1))
    late = 0.12 * step_s if rank == made.slow_rank else 0.0
    wait = made.wait_share * step_s * (1 + 0.2 * draw.random())
    rest = step_s - wait - late
    exchange = max(0.0, (0.12 * step_s if made.slow_rank is not None else 0.02 * step_s) - late)
    rate = made.global_batch / made.ranks / step_s
    tags = {
        "train/loss": 6.5 * math.exp(-3 * share) + 0.9 + draw.gauss(0, 0.02),
        "train/top1": 74 * (1 - math.exp(-5 * share)) + draw.gauss(0, 0.4),
        "train/learning_rate": 0.4 * (1 + math.cos(math.pi * share)) / 2 * min(1.0, share * 18),
        "train/grad_norm": 1 + draw.random(),
        "train/skipped_updates": 0.0,
        "train/epoch": step / made.steps_per_epoch,
        "throughput/images_per_s": rate * made.ranks,
        "throughput/images_per_s_rank": rate,
        "time/step_s": step_s,
        "time/step_p50_s": 0.99 * step_s,
        "time/step_p99_s": 1.3 * step_s,
        "time/data_wait_share": wait / step_s,
        "time/data_wait_s": wait,
        "time/copy_s": 0.01 * rest,
        "time/forward_s": 0.31 * (rest - exchange) + late,
        "time/backward_s": 0.6 * (rest - exchange) + exchange,
        "time/allreduce_s": exchange,
        "time/optimizer_s": 0.05 * (rest - exchange),
        "time/metrics_s": 0.005 * rest,
        "time/other_s": 0.02 * rest,
        "time/checkpoint_stall_s": STALL_S * (step % made.steps_per_epoch == 0),
        "memory/rss_gib": 5.2 + 0.2 * draw.random(),
        "machine/cpu_share": 0.55 + 0.1 * draw.random(),
    }
    if made.gpu:
        tags |= {"memory/device_gib": 21.5, "gpu/utilization_share": 0.97, "gpu/throttled_share": 0.0}
    if step % made.steps_per_epoch == 0:
        tags |= {"checkpoint/bytes": 2.05e8, "checkpoint/seconds": 3.1}
    return tags


def _config(name: str, made: Made) -> dict[str, Any]:
    config: dict[str, Any] = {
        "name": name,
        "seed": 0,
        "expected_top1": 76.3,
        "data": {"root": "data/imagenet", "source": "dali", "image_size": 224, "threads_per_rank": 4},
        "model": {"network": "ini_resnet50", "gate": "fold3x3"},
        "optim": {"optimizer": "sgd", "lr": 0.1, "schedule": "cosine", "weight_decay": 1e-4},
        "train": {"epochs": float(made.epochs), "global_batch": made.global_batch, "eval_every_epochs": 1.0},
        "engine": {"kind": "ddp", "precision": "bf16", "device": "cuda" if made.gpu else "cpu"},
        "launch": {"cpus_per_rank": 16, "hang_after_s": SILENCE_S},
    }
    for key, value in made.settings:
        *above, last = key.split(".")
        inside = config
        for part in above:
            inside = inside.setdefault(part, {})
        inside[last] = value
    return config


def _plan(made: Made, total: int) -> dict[str, Any]:
    return {
        "world_size": made.ranks,
        "global_batch": made.global_batch,
        "images_per_rank": made.global_batch // made.ranks,
        "accumulate_steps": 1,
        "train_images": made.steps_per_epoch * made.global_batch,
        "eval_images": 50_000,
        "num_classes": 1000,
        "steps_per_epoch": made.steps_per_epoch,
        "total_steps": total,
        "peak_lr": 0.4,
        "save_every_steps": [made.steps_per_epoch],
        "image_sizes": [[0, 224]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="run folder to make")
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--wait-share", type=float, default=0.03, help="of a step, waiting for data")
    parser.add_argument("--slow-rank", type=int, help="one that is slow in forward")
    parser.add_argument("--failures", type=float, nargs="*", default=[], help="at which shares of the run a rank dies")
    args = parser.parse_args()
    made = Made(
        ranks=args.ranks,
        epochs=args.epochs,
        wait_share=args.wait_share,
        slow_rank=args.slow_rank,
        failures=tuple(args.failures),
    )
    write_run(args.out, made)


if __name__ == "__main__":
    main()
