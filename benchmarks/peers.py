"""ii_dist beside its peers: the same network, images, batch and optimizer, trained by timm's way, by torchvision's
reference way and by ii_dist, in turns.

    python -m benchmarks.peers [--quick] [--network resnet18] [--size 64] [--batch 32] [--turns 15] [--steps 20]
                               [--sides NAME ...] [--out FILE]                             (make bench-peers)

Each side is a process of its own and trains `--steps` steps when its turn comes, while the others sleep; a few hundred
in all. On a CPU each has one thread to compute and one worker to load. Measured over a turn: CPU time an image (the
process and its workers), wall time an image, the share of it that waits for data; at its end memory and loss. A ratio
is the median over the turns of the ratio within a turn, so that a slow minute of the machine weighs on both sides of
it; timm runs twice, and the ratio of these twins is the noise. A turn begins and ends when everything that was begun
ahead is done, so the CPU time is that of its images; with busy neighbours the wall time is not.
Images: the JPEGs of `benchmarks.loader` (500x375), cropped at random, flipped. On a GPU: bfloat16, wall time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.loader_variants import make_images
from benchmarks.run_all import RESULTS, device_name, gpu_name

DATA = Path("data/bench_loader")
PEERS = ("timm", "reference")
OURS = ("ours", "ours_torch")
ROWS = {
    "timm": "timm's training script, its way",
    "timm_twin": "the same once more",
    "reference": "torchvision's reference, its way",
    "ours": "ii_dist, DALI",
    "ours_torch": "ii_dist, torch reader",
}
WARM_UP_STEPS = 3
COPIES, IMAGES = 10, 1000
Turns = dict[str, list[dict[str, float]]]


def serve(side_name: str, work_json: str) -> None:
    """Be one side: for each number on stdin train so many steps and answer with a line of figures."""
    import torch

    from benchmarks.peers_sides import SIDES, Work
    from benchmarks.peers_usage import cpu_s, memory_bytes, settle

    tree: dict[str, Any] = json.loads(work_json)
    work = Work(**tree | {"root": Path(tree["root"])})
    on_gpu = work.device == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)
    side = SIDES[side_name](work)
    for line in sys.stdin:
        steps = int(line)
        settle()
        cpu_before_s, wall_before_s = cpu_s(), time.monotonic()
        turn = side.train(steps)
        if on_gpu:
            torch.cuda.synchronize()
        wall_s = time.monotonic() - wall_before_s
        settle()
        figures = {
            "cpu_s": (cpu_s() - cpu_before_s) / (steps * work.batch),
            "wall_s": wall_s / (steps * work.batch),
            "wait_share": turn.wait_s / wall_s,
            "loss": turn.loss,
            "memory_bytes": memory_bytes(),
            "gpu_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        }
        print(json.dumps(figures), flush=True)
    side.close()


def measure(work: dict[str, Any], sides: list[str], turns: int, steps: int) -> Turns:
    """Each side's turns; who begins a round changes."""
    command = [sys.executable, "-m", "benchmarks.peers", "--work", json.dumps(work), "--serve"]
    env = os.environ | ({"OMP_NUM_THREADS": "1"} if work["device"] == "cpu" else {})
    children = {
        name: subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        for name in sides
    }
    found: Turns = {name: [] for name in sides}
    try:
        for child in children.values():
            _turn(child, WARM_UP_STEPS)
        for turn in range(turns):
            start = turn % len(sides)
            for name in sides[start:] + sides[:start]:
                found[name].append(_turn(children[name], steps))
            print(f"turn {turn + 1} of {turns}", file=sys.stderr, flush=True)
        for child in children.values():
            assert child.stdin
            child.stdin.close()
            child.wait(timeout=60)
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    return found


def _turn(child: "subprocess.Popen[str]", steps: int) -> dict[str, float]:
    assert child.stdin
    assert child.stdout
    child.stdin.write(f"{steps}\n")
    child.stdin.flush()
    line = child.stdout.readline()
    if not line:
        raise SystemExit(f"benchmarks.peers: one side ended with {child.wait()}; its traceback is above")
    figures: dict[str, float] = json.loads(line)
    return figures


