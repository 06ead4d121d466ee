"""Merging and verifying sharded checkpoints (C11): memory, and time against raw reading and writing.

    python -m benchmarks.merge [--quick] [--out FILE]

Method: a checkpoint of weights and momenta in 8 and in 64 shards. Each turn runs, in processes of their own and in
turn: the merge; the floor, a loop that reads all shards and writes and flushes as many bytes as the merged file has;
and the floor once more, whose ratio is the noise. Times are of the work alone, without imports; medians of each turn's
ratios. Memory: the kernel's peak of the process above what its imports took.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SHARDS = (8, 64)
TENSORS = 128
CHUNK_BYTES = 1 << 22


def write_step(run: Path, shards: int, weight_bytes: int) -> Path:
    """A committed step of `TENSORS` weights with their momenta, spread over `shards` files."""
    from ii_dist.checkpoint import Manifest, assign_shards
    from ii_dist.checkpoint.disk import hash_file
    from ii_dist.checkpoint.manifest import PositionEntry, ShardEntry, StateEntry, TensorEntry
    from ii_dist.checkpoint.shards import TensorSpec
    from ii_dist.checkpoint.streams import draft_tensors
    from ii_dist.config.run_folder import COMMITTED, STATE, RunFolder, shard_name

    step = RunFolder(run).step(shards)
    step.mkdir(parents=True)
    draw = np.random.default_rng(0)
    elements = weight_bytes // 4 // TENSORS
    names = [f"{kind}.{k}{end}" for k in range(TENSORS) for kind, end in (("model", ""), ("optimizer", ".momentum"))]
    entries: dict[str, TensorEntry] = {}
    files = []
    for rank, share in enumerate(assign_shards([(name, 4 * elements) for name in names], shards)):
        file = shard_name(rank, shards)
        with draft_tensors(step / file, [TensorSpec(name, "F32", (elements,)) for name in share], {}) as draft:
            for name in share:
                draft.write(name, 0, draw.standard_normal(elements, np.float32).tobytes())
        size, sha256 = hash_file(step / file)
        files.append(ShardEntry(file=file, bytes=size, sha256=sha256))
        entries |= {name: TensorEntry(shard=file, dtype="F32", shape=(elements,)) for name in share}
    (step / STATE).write_bytes(b"{}")
    manifest = Manifest(
        step=shards,
        position=PositionEntry(epoch=0, offset=0),
        world_size=shards,
        engine="ddp",
        global_batch=1,
        fence=1,
        config_sha256="",
        index_sha256="",
        versions={},
        tensors=entries,
        shards=tuple(files),
        state=StateEntry(bytes=2, sha256=hashlib.sha256(b"{}").hexdigest()),
    )
    (step / COMMITTED).write_bytes(manifest.encode())
    return step


def raw(step: Path, out: Path, size: int) -> None:
    """The floor: read every shard, write `size` bytes, flush; one thread, large pieces."""
    buffer = bytearray(CHUNK_BYTES)
    left = size
    target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for shard in sorted(step.glob("*.safetensors")):
        file = os.open(shard, os.O_RDONLY)
        while count := os.readv(file, [buffer]):
            left -= os.write(target, memoryview(buffer)[: min(count, left)])
        os.close(file)
    assert left == 0
    os.fsync(target)
    os.close(target)


def peak_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure_here(work: str, step: Path, out: Path, size: int) -> dict[str, float]:
    """What one piece of work takes in this process."""
    from tools import merge_checkpoint, verify_checkpoint

    acts: dict[str, Callable[[], object]] = {
        "merge": lambda: merge_checkpoint.main([str(step), "--out", str(out), "--force"]),
        "bf16": lambda: merge_checkpoint.main([str(step), "--out", str(out), "--force", "--dtype", "bf16"]),
        "verify": lambda: verify_checkpoint.main([str(step)]),
        "raw": lambda: raw(step, out, size),
    }
    if work == "bf16":
        import ii_dist.checkpoint.casting  # noqa: F401  # imports do not count
    before, wall_s, cpu_s = peak_bytes(), time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        acts[work]()
    return {
        "wall_s": time.perf_counter() - wall_s,
        "cpu_s": time.process_time() - cpu_s,
        "extra_bytes": peak_bytes() - before,
    }


def measure(work: str, step: Path, size: int) -> dict[str, float]:
    """The same in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.merge", "--inside", work, str(step), str(size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def compare(step: Path, turns: int) -> dict[str, float]:
    """Medians for one checkpoint."""
    stored = sum(file.stat().st_size for file in step.glob("*.safetensors"))
    size = measure_size(step)
    rounds = [
        {name: measure(name.removesuffix("2"), step, size) for name in ("merge", "raw", "raw2", "bf16", "verify")}
        for _ in range(turns)
    ]

    def ratio(a: str, b: str, key: str) -> float:
        return statistics.median(r[a][key] / r[b][key] for r in rounds)

    return {
        "output_bytes": size,
        "stored_bytes": stored,
        "extra_share": statistics.median(r["merge"]["extra_bytes"] / size for r in rounds),
        "extra_share_bf16": statistics.median(r["bf16"]["extra_bytes"] / (size / 2) for r in rounds),
        "extra_mb": statistics.median(r["merge"]["extra_bytes"] / 1e6 for r in rounds),
        "wall_ratio": ratio("merge", "raw", "wall_s"),
        "wall_noise": ratio("raw2", "raw", "wall_s"),
        "cpu_ratio": ratio("merge", "raw", "cpu_s"),
        "wall_ratio_bf16": ratio("bf16", "raw", "wall_s"),
        "verify_gb_per_cpu_s": statistics.median(stored / 1e9 / r["verify"]["cpu_s"] for r in rounds),
        "verify_gb_per_s": statistics.median(stored / 1e9 / r["verify"]["wall_s"] for r in rounds),
    }


