"""Saving and loading a ResNet-50-sized state (C7-C10), side by side with torch.save, torch's DCP and DeepSpeed.

    python -m benchmarks.checkpoint [--quick] [--out FILE] [--folder DIR]

Method: all ways in turn within a turn, medians over the turns; the floor (one buffer of as many bytes written to a new
file and flushed) runs twice a turn: the ratio of these twins is the noise to read the other ratios by. Wall time,
because a disk is waited for: run it on a machine that does nothing else; CPU time of the process stands beside it.
State: weights and buffers (channels_last, as they are trained) and momentum of ResNet-50, one rank. "On disk" is
flushed: what does not flush by itself is flushed here, and its row says so. DeepSpeed saves in a process of its own,
where the floor runs beside it.

C9: steps of a plain loop (ResNet-18, 64 px, batch 8, one thread) while a save runs, to the same steps alone. Our saves
include the deletion of the oldest step, before which the newest is read back and verified.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from benchmarks.checkpoint_ways import (
    Figures,
    Timer,
    Ways,
    flush_tree,
    interleaved,
    make_state,
    medians,
    ratio,
    resnet50_config,
)
from benchmarks.step import BATCH, CLASSES, SIDE, bare_block, config
from ii_dist.config import data_facts, make_plan
from ii_dist.data import Batch
from ii_dist.engine import EngineParts
from ii_dist.engine.deepspeed_engine import DeepSpeedRun, import_deepspeed
from ii_dist.models import create_model
from ii_dist.optim import make_optimizer

SLOW_STEPS = 4
ROWS = {
    "ours": "ii_dist (hashed, flushed, committed)",
    "torch_save": "torch.save + flush",
    "dcp": "DCP save",
    "dcp_async": "DCP async_save",
}


def slowdown(ways: Ways, turns: int) -> dict[str, list[Figures]]:
    """Seconds a step alone (twice) and while a save runs."""
    cfg = config("unused")
    images_NCHW = torch.randn(BATCH, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    batch = Batch(images_NCHW, torch.arange(BATCH) % CLASSES, torch.ones(BATCH), torch.arange(BATCH))
    block = bare_block(create_model(cfg.model, CLASSES), cfg, batch)
    block(3)

    def alone() -> Figures:
        timer = Timer()
        block(SLOW_STEPS)
        return {key: value / SLOW_STEPS for key, value in timer.read().items()}

    def during(done: Callable[[], bool]) -> Figures:
        timer, steps = Timer(), 0
        while not done():
            block(1)
            steps += 1
        return {key: value / max(1, steps) for key, value in timer.read().items()}

    def ours() -> Figures:
        ways.start_ours()
        return during(lambda: bool(ways.saver.poll()))

    def dcp_async() -> Figures:
        _, wait = ways.start_dcp_async()
        handle = getattr(wait, "__self__")  # noqa: B009
        found = during(handle.done)
        wait()
        return found

    return interleaved({"alone": alone, "ours": ours, "alone_twin": alone, "dcp_async": dcp_async}, turns)


@contextlib.contextmanager
def one_rank_group() -> Iterator[None]:
    """DCP's asynchronous save wants a process group."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def measure(folder: Path, turns: int) -> dict[str, Any]:
    with one_rank_group():
        ways = Ways(make_state(), folder)
        saves = interleaved(
            {
                "floor": ways.floor,
                "clone": ways.clone,
                "ours": ways.ours,
                "torch_save": ways.torch_save,
                "floor_twin": ways.floor,
                "copy": ways.copy,
                "dcp": ways.dcp_save,
                "dcp_async": ways.dcp_async,
            },
            turns,
        )
        loads = interleaved(
            {
                "torch": ways.load_torch,
                "ours": ways.load_ours,
                "torch_twin": ways.load_torch,
                "ours_unverified": lambda: ways.load_ours(verify=False),
                "dcp": ways.load_dcp,
            },
            turns,
        )
        steps = slowdown(ways, turns)
        ways.saver.close()
        size = sum(tensor.nbytes for tensor in ways.state.values())
    return {
        "bytes": size,
        "saves": medians(saves),
        "loads": medians(loads),
        "steps": medians(steps),
        "over_floor": {w: ratio(saves, (w, "wall_s"), ("floor", "wall_s")) for w in saves},
        "stall_over_clone": ratio(saves, ("ours", "stall_s"), ("clone", "wall_s")),
        "stall_over_copy": ratio(saves, ("ours", "stall_s"), ("copy", "wall_s")),
        "slower": {w: ratio(steps, (w, "wall_s"), ("alone", "wall_s")) for w in steps},
        "slower_cpu": {w: ratio(steps, (w, "thread_s"), ("alone", "thread_s")) for w in steps},
        "over_torch_load": {w: ratio(loads, (w, "wall_s"), ("torch", "wall_s")) for w in loads},
    }


