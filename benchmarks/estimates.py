"""How far `tools.estimate_run` is off on this machine's CPU: small real runs against what it says of them.

    python -m benchmarks.estimates [--quick] [--machine FILE] [--out FILE]

First the machine is measured (tools.measure_machine; one thread a rank), with ResNet-50 as its probe. Then each run is
estimated and done: `ii-dist train` with synthetic images, 1 or 2 ranks over gloo, or with DALI and the JPEGs of
`benchmarks.loader`. Measured: images/s of the stretches of three steps, their median and the best. The estimate knows
an idle machine: where others compute too, no stretch is quite like it, and images per CPU-second of a rank (of runs
without a loader; the difference of a long and a short run, so that starting is not in it) say more.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.loader_variants import make_images

JPEGS = Path("data/bench_loader")
STEPS, SHORT_STEPS, STRETCH_STEPS = 24, 9, 3
# name -> network, gate, side, global batch, ranks, source
CASES: dict[str, tuple[str, str, int, int, int, str]] = {
    "resnet18, 64 px, 1 rank": ("ini_resnet18", "none", 64, 32, 1, "synthetic"),
    "resnet18, 64 px, 2 ranks": ("ini_resnet18", "none", 64, 64, 2, "synthetic"),
    "resnet18 fold3x3, 64 px, 1 rank": ("ini_resnet18", "fold3x3", 64, 32, 1, "synthetic"),
    "resnet18 fold3x3, 64 px, 1 rank, DALI": ("ini_resnet18", "fold3x3", 64, 32, 1, "dali"),
    "resnet34 se, 96 px, 1 rank": ("ini_resnet34", "se", 96, 16, 1, "synthetic"),
    "resnet50 fold3x3, 128 px, 1 rank": ("ini_resnet50", "fold3x3", 128, 8, 1, "synthetic"),
    "resnet20 fold3x3, 32 px, 1 rank": ("ini_resnet20", "fold3x3", 32, 128, 1, "synthetic"),
    "resnet20 fold3x3, 32 px, 2 ranks": ("ini_resnet20", "fold3x3", 32, 256, 2, "synthetic"),
}


def write_config(case: str, folder: Path, steps: int) -> Path:
    """A run of so many steps."""
    network, gate, side, batch, _, source = CASES[case]
    path = folder / "run.yaml"
    tree = {
        "name": "run",
        "runs_folder": str(folder),
        "data": {
            "source": source,
            "root": str(folder),
            "synthetic_images": batch * steps,
            "synthetic_classes": 10,
            "image_size": side,
            "eval_resize": side,
            "eval_image_size": side,
            "threads_per_rank": 1,
        },
        "model": {"network": network, "gate": gate},
        "optim": {"warmup_epochs": 0, "lr": 0.001},
        "engine": {"device": "cpu"},
        "train": {"global_batch": batch, "epochs": 1, "eval_every_epochs": 2, "stop_after_steps": steps - 1},
        "checkpoint": {"every_epochs": 0},
        "metrics": {"boards": ["jsonl"], "log_every_steps": STRETCH_STEPS, "machine": "none"},
    }
    path.write_text(json.dumps(tree))  # JSON is YAML
    if source == "dali":
        (folder / "train").symlink_to((JPEGS / "train").resolve())
        for split in ("train", "val"):
            (folder / f"{split}.index").write_bytes((JPEGS / "train.index").read_bytes())
    return path


def train(config: Path, ranks: int) -> tuple[list[float], float]:
    """Images/s of each stretch but the first, and CPU seconds of the whole run."""
    shutil.rmtree(config.parent / "run", ignore_errors=True)
    command = [sys.executable, "-m", "ii_dist", "train", str(config)]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", "-m"]
        command = [*launcher, *command[2:]]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = (config.parent / "run" / "metrics" / "rank_00000.jsonl").read_text().splitlines()
    rates = [line["throughput/images_per_s"] for line in map(json.loads, lines) if "throughput/images_per_s" in line]
    if len(rates) < 2:
        raise SystemExit(f"benchmarks.estimates: the run ended with {done.returncode}\n{done.stderr[-2000:]}")
    return rates[1:], after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def predict(config: Path, ranks: int, machine: Path, cores: int) -> dict[str, Any]:
    """What the tool says, from its command line."""
    command = [sys.executable, "-m", "tools.estimate_run", str(config), "--gpus", str(ranks), "--machine", str(machine)]
    done = subprocess.run(
        [*command, "--cores", str(cores), "--threads", "1", "--json"], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(machine: Path, cases: list[str], steps: int) -> dict[str, dict[str, Any]]:
    """Each case, estimated and run."""
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        ranks, source = CASES[case][4], CASES[case][5]
        if source == "dali":
            make_images(JPEGS)
        with tempfile.TemporaryDirectory() as folder:
            config = write_config(case, Path(folder), steps)
            # A core for each rank, and one for the loader's threads where there is one.
            said = predict(config, ranks, machine, cores=ranks + (source != "synthetic"))
            rates, long_s = train(config, ranks)
            per_cpu_s = 0.0
            if source == "synthetic":
                short_s = train(write_config(case, Path(folder), SHORT_STEPS), ranks)[1]
                per_cpu_s = (steps - SHORT_STEPS) * CASES[case][3] / ((long_s - short_s) / ranks)
        best, median = max(rates), statistics.median(rates)
        found[case] = {
            "predicted": said["images_per_s"],
            "best": best,
            "median": median,
            "per_cpu_s": per_cpu_s,
            "bound": said["step"]["bound"],
        }
        print(
            f"... {case}: {said['images_per_s']:.1f} said, {median:.1f} to {best:.1f} done", file=sys.stderr, flush=True
        )
    return found


def to_markdown(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| images/s on this CPU | estimated | measured, median | best stretch | a CPU-s of a rank | error | bound |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case, row in found.items():
        cpu = row["per_cpu_s"]
        error = row["predicted"] / (cpu or row["best"]) - 1
        figures = f"{row['predicted']:.1f} | {row['median']:.1f} | {row['best']:.1f} | {f'{cpu:.1f}' if cpu else '-'}"
        figures += f" | {error:+.0%}"
        lines.append(f"| {case} | {figures} | {row['bound']} |")
    lines.append("\nError: of the estimate, against images per CPU-second, or the best stretch where there are none.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two cases, few steps")
    parser.add_argument("--machine", type=Path, help="use this file of tools.measure_machine")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        machine = args.machine or Path(folder) / "machine.json"
        if args.machine is None:
            command = [sys.executable, "-m", "tools.measure_machine", "--out", str(machine)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        cases = list(CASES)[:2] if args.quick else list(CASES)
        found = measure(machine, cases, 12 if args.quick else STEPS)
    print(to_markdown(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
