"""What order, index and sharding check cost for large data sets on many ranks, which this machine only simulates.

    python -m benchmarks.scale [--quick] [--out FILE]

Every part runs in a fresh process for each size; times are CPU times, memory is the process's own (anonymous) growth,
with the mapped index, which all ranks of a node share, told apart. The index is written with holes where its content
plays no part (hashes, labels), so that 100 million rows take 1.6 GB of disk for the time of the measurement. `--out`
writes the table (.md) or the figures (JSON).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ii_dist.config import DataConfig, Plan, RunConfig, make_plan
from ii_dist.config.index_header import INDEX_FORMAT, INDEX_VERSION
from ii_dist.config.plan import DataFacts

IMAGENET, LARGE = 1_281_167, 100_000_000
RANKS, PER_RANK, CLASSES, SEED = 1024, 32, 1000, 0
# The layout that `ii_dist.data.index` describes: safetensors type, numpy type, shape after the number of images.
COLUMNS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "path_offsets": ("I64", "<i8", ()),
    "offset": ("I64", "<i8", ()),
    "length": ("I64", "<i8", ()),
    "shard": ("I32", "<i4", ()),
    "label": ("I32", "<i4", ()),
    "width": ("I32", "<i4", ()),
    "height": ("I32", "<i4", ()),
    "sha256": ("U8", "u1", (32,)),
    "path_bytes": ("U8", "u1", ()),
}
SHARD = "shard_00000.tar"


def write_large_index(folder: Path, images: int, split: str = "train", image: bytes = b"\xff" * 1000) -> Path:
    """An index of `images` rows that are all the same 500x375 image, `image`, at the start of one shard. The file has
    holes wherever a column is zero."""
    (folder / SHARD).write_bytes(image)
    constant = {"length": len(image), "width": 500, "height": 375}
    header: dict[str, object] = {}
    start = 0
    for name, (type_name, kind, tail) in COLUMNS.items():
        shape = [0 if name == "path_bytes" else images + (name == "path_offsets"), *tail]
        length = int(np.prod(shape)) * np.dtype(kind).itemsize
        header[name] = {"dtype": type_name, "shape": shape, "data_offsets": [start, start + length]}
        start += length
    about = {"format": INDEX_FORMAT, "version": INDEX_VERSION, "images": str(images), "root": ".", "sha256": "5c" * 32}
    names = [f"class_{i:04d}" for i in range(CLASSES)]
    about |= {"classes": json.dumps(names), "shards": json.dumps([SHARD]), "summary": "{}"}
    text = json.dumps({"__metadata__": about, **header}).encode()
    text += b" " * (-len(text) % 8)
    path = folder / f"{split}.index"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        first = file.tell()
        for name, value in constant.items():
            file.seek(first + header[name]["data_offsets"][0])  # type: ignore[index]  # written above
            np.full(images, value, COLUMNS[name][1]).tofile(file)
        file.truncate(first + start)
    return path


def plan_for(images: int, ranks: int, images_per_rank: int) -> tuple[RunConfig, Plan]:
    """A run whose ranks take `images_per_rank` images a step."""
    data = DataConfig(source="torch", threads_per_rank=1)
    train = {"global_batch": ranks * images_per_rank, "epochs": 90.0}
    cfg = RunConfig.model_validate({"name": "scale", "data": data, "train": train, "seed": SEED})
    return cfg, make_plan(cfg, ranks, DataFacts(images, 50_000, CLASSES))


def measure_order(images: int, folder: Path) -> dict[str, float]:
    """The order of the epoch, as one rank asks for it: one batch at three places, and its share of an epoch."""
    from ii_dist.data.positions import TrainSchedule

    schedule = TrainSchedule(plan_for(images, RANKS, PER_RANK)[1], RANKS // 2, SEED)
    before = own_bytes()
    last = schedule.batches_per_pass - 1
    batch_s = {number: cpu_s(partial(schedule.rows, number), 50) for number in (0, last // 2, last)}
    batches = min(last, 200)
    share_s = cpu_s(lambda: [schedule.rows(number) for number in range(batches)], 1) / batches * (last + 1)
    return {
        "batch_s": statistics.median(batch_s.values()),
        "batch_s_spread": max(batch_s.values()) / min(batch_s.values()),
        "epoch_share_s": share_s,
        "bytes": own_bytes() - before,
    }


def measure_index(images: int, folder: Path) -> dict[str, float]:
    """Opening the index, then a whole source, and a seek to the middle of an epoch."""
    import ii_dist.data.torch_reader  # noqa: F401 - its imports are not what is measured
    from ii_dist.data import Index, Position, make_train_source
    from ii_dist.runtime import World

    cfg, plan = plan_for(images, RANKS, PER_RANK)
    data = cfg.data.model_copy(update={"root": str(folder)})
    own, mapped, files = own_bytes(), own_bytes("RssFile"), open_files()
    started_s, started_wall_s = time.process_time(), time.monotonic()
    index = Index.open(folder / "train.index")
    found: dict[str, float] = {
        "open_s": time.process_time() - started_s,
        "open_wall_s": time.monotonic() - started_wall_s,
        "file_bytes": float(index.path.stat().st_size),
        "bytes": own_bytes() - own,
        "mapped_bytes": own_bytes("RssFile") - mapped,
        "files": open_files() - files,
    }
    del index
    world = World(rank=RANKS // 2, world_size=RANKS, local_world_size=8)
    started_s = time.process_time()
    source = make_train_source(data, plan, world, SEED, "cpu", False)
    found["source_s"] = time.process_time() - started_s
    middle = Position(45, plan.steps_per_epoch // 2 * plan.global_batch)
    found |= {
        "seek_s": cpu_s(lambda: source.seek(middle), 20),
        "source_bytes": own_bytes() - own,
        "source_files": open_files() - files,
    }
    source.close()
    return found


def measure_check(images: int, folder: Path, ranks: int, per_rank: int) -> dict[str, float]:
    """The sharding check: what each rank says, and rank 0's judgement of what all say."""
    from ii_dist.data import Index
    from ii_dist.data.digests import Outlook, batches_to_look_at
    from ii_dist.data.positions import TrainSchedule
    from ii_dist.data.source import Request
    from ii_dist.train.sharding_check import judge, tell

    cfg, plan = plan_for(images, ranks, per_rank)
    index = Index.open(folder / "train.index")

    def outlook_of(rank: int) -> Outlook:
        schedule = TrainSchedule(plan, rank, SEED)
        return Outlook(Request(cfg.data, schedule, True, SEED, "cpu", False, 1, index), 0)

    numbers = batches_to_look_at(outlook_of(0).request.schedule, ranks, 0)
    tell(outlook_of(1), numbers[:1])  # the first call of anything costs more
    started_s = time.process_time()
    told = [tell(outlook_of(rank), numbers) for rank in range(ranks)]
    tell_s = (time.process_time() - started_s) / ranks
    found = {"tell_s": tell_s, "bytes_told": len(told[0]), "bytes_received": sum(map(len, told))}
    found["judge_s"] = cpu_s(lambda: judge(plan, SEED, outlook_of(0), numbers, told), 1)
    found["images"] = int(judge(plan, SEED, outlook_of(0), numbers, told))
    tracemalloc.start()
    judge(plan, SEED, outlook_of(0), numbers, told)
    found["judge_bytes"] = tracemalloc.get_traced_memory()[1]
    return found