def deepspeed_work(folder: Path, turns: int, out: Path) -> None:
    """DeepSpeed's own save of the same network and optimizer, without stages: in this process."""
    cfg = resnet50_config(kind="deepspeed", zero_stage=0)
    parts = EngineParts(cfg.engine, cfg.optim, make_plan(cfg, 1, data_facts(cfg.data)), torch.device("cpu"))
    model = create_model(cfg.model, 1000)  # row-major: its broadcast of the weights takes no other
    run = DeepSpeedRun(model, make_optimizer(model, cfg.optim), parts, import_deepspeed(parts.device))
    run.engine.backward(run.engine(torch.randn(2, 3, 32, 32)).square().mean())
    run.engine.step()
    ways = Ways(make_state(), folder)

    def save() -> Figures:
        shutil.rmtree(folder / "deepspeed", ignore_errors=True)
        timer = Timer()
        run.engine.save_checkpoint(str(folder / "deepspeed"), tag="step")
        stall = timer.read()
        flush_tree(folder / "deepspeed")
        return timer.read() | {"stall_s": stall["wall_s"], "stall_thread_s": stall["thread_s"]}

    found = interleaved({"floor": ways.floor, "deepspeed": save}, turns)
    size = sum(path.stat().st_size for path in (folder / "deepspeed" / "step").iterdir())
    over_floor = ratio(found, ("deepspeed", "wall_s"), ("floor", "wall_s"))
    out.write_text(json.dumps({"saves": medians(found), "over_floor": over_floor, "bytes": size}))
    ways.saver.close()
    run.close()


def deepspeed(folder: Path, turns: int) -> dict[str, Any] | None:
    """In a process of its own: it changes more of torch than the others should share. None without the package."""
    if importlib.util.find_spec("deepspeed") is None:
        return None
    out = folder / "deepspeed.json"
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--deepspeed", str(turns)]
    subprocess.run(
        [*command, "--folder", str(folder), "--out", str(out)], check=True, stdout=sys.stderr, env=os.environ
    )
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def to_markdown(found: dict[str, Any]) -> str:
    raw = found["saves"]["floor"]
    saves, loads, slower, cpu = found["saves"], found["loads"], found["slower"], found["slower_cpu"]
    twin, load_twin = found["over_floor"]["floor_twin"], found["over_torch_load"]["torch_twin"]
    lines = [
        f"| checkpoint of {found['bytes'] / 1e6:.0f} MB, one rank | measured | A/A noise | goal |",
        "| --- | --- | --- | --- |",
        f"| C7 stall / cloning the state | {found['stall_over_clone']:.2f} | - | <= 2 |",
        f"| C7 the same / copying it into memory that is there | {found['stall_over_copy']:.2f} | - | <= 2 |",
        f"| C8 on disk / raw write + flush | {found['over_floor']['ours']:.2f} | {twin:.2f} | <= 1.6 |",
        f"| C9 step while a save runs / alone | {slower['ours']:.2f} | {slower['alone_twin']:.2f} | <= 1.10 |",
        f"| C9 the same, CPU time of the training thread | {cpu['ours']:.2f} | {cpu['alone_twin']:.2f} | <= 1.10 |",
        f"| C10 load, verified / torch.load | {found['over_torch_load']['ours']:.2f} | {load_twin:.2f} | <= 1.2 |",
        "",
        "| save | training waits | on disk after | / raw | CPU | step while it runs / alone | load | / torch.load |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| raw write + flush | - | {raw['wall_s']:.3f} s | 1 | {raw['cpu_s']:.3f} s | - | - | - |",
    ]
    loader = {"ours": "ours", "torch_save": "torch", "dcp": "dcp"}
    for way, title in ROWS.items():
        figures, load = saves[way], loads.get(loader.get(way, ""))
        slow = f"{slower[way]:.2f}" if way in slower else "-"
        back = f"{load['wall_s']:.3f} s | {found['over_torch_load'][loader[way]]:.2f}" if load else "- | -"
        lines.append(
            f"| {title} | {figures['stall_s']:.3f} s | {figures['wall_s']:.3f} s | {found['over_floor'][way]:.2f} | "
            f"{figures['cpu_s']:.3f} s | {slow} | {back} |"
        )
    if peer := found["deepspeed"]:
        figures = peer["saves"]["deepspeed"]
        lines.append(
            f"| DeepSpeed save_checkpoint, ZeRO 0, + flush | {figures['stall_s']:.3f} s | {figures['wall_s']:.3f} s | "
            f"{peer['over_floor']:.2f} | {figures['cpu_s']:.3f} s | - | - | - |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--folder", type=Path, help="where to save; default: the system's temporary folder")
    parser.add_argument("--deepspeed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.deepspeed:
        deepspeed_work(args.folder, args.deepspeed, args.out)
        return
    turns = 2 if args.quick else 9
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(Path(folder), turns)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found["deepspeed"] = deepspeed(Path(folder), turns)
    print(to_markdown(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