def measure_size(step: Path) -> int:
    """Bytes of the merged file."""
    measure("merge", step, 0)
    return step.with_name("out.safetensors").stat().st_size


def to_markdown(found: dict[str, Any]) -> str:
    few, many = (found[str(shards)] for shards in SHARDS)
    size = f"{few['output_bytes'] / 1e6:.0f} MB of {few['stored_bytes'] / 1e6:.0f}"
    return "\n".join(
        [
            f"| merge and verify, {size} MB | {SHARDS[0]} shards | {SHARDS[1]} shards | goal |",
            "| --- | --- | --- | --- |",
            f"| peak memory / output | {few['extra_share']:.2f} | {many['extra_share']:.2f} | <= 0.5, flat |",
            f"| the same, to bf16 | {few['extra_share_bf16']:.2f} | {many['extra_share_bf16']:.2f} | <= 0.5, flat |",
            f"| merge / raw read + write + flush, wall | {few['wall_ratio']:.2f} | {many['wall_ratio']:.2f} | <= 1.3 |",
            f"| raw / raw, wall (noise) | {few['wall_noise']:.2f} | {many['wall_noise']:.2f} | 1 |",
            f"| merge / raw, CPU time (hashing included) | {few['cpu_ratio']:.2f} | {many['cpu_ratio']:.2f} | |",
            f"| verify, GB/s a core (CPU time) | {few['verify_gb_per_cpu_s']:.2f} | {many['verify_gb_per_cpu_s']:.2f} "
            "| >= 1 |",
            f"| verify, GB/s (wall) | {few['verify_gb_per_s']:.2f} | {many['verify_gb_per_s']:.2f} | |",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller and fewer turns")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--inside", nargs=3, metavar=("WORK", "STEP", "BYTES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        work, step, size = args.inside[0], Path(args.inside[1]), int(args.inside[2])
        print(json.dumps(measure_here(work, step, step.with_name("out.safetensors"), size)))
        return
    weight_bytes = (64 if args.quick else 256) << 20
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for shards in SHARDS:
            step = write_step(Path(folder) / str(shards), shards, weight_bytes)
            found[str(shards)] = compare(step, 3 if args.quick else 7)
    print(to_markdown(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