def figures_of(found: Turns) -> dict[str, Any]:
    """Medians of each side, and the ratios: above 1 ii_dist is the faster one."""
    rows = {
        name: {
            "images_per_cpu_s": 1 / _median(turns, "cpu_s"),
            "images_per_s": 1 / _median(turns, "wall_s"),
            "data_wait_share": _median(turns, "wait_share"),
            "memory_gb": max(turn["memory_bytes"] for turn in turns) / 1e9,
            "gpu_memory_gb": max(turn["gpu_memory_bytes"] for turn in turns) / 1e9,
            "first_loss": turns[0]["loss"],
            "loss": turns[-1]["loss"],
        }
        for name, turns in found.items()
    }
    pairs = [(ours, peer) for ours in OURS for peer in PEERS] + [("timm_twin", "timm")]
    ratios = {
        f"{mine} / {peer}": {
            measure: statistics.median(b[f"{measure}_s"] / a[f"{measure}_s"] for a, b in zip(*both, strict=True))
            for measure in ("cpu", "wall")
        }
        for mine, peer in pairs
        if len(both := [found[name] for name in (mine, peer) if name in found]) == 2
    }
    return {"sides": rows, "ratios": ratios, "turns": found}


def _median(turns: list[dict[str, float]], name: str) -> float:
    return statistics.median(turn[name] for turn in turns)


def to_markdown(found: dict[str, Any], work: dict[str, Any], steps: int) -> str:
    """Both tables."""
    lines = [
        f"{work['network']}, {work['side']} px, batch {work['batch']}, {steps} steps of each side in turns; "
        f"{work['workers']} worker(s), {work['device']}",
        "",
        "| trainer | images / CPU-s | images / s | waits for data | memory | GPU memory | loss, first and last turn |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found["sides"].items():
        gpu = f"{row['gpu_memory_gb']:.2f} GB" if row["gpu_memory_gb"] else "-"
        lines.append(
            f"| {ROWS[name]} | {row['images_per_cpu_s']:.1f} | {row['images_per_s']:.1f} | "
            f"{row['data_wait_share']:.1%} | {row['memory_gb']:.2f} GB | {gpu} | "
            f"{row['first_loss']:.3f}, {row['loss']:.3f} |"
        )
    lines += ["", "| images for the same time | by CPU time | by wall time | wanted |", "| --- | --- | --- | --- |"]
    for name, ratio in found["ratios"].items():
        wanted = "1 (noise)" if "twin" in name else ">= 1.0"
        lines.append(f"| {name} | {ratio['cpu']:.3f} | {ratio['wall']:.3f} | {wanted} |")
    return "\n".join(lines)


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.work)
        return
    on_gpu = bool(gpu_name())
    if args.quick:
        args.size, args.batch, args.turns, args.steps = 32, 4, 2, 2
    size, batch = args.size or (224 if on_gpu else 64), args.batch or (128 if on_gpu else 32)
    network = args.network or ("resnet50" if on_gpu else "resnet18")
    total = WARM_UP_STEPS + args.turns * args.steps
    if args.data == DATA:
        make_images(args.data)
    with tempfile.TemporaryDirectory() as folder:
        from benchmarks.peers_images import CLASSES, arrange

        root = Path(folder)
        arrange(args.data, root, 100 if args.quick else IMAGES, 1 if args.quick else COPIES)
        workers = len(os.sched_getaffinity(0)) if on_gpu else 1
        work = {
            "root": str(root),
            "network": network,
            "side": size,
            "batch": batch,
            "total_steps": total,
            "classes": len(CLASSES),
            "workers": workers,
            "device": "cuda" if on_gpu else "cpu",
        }
        found = figures_of(measure(work, args.sides, args.turns, args.steps))
    del work["root"]
    text = to_markdown(found, work, args.turns * args.steps)
    print(text)
    if args.out:
        args.out.write_text(json.dumps(found | {"work": work}, indent=2) + "\n")
    elif not args.quick:
        write_results(text, found | {"work": work})


def write_results(text: str, found: dict[str, Any]) -> None:
    """benchmarks/results/peers.md and peers.json; with a GPU peers-gpu."""
    gpu = gpu_name()
    device = ", ".join(name for name in (gpu, device_name()) if name)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm"))
    RESULTS.mkdir(parents=True, exist_ok=True)
    stem = "peers-gpu" if gpu else "peers"
    (RESULTS / f"{stem}.md").write_text(f"# make bench-peers\n\n{device}, {packages}, {date.today()}\n\n{text}\n")
    (RESULTS / f"{stem}.json").write_text(json.dumps({"device": device, **found}, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few tiny steps; figures are not kept")
    parser.add_argument("--network", help="a ResNet of timm (default resnet18, on a GPU resnet50)")
    parser.add_argument("--size", type=int, help="side of the images (default 64, on a GPU 224)")
    parser.add_argument("--batch", type=int, help="images a step (default 32, on a GPU 128)")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20, help="of a turn")
    parser.add_argument("--sides", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--data", type=Path, default=DATA, help="folder with JPEGs")
    parser.add_argument("--out", type=Path, help="write the figures there, not to benchmarks/results")
    parser.add_argument("--serve", choices=list(ROWS), help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
