"""All gates on the same data, network, recipe and budget, several seeds each: does a gate help, and what does it cost?

    python -m benchmarks.study_gates [--seeds 3] [--config FILE] [--out docs/study-gates.md]     (make study-gates)

Every run is an ordinary `ii-dist train`, so a study that was stopped goes on where it was when it is started again.
On a machine without a GPU two runs share the cores, one thread each, and speed is measured afterwards, all gates in
turn, in CPU time; with a GPU one run at a time has it, and its own images/s count. In: a config and the gates' names.
Out: a table and a plot, mean and spread over the seeds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ii_dist.config import ClusterError, RunConfig, RunFolder, gpu_count, load_config
from ii_dist.config.networks import GATE_NAMES
from ii_dist.metrics import read_summary
from tools._border import run

CLASSES = 10
SPEED_ON_GPU = "Images/s are those of the runs, one at a time on the GPU, loader and metrics included."
SPEED_ON_CPU = """The last column is the training step alone (forward, loss, backward, SGD), measured after the runs:
one thread, process CPU time, all gates in turn, median of nine turns. Differences of 2 % are within the noise of shared
cores."""
CPU_CONFIG, GPU_CONFIG = Path("configs/fashion/study_gates.yaml"), Path("configs/fashion/study_gates_gpu.yaml")


@dataclass(frozen=True, slots=True)
class Result:
    """One run of the study."""

    gate: str
    seed: int
    top1: float
    images_per_s: float
    parameters: int
    images: int
    """Images trained on, repeats counted."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study_gates", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--config", type=Path, help="default: the CPU or the GPU setting, by the machine")
    parser.add_argument("--out", type=Path, default=Path("docs/study-gates.md"))
    options = parser.parse_args(arguments)
    gpus = gpu_count(os.environ)
    config = options.config or (GPU_CONFIG if gpus else CPU_CONFIG)
    # Seeds outside, gates inside: a study that is stopped early has compared all gates equally often.
    jobs = [(gate, seed) for seed in range(options.seeds) for gate in GATE_NAMES]
    started_s, done = time.monotonic(), list[Result]()
    with ThreadPoolExecutor(1 if gpus else 2) as pool:
        for result in pool.map(lambda job: train(config, *job), jobs):
            done.append(result)
            left_s = (time.monotonic() - started_s) / len(done) * (len(jobs) - len(done))
            print(
                f"{len(done)}/{len(jobs)} {result.gate:<10} seed {result.seed}: top-1 {result.top1:.2f} %, "
                f"{result.images_per_s:.0f} images/s; about {left_s / 60:.0f} min left",
                flush=True,
            )
    cfg = load_config(config)
    if not gpus:
        rates = step_rates(cfg)
        done = [replace(result, images_per_s=rates[result.gate]) for result in done]
    write(cfg, config, done, options.out, on_gpu=bool(gpus))
    return 0


def train(config: Path, gate: str, seed: int) -> Result:
    """Train, or take what an earlier study has trained. Raises ClusterError with the last line of a run that failed."""
    overrides = [f"model.gate={gate}", f"seed={seed}", f"name=study-{gate}-{seed}"]
    cfg = load_config(config, overrides)
    folder = RunFolder(Path(cfg.runs_folder) / cfg.name)
    summary = read_summary(folder)
    if summary is None or summary.steps < summary.total_steps:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "ii_dist", "train", str(config), *overrides]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ended.returncode:
            raise ClusterError(f"{cfg.name} ended with {ended.returncode}: {(ended.stderr.splitlines() or ['?'])[-1]}")
        summary = read_summary(folder)
    assert summary is not None
    assert summary.top1 is not None
    assert summary.newest_checkpoint is not None
    manifest = json.loads((folder.checkpoints / summary.newest_checkpoint / "COMMITTED.json").read_text())
    images = summary.steps * cfg.train.global_batch
    return Result(gate, seed, summary.top1, summary.images_per_s, count_parameters(manifest["tensors"]), images)