def cpu_s(act: Callable[[], object], times: int) -> float:
    """CPU seconds of one call, median of five turns of `times` calls."""
    turns = []
    for _ in range(5):
        started_s = time.process_time()
        for _ in range(times):
            act()
        turns.append((time.process_time() - started_s) / times)
    return statistics.median(turns)


def own_bytes(kind: str = "RssAnon") -> int:
    """Memory of this process: RssAnon is its own, RssFile mapped files, whose pages all processes share."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    return 0


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


MEASURES: dict[str, Callable[[int, Path], dict[str, float]]] = {
    "order": measure_order,
    "index": measure_index,
    "check_8": lambda images, folder: measure_check(images, folder, 8, 256),
    "check_1024": lambda images, folder: measure_check(images, folder, RANKS, PER_RANK),
}


def run_benchmark(quick: bool) -> dict[str, Any]:
    """Medians of three fresh processes for each part and size."""
    found: dict[str, Any] = {}
    for images in (IMAGENET,) if quick else (IMAGENET, LARGE):
        with tempfile.TemporaryDirectory(prefix="ii_dist-scale-") as text:
            folder = Path(text)
            write_large_index(folder, images)
            for part in MEASURES:
                print(f"... {part}, {images:,} images", file=sys.stderr, flush=True)
                turns = [_measure_apart(part, images, folder) for _ in range(1 if quick else 3)]
                found[f"{part}/{images}"] = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    return found


def _measure_apart(part: str, images: int, folder: Path) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.scale",
        "--part",
        part,
        "--images",
        str(images),
        "--folder",
        str(folder),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


Row = tuple[str, str, Callable[[float], str], str]
"""What, part/figure, how it is written, what it grows with."""


def us(value: float) -> str:
    return f"{value * 1e6:.3g} us"


def ms(value: float) -> str:
    return f"{value * 1e3:.3g} ms"


def size(value: float) -> str:
    unit, factor = next((unit for unit in (("GB", 1e9), ("MB", 1e6)) if value >= unit[1]), ("kB", 1e3))
    return f"{value / factor:.2g} {unit}" if value < 10 * factor else f"{value / factor:.0f} {unit}"


def whole(value: float) -> str:
    return f"{value:,.0f}"


ROWS: tuple[Row, ...] = (
    ("order: one batch of 32, anywhere in any epoch", "order/batch_s", us, "images of the batch"),
    ("order: a rank's share of a whole epoch", "order/epoch_share_s", ms, "images / ranks"),
    ("order: memory", "order/bytes", size, "nothing"),
    ("index: file", "index/file_bytes", size, "images (72 bytes and a path each; here no paths)"),
    ("index: open and check its values", "index/open_s", ms, "images"),
    ("index: memory of the rank itself", "index/bytes", size, "nothing"),
    ("index: pages mapped, shared by the ranks of a node", "index/mapped_bytes", size, "images"),
    ("index: open files", "index/files", whole, "nothing"),
    ("source: made, index and all", "index/source_s", ms, "images, as the index"),
    ("source: seek to the middle of epoch 45", "index/seek_s", us, "nothing"),
    ("source: memory before the first batch", "index/source_bytes", size, "nothing"),
    ("source: open files before the first batch", "index/source_files", whole, "nothing"),
    ("check, 8 ranks: images looked at", "check_8/images", whole, "65,536 + 3 batches, or the epoch"),
    ("check, 8 ranks: a rank's own part", "check_8/tell_s", ms, "images looked at / ranks"),
    ("check, 8 ranks: rank 0 judges", "check_8/judge_s", ms, "images looked at"),
    ("check, 1,024 ranks: images looked at", "check_1024/images", whole, "65,536 + 3 batches, or the epoch"),
    ("check, 1,024 ranks: a rank's own part", "check_1024/tell_s", ms, "images looked at / ranks"),
    ("check, 1,024 ranks: told by a rank", "check_1024/bytes_told", size, "images looked at / ranks"),
    ("check, 1,024 ranks: received by a rank", "check_1024/bytes_received", size, "images looked at, ranks"),
    ("check, 1,024 ranks: rank 0 judges", "check_1024/judge_s", ms, "images looked at, ranks"),
    ("check, 1,024 ranks: memory of rank 0 meanwhile", "check_1024/judge_bytes", size, "images looked at, ranks"),
)


def to_markdown(found: dict[str, Any]) -> str:
    sizes = [int(key.partition("/")[2]) for key in found if key.startswith("order/")]
    heads = [f"{images:,} images" for images in sizes]
    lines = [f"| one rank, CPU | {' | '.join(heads)} | grows with |", "| --- |" + " --- |" * (len(sizes) + 1)]
    for what, key, write, grows in ROWS:
        part, name = key.split("/")
        values = [write(found[f"{part}/{images}"][name]) for images in sizes]
        lines.append(f"| {what} | {' | '.join(values)} | {grows} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1.28 million images only, once")
    parser.add_argument("--out", type=Path, help="also write the table (.md) or the figures (JSON)")
    parser.add_argument("--part", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--images", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(MEASURES[args.part](args.images, args.folder)))
        return
    found = run_benchmark(args.quick)
    print(to_markdown(found))
    if args.out:
        text = to_markdown(found) if args.out.suffix == ".md" else json.dumps(found, indent=2)
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
