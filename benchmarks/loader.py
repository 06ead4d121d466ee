"""What the loader costs: images per CPU-second against a hand-written DALI pipeline (C3), a PIL DataLoader (C4) and
libjpeg-turbo alone, which decodes whole images and does nothing else (C5); the first batch after a seek against a cold
first batch (C10); the CPU time of Python itself.

    python -m benchmarks.loader [--quick] [--out FILE]

Method, made for machines whose cores are shared: process CPU time (own and children), one thread of each kind, the
variants take turns of a thousand images in processes of their own. A ratio is the median, over the turns, of the ratio
within the turn, so that a slow hour of the machine weighs on both sides of it. The hand-written pipeline runs twice, as
two variants: the ratio of these twins is the noise to read the others by. Images: 1,000 synthetic JPEGs, 500x375,
quality 90.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.loader_gpu import measure_end_to_end
from benchmarks.loader_python import measure_python
from benchmarks.loader_variants import (
    BATCH,
    IMAGES,
    VARIANTS,
    cpu_s,
    expected_shape,
    iterator,
    make_images,
    our_source,
    settle,
)
from ii_dist.config import gpu_count

DATA = Path("data/bench_loader")
PYTHON_GOALS = {"training thread": "<= 10 ms", "preparing": "<= 10 ms", "producing": "-"}


def serve(variant: str, root: Path, batches: int) -> None:
    """Be one variant: for each line on stdin run `batches` batches, answer with CPU seconds an image."""
    import torch

    torch.set_num_threads(1)
    work = iterator(variant, root)
    # A turn of the DataLoader is a whole pass, so that it ends with its workers.
    batches = IMAGES // BATCH if variant == "pil_dataloader" else batches
    for _ in range(batches):
        assert next(work).shape == expected_shape(variant)
    for _ in sys.stdin:
        settle()
        before_s = cpu_s()
        for _ in range(batches):
            next(work)
        settle()
        print((cpu_s() - before_s) / (batches * BATCH), flush=True)


def first_batch_s(root: Path, offset: int, running: bool) -> float:
    """CPU seconds until the first batch at `offset` of epoch 1 is there, of a new or of a running source."""
    from ii_dist.data import Position

    source = our_source(root, "dali")
    if running:
        next(iter(source))
    settle()
    before_s = cpu_s()
    source.seek(Position(1, offset))
    next(iter(source))
    settle()
    source.close()
    return cpu_s() - before_s


def measure_seek(root: Path, turns: int) -> dict[str, list[float]]:
    """Cold: the start of an epoch. Then its middle, of a new source and of a running one."""
    middle = IMAGES // 2
    kinds = {"cold first batch": (0, False), "after a seek": (middle, False), "seek while running": (middle, True)}
    first_batch_s(root, 0, False)  # imports
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(turns):
        for kind, (offset, running) in kinds.items():
            found[kind].append(first_batch_s(root, offset, running))
    return found


def measure(root: Path, turns: int, batches: int) -> dict[str, list[float]]:
    """CPU seconds an image of each variant, turn by turn."""
    command = [sys.executable, "-m", "benchmarks.loader", "--data", str(root), "--batches", str(batches), "--serve"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    children = {
        name: subprocess.Popen(
            [*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for name in VARIANTS
    }
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    try:
        for turn in range(turns):
            for name, child in children.items():
                assert child.stdin
                assert child.stdout
                child.stdin.write("\n")
                child.stdin.flush()
                found[name].append(float(child.stdout.readline()))
            print(f"turn {turn + 1} of {turns}", file=sys.stderr)
    finally:
        for child in children.values():
            child.terminate()
            child.wait()
    return found


def report(found: dict[str, list[float]], seeks: dict[str, list[float]], python_ms: dict[str, float]) -> dict[str, Any]:
    """Print the tables; return the figures."""
    rate = {name: 1 / statistics.median(values) for name, values in found.items()}
    goals = {
        "C3 loader / hand-written DALI": (ratio(found, "hand_written", "ours"), ">= 0.95, goal 0.98"),
        "C4 loader / PIL DataLoader (2 workers)": (ratio(found, "pil_dataloader", "ours_channels_last"), ">= 1.9"),
        "C5 loader / libjpeg-turbo, full decode": (ratio(found, "libjpeg_turbo", "ours_channels_last"), ">= 0.40"),
        "loader / PIL, full decode": (ratio(found, "pil_decode", "ours_channels_last"), "-"),
        "torch reader / PIL DataLoader": (ratio(found, "pil_dataloader", "ours_torch"), "-"),
        "C10 first batch after a seek / cold": (ratio(seeks, "after a seek", "cold first batch"), "<= 1.1"),
        "C10 the same, out of a running source": (ratio(seeks, "seek while running", "cold first batch"), "<= 1.1"),
        "noise: twin / hand-written DALI": (ratio(found, "hand_written", "hand_written_twin"), "1"),
    }
    print("| variant | images / CPU-s | slowest and fastest turn |\n|---|---|---|")
    for name, values in found.items():
        print(f"| {name} | {rate[name]:.0f} | {1 / max(values):.0f} .. {1 / min(values):.0f} |")
    print("\n| figure | measured | wanted |\n|---|---|---|")
    for name, (measured, wanted) in goals.items():
        print(f"| {name} | {measured:.3f} | {wanted} |")
    print("\n| Python's CPU time for a batch of 256 | measured | wanted |\n|---|---|---|")
    for name, wanted in PYTHON_GOALS.items():
        print(f"| {name} | {python_ms[name]:.2f} ms | {wanted} |")
    ratios = {name: value for name, (value, _) in goals.items()}
    return {"images_per_cpu_s": rate, "ratios": ratios, "python_ms": python_ms, "turns": found}


def report_end_to_end(found: dict[str, Any]) -> dict[str, Any]:
    """Print the GPU's table; return its figures."""
    print(
        "\n| on the GPU, images / s | end to end | synthetic | ratio | A/A noise | wanted |\n|---|---|---|---|---|---|"
    )
    figures = f"{found['whole']:.0f} | {found['synthetic']:.0f} | {found['ratio']:.3f} | {found['noise']:.3f}"
    print(f"| G6 {found['network']}, batch {found['batch']} | {figures} | >= 0.95 |")
    return found


def ratio(found_s: dict[str, list[float]], over: str, under: str) -> float:
    """Median over the turns of the seconds of `over` for each second of `under`."""
    return statistics.median(a / b for a, b in zip(found_s[over], found_s[under], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three short turns, to see whether it runs")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--data", type=Path, default=DATA, help="folder for the images, made once")
    parser.add_argument("--batches", type=int, default=IMAGES // BATCH, help=f"batches of {BATCH} a turn")
    parser.add_argument("--serve", choices=VARIANTS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.serve, asked.data, asked.batches)
        return
    if find_spec("simplejpeg") is None:
        raise SystemExit("error: simplejpeg, libjpeg-turbo alone, is missing; run: pip install simplejpeg==1.9.0")
    make_images(asked.data)
    turns = 3 if asked.quick else 11
    found = measure(asked.data, turns, 4 if asked.quick else asked.batches)
    figures = report(found, measure_seek(asked.data, turns), measure_python(asked.data, turns))
    if gpu_count(os.environ):
        figures["end_to_end"] = report_end_to_end(measure_end_to_end(asked.data, turns))
    if asked.out:
        asked.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