def step_rates(cfg: RunConfig, turns: int = 9) -> dict[str, float]:
    """Images a CPU second of the training step with each gate: one thread, all gates in turn, medians."""
    import torch

    from benchmarks.models import in_turn, training_step
    from ii_dist.models import create_model

    torch.set_num_threads(1)
    images_NCHW = torch.randn(cfg.train.global_batch, 3, cfg.data.image_size, cfg.data.image_size)
    images_NCHW = images_NCHW.contiguous(memory_format=torch.channels_last)
    steps = {}
    for gate in GATE_NAMES:
        model = create_model(cfg.model.model_copy(update={"gate": gate}), num_classes=CLASSES)
        steps[gate] = training_step(model.to(memory_format=torch.channels_last), images_NCHW, CLASSES)  # type: ignore[call-overload]
    found = in_turn(steps, turns, repeats=1)
    return {gate: len(images_NCHW) / statistics.median(seconds) for gate, seconds in found.items()}


def count_parameters(tensors: dict[str, dict[str, list[int]]]) -> int:
    """Elements of the network's trainable tensors: every one of them has an optimizer state."""
    total = 0
    for name, entry in tensors.items():
        if name.startswith("optimizer."):
            size = 1
            for side in entry["shape"]:
                size *= side
            total += size
    return total


def write(cfg: RunConfig, config: Path, results: list[Result], out: Path, on_gpu: bool) -> None:
    """The page and its picture."""
    rate_unit = "images/s" if on_gpu else "images a CPU second"
    rows = [
        f"| gate | top-1 %, mean | spread (lowest .. highest) | seeds | parameters | {rate_unit} |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for gate in GATE_NAMES:
        of_gate = [r for r in results if r.gate == gate]
        top1 = [r.top1 for r in of_gate]
        rate = statistics.median(r.images_per_s for r in of_gate)
        rows.append(
            f"| `{gate}` | {statistics.mean(top1):.2f} | {min(top1):.2f} .. {max(top1):.2f} | {len(top1)} | "
            f"{of_gate[0].parameters:,} | {rate:.0f} |"
        )
    text = f"""# Study: the gates side by side

{cfg.model.network} on `{cfg.data.root}`: {results[0].images:,} training images a run (epochs: {cfg.train.epochs:g}), in
batches of {cfg.train.global_batch}; {cfg.optim.optimizer} with peak rate {cfg.optim.lr} and weight decay
{cfg.optim.weight_decay}; seeds 0 to {max(r.seed for r in results)}. The same recipe for every gate: only `model.gate`
and `seed` differ. Made by `make study-gates` (`{config}`).

{chr(10).join(rows)}

![Top-1 of each run, by gate]({out.stem}.png)

## What it shows, and what not
{verdict(results)}

One short budget on small grey pictures. A difference smaller than the spread of the seeds says nothing, and a gate that
learns faster in a short run need not end higher in a long one. The recipe was tuned for none of the gates.
{SPEED_ON_GPU if on_gpu else SPEED_ON_CPU}
"""
    out.write_text(text)
    plot(results, out.with_suffix(".png"))


def verdict(results: list[Result]) -> str:
    """Whether the gates differ by more than the seeds of one gate do."""
    of_gate = [[r.top1 for r in results if r.gate == gate] for gate in GATE_NAMES]
    means = [statistics.mean(top1) for top1 in of_gate]
    apart, spread = max(means) - min(means), max(max(top1) - min(top1) for top1 in of_gate)
    found = "no difference between the gates" if apart <= spread else "a difference that seeds alone do not explain"
    return (
        f"The means of the gates lie within {apart:.2f} points; the seeds of one gate within up to {spread:.2f}.\n"
        f"So this study shows {found} in accuracy."
    )


def plot(results: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for place, gate in enumerate(GATE_NAMES):
        top1 = [r.top1 for r in results if r.gate == gate]
        axes.plot([place] * len(top1), top1, "o", color="#1f5fa8", alpha=0.7, markersize=7)
        axes.hlines(statistics.mean(top1), place - 0.25, place + 0.25, color="#c8602d", linewidth=2.5)
    axes.set_xticks(range(len(GATE_NAMES)), GATE_NAMES)
    axes.set_ylabel("top-1 (%)")
    axes.set_title("Top-1 by gate: each seed, and the mean", loc="left", fontweight="bold")
    axes.grid(axis="y", color="#e0e0e0")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
