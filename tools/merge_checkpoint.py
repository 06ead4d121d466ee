"""One safetensors file of a sharded checkpoint's weights: ``python -m tools.merge_checkpoint PATH --out FILE``.

In: a step folder, or a run (its newest whole step). Out: the network's tensors under timm's names, which
``timm.create_model`` loads. Each shard is read once, in small pieces: hashed and, where it holds wanted tensors, copied
to its place. The file appears only when it is whole and every hash agreed. Needs no torch.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from ii_dist.checkpoint import Manifest, read_manifest, step_folders
from ii_dist.checkpoint.disk import open_regular
from ii_dist.checkpoint.finder import check_files, expected_files
from ii_dist.checkpoint.shards import TensorSpec
from ii_dist.checkpoint.streams import PIECE_BYTES, TensorDraft, draft_tensors, pieces, placed_tensors, read_into
from ii_dist.checkpoint.weights import check_target, loading_line, weight_names
from ii_dist.config.errors import EXIT_DONE, CheckpointError
from ii_dist.config.run_folder import STATE
from tools._border import run
from tools._progress import Progress

_MOST_THREADS = 4
_DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
OnBytes = Callable[[int], None]


class DamagedError(CheckpointError):
    """A step that is not as its manifest says; an older one may be."""


def main(arguments: list[str]) -> int:
    args = _parser().parse_args(arguments)
    out: Path = args.out
    check_target(out, ".safetensors", args.force)
    folders = step_folders(args.path)
    for step in reversed(folders):
        try:
            manifest, size = merge(step, out, args.ema, _DTYPES.get(args.dtype or ""))
            break
        except DamagedError as error:
            if len(folders) == 1:
                raise
            print(f"{error}; left out", file=sys.stderr)
    else:
        raise CheckpointError(f"{args.path}: none of its {len(folders)} steps is whole")
    line = loading_line(step, manifest, out)
    count = len(weight_names(manifest, args.ema))
    if args.json:
        told = {"out": str(out), "step": manifest.step, "ema": args.ema, "dtype": args.dtype}
        print(json.dumps(told | {"tensors": count, "bytes": size, "load": line}, indent=1))
    else:
        weights = f"{' (EMA)' if args.ema else ''}{f' as {args.dtype}' if args.dtype else ''}"
        print(f"{out}: {count} tensors, {size / 1e6:.1f} MB, from step {manifest.step}{weights}")
        print(line)
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.merge_checkpoint",
        description="Merge a sharded checkpoint's weights into one safetensors file with timm's names.",
    )
    parser.add_argument("path", type=Path, help="a step folder, or a run folder for its newest whole step")
    parser.add_argument("--out", type=Path, required=True, help="the file to make; ends in .safetensors")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights instead of the weights")
    parser.add_argument("--dtype", choices=list(_DTYPES), help="type of all floating-point tensors (default: as saved)")
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def merge(step: Path, out: Path, ema: bool, dtype: str | None) -> tuple[Manifest, int]:
    """Write the weights of one step to `out`, as type `dtype` (a safetensors code, None: as saved); the file's size.

    Raises DamagedError for a step that is not whole, CheckpointError; then `out` is as it was.
    """
    try:
        manifest = read_manifest(step)
    except CheckpointError as error:
        raise DamagedError(f"{step}: {error}") from None
    if problems := check_files(step, {STATE: expected_files(manifest)[STATE]}):
        raise DamagedError(f"{step}: {problems[0]}")
    names = weight_names(manifest, ema)
    specs = {
        old: TensorSpec(new, _code(manifest, old, dtype), manifest.tensors[old].shape) for new, old in names.items()
    }
    shards = sorted(manifest.shards, key=lambda shard: -shard.bytes)
    progress, total = Progress(f"merge {step.name}", "GB", 1e9), sum(shard.bytes for shard in shards)
    workers = min(_MOST_THREADS, os.cpu_count() or 1, len(shards))
    with (
        draft_tensors(out, specs.values(), {"step": str(manifest.step)}) as draft,
        ThreadPoolExecutor(workers, "merge") as pool,
    ):
        work = [
            pool.submit(
                _copy, step / shard.file, shard.sha256, manifest, specs, draft, lambda n: progress.add(n, total)
            )
            for shard in shards
        ]
        try:
            for one in work:
                one.result()
        finally:
            pool.shutdown(cancel_futures=True)
    return manifest, draft.bytes


def _code(manifest: Manifest, name: str, dtype: str | None) -> str:
    own = manifest.tensors[name].dtype
    if dtype is None:
        return own
    from ii_dist.checkpoint.casting import cast_code  # numpy only where numbers are converted

    return cast_code(own, dtype)


def _copy(
    path: Path, sha256: str, manifest: Manifest, specs: dict[str, TensorSpec], draft: TensorDraft, on_bytes: OnBytes
) -> None:
    """Put the wanted tensors of one shard into the draft; hash all of it on the way. Raises DamagedError, OSError."""
    try:
        placed = placed_tensors(path)
        for tensor in placed:
            entry = manifest.tensors.get(tensor.spec.name)
            if entry is None or (entry.shard, entry.dtype, entry.shape) != (
                path.name,
                tensor.spec.dtype,
                tensor.spec.shape,
            ):
                raise CheckpointError(f"{path.name}: {tensor.spec.name} is not as the manifest says")
        file = open_regular(path)
    except CheckpointError as error:
        raise DamagedError(f"{path.parent}: {error}") from None
    refused: CheckpointError | None = None
    try:
        with closing(_Sha256Behind(file, path)) as shard:
            shard.read(0, placed[0].start if placed else os.fstat(file).st_size)
            for tensor in placed:
                wanted = specs.get(tensor.spec.name)
                for at, count in pieces(tensor.spec.bytes):
                    data = shard.read(tensor.start + at, count)
                    if wanted is not None and refused is None:
                        try:
                            _write(draft, wanted, tensor.spec, at, data)
                        except CheckpointError as error:
                            refused = error  # unless it is the damage that makes a number too large
                    on_bytes(count)
            if shard.hexdigest() != sha256:
                raise DamagedError(f"{path}: content changed; run tools.verify_checkpoint {path.parent}")
    finally:
        os.close(file)
    if refused is not None:
        raise refused


def _write(draft: TensorDraft, wanted: TensorSpec, source: TensorSpec, at: int, data: memoryview) -> None:
    if wanted.dtype == source.dtype:
        draft.write(wanted.name, at, data)
        return
    from ii_dist.checkpoint.casting import cast

    target_bytes, source_bytes = wanted.element_bytes, source.element_bytes
    draft.write(wanted.name, at // source_bytes * target_bytes, cast(data, source.dtype, wanted.dtype, wanted.name))


class _Sha256Behind:
    """Reads a file from its first byte to its last; a thread hashes each piece while it is made use of."""

    def __init__(self, file: int, path: Path) -> None:
        self._file, self._path = file, path
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1, "hash")
        self._hashing = [self._hasher.submit(self._digest.update, b"") for _ in range(2)]
        self._buffers = [memoryview(bytearray(PIECE_BYTES)) for _ in self._hashing]
        self._turn = 0

    def read(self, offset: int, count: int) -> memoryview:
        """The next `count` bytes, good until the call after the next; of more than a piece only the last ones."""
        view = memoryview(b"")
        for at, size in pieces(count):
            self._turn = 1 - self._turn
            self._hashing[self._turn].result()
            view = self._buffers[self._turn][:size]
            read_into(self._file, view, offset + at, self._path)
            self._hashing[self._turn] = self._hasher.submit(self._digest.update, view)
        return view

    def hexdigest(self) -> str:
        for hashing in self._hashing:
            hashing.result()
        return self._digest.hexdigest()

    def close(self) -> None:
        self._hasher.shutdown()


if __name__ == "__main__":
    run(main)
