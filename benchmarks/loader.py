"""What the loader costs: images per CPU-second against a hand-written DALI pipeline (C3) and a PIL DataLoader (C4);
the first batch after a seek against a cold first batch (C10).

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
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ii_dist.data import BatchSource

DATA = Path("data/bench_loader")
IMAGES, CLASSES, SIZE, QUALITY = 1000, 10, (500, 375), 90
BATCH, SIDE = 50, 224
SEED = 0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# name -> what runs; "ours" gives the layout of the hand-written pipeline, "ours_channels_last" the one that training
# uses unless told otherwise; the twin is the hand-written pipeline once more.
VARIANTS = ("ours", "ours_channels_last", "hand_written", "hand_written_twin", "pil_dataloader", "ours_torch")
SETTLE_S, IDLE_S = 0.02, 0.001


def make_images(root: Path) -> None:
    """Clouds of five scales and a little grain: about 58 kB each, close to photographs of this size."""
    from PIL import Image

    from ii_dist.data import build_index, write_index

    if (root / "train.index").exists():
        return
    for number in range(IMAGES):
        rng = np.random.Generator(np.random.PCG64(number))
        pixels = rng.normal(128, 3.2, (SIZE[1], SIZE[0], 3))
        for cells, strength in ((8, 60), (32, 40), (128, 25), (400, 12)):
            coarse = rng.integers(0, 256, (max(2, cells * 3 // 4), cells, 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC), dtype=np.float64)
            pixels += (smooth - 127.5) / 127.5 * strength
        folder = root / "train" / f"class_{number % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number:04d}.jpg", quality=QUALITY)
    rows, classes = build_index(root / "train")
    write_index(root / "train.index", rows, classes, root="train")


def our_source(root: Path, source: str, channels_last: bool = False) -> "BatchSource":
    """This project's loader."""
    from ii_dist.config import DataConfig, DataFacts, RunConfig, make_plan
    from ii_dist.data import make_train_source
    from ii_dist.runtime import World

    data = DataConfig(source=source, root=str(root), image_size=SIDE, threads_per_rank=1)  # type: ignore[arg-type]
    run = RunConfig.model_validate({"name": "bench", "data": data, "train": {"global_batch": BATCH}})
    plan = make_plan(run, 1, DataFacts(IMAGES, IMAGES, CLASSES))
    return make_train_source(data, plan, World(), SEED, "cpu", channels_last)


def hand_written(root: Path) -> Iterator[Any]:
    """What one writes with DALI alone: its reader, its random crop and flip, the same operators and output."""
    from nvidia.dali import Pipeline, fn, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    pipeline = Pipeline(batch_size=BATCH, num_threads=1, device_id=None, seed=SEED)
    with pipeline:
        encoded, labels = fn.readers.file(file_root=str(root / "train"), random_shuffle=True, name="Reader")
        images = fn.decoders.image_random_crop(
            encoded, device="cpu", random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3], num_attempts=10
        )
        images = fn.resize(images, size=(SIDE, SIDE), interp_type=types.INTERP_LINEAR, antialias=True)
        images = fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip(probability=0.5),
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * value for value in MEAN],
            std=[255 * value for value in STD],
        )
        pipeline.set_outputs(images, labels)
    batches = DALIGenericIterator([pipeline], ["images", "labels"], reader_name="Reader", auto_reset=True)
    while True:
        for batch in batches:
            yield batch[0]["images"]


def pil_dataloader(root: Path) -> Iterator[Any]:
    """The torchvision example: PIL, float32, two worker processes. An iteration's workers end with it, and so count."""
    import torch
    from torch.utils.data import DataLoader

    from ii_dist.models.compat import ensure_torchvision

    ensure_torchvision()
    from torchvision import datasets, transforms

    steps = [
        transforms.RandomResizedCrop(SIDE),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    folder = datasets.ImageFolder(str(root / "train"), transforms.Compose(steps))
    generator = torch.Generator().manual_seed(SEED)
    while True:
        loader = DataLoader(folder, BATCH, shuffle=True, num_workers=2, drop_last=True, generator=generator)
        for images, _ in loader:
            yield images


def cpu_s() -> float:
    """CPU seconds of this process and of its ended children."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def serve(variant: str, root: Path, batches: int) -> None:
    """Be one variant: for each line on stdin run `batches` batches, answer with CPU seconds an image."""
    import torch

    torch.set_num_threads(1)
    makers: dict[str, Callable[[], Iterator[Any]]] = {
        "ours": lambda: (batch.images_NCHW for batch in our_source(root, "dali")),
        "ours_channels_last": lambda: (batch.images_NCHW for batch in our_source(root, "dali", True)),
        "ours_torch": lambda: (batch.images_NCHW for batch in our_source(root, "torch")),
        "hand_written": lambda: hand_written(root),
        "hand_written_twin": lambda: hand_written(root),
        "pil_dataloader": lambda: pil_dataloader(root),
    }
    images = makers[variant]()
    # A turn of the DataLoader is a whole pass, so that it ends with its workers.
    batches = IMAGES // BATCH if variant == "pil_dataloader" else batches
    for _ in range(batches):
        assert next(images).shape == (BATCH, 3, SIDE, SIDE)
    for _ in sys.stdin:
        settle()
        before_s = cpu_s()
        for _ in range(batches):
            next(images)
        settle()
        print((cpu_s() - before_s) / (batches * BATCH), flush=True)


def settle() -> None:
    """Wait until what was begun ahead is done, so that every turn pays for as many images as it takes."""
    before_s = cpu_s()
    while True:
        time.sleep(SETTLE_S)
        now_s = cpu_s()
        if now_s - before_s < IDLE_S:
            return
        before_s = now_s


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


def report(found: dict[str, list[float]], seeks: dict[str, list[float]]) -> dict[str, Any]:
    """Print the tables; return the figures."""
    rate = {name: 1 / statistics.median(values) for name, values in found.items()}
    goals = {
        "C3 loader / hand-written DALI": (ratio(found, "hand_written", "ours"), ">= 0.95, goal 0.98"),
        "C4 loader / PIL DataLoader (2 workers)": (ratio(found, "pil_dataloader", "ours_channels_last"), ">= 1.6"),
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
    return {"images_per_cpu_s": rate, "ratios": {name: value for name, (value, _) in goals.items()}, "turns": found}


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
    make_images(asked.data)
    turns = 3 if asked.quick else 11
    found = measure(asked.data, turns, 4 if asked.quick else asked.batches)
    figures = report(found, measure_seek(asked.data, turns))
    if asked.out:
        asked.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
