"""One safetensors file of a sharded checkpoint's weights: ``python -m tools.merge_checkpoint PATH --out FILE``.

In: a step folder, or a run (its newest whole step). Out: the network's tensors under timm's names, which
``timm.create_model`` loads. Each shard is read once, in pieces of a few MB: hashed and, where it holds wanted tensors,
copied to its place. The file appears only when it is whole and every hash agreed. Needs no torch.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ii_dist.checkpoint import Manifest, read_manifest, step_folders
from ii_dist.checkpoint.disk import CHUNK_BYTES, create_file, describe, open_regular, sync_folder
from ii_dist.checkpoint.shards import TensorSpec, encode_header, file_order, read_header
from ii_dist.checkpoint.weights import check_target, choose_step, timm_line, weight_names
from ii_dist.config.errors import EXIT_DONE, CheckpointError
from ii_dist.config.run_folder import RunFolder
from tools._border import run


@dataclass(frozen=True, slots=True)
class Piece:
    """A wanted tensor: bytes [start, end) of a shard go to `target` of the merged file."""

    start: int
    end: int
    target: int


def main(arguments: list[str]) -> int:
    args = _parser().parse_args(arguments)
    out: Path = args.out
    check_target(out, ".safetensors", args.force)
    step = _pick_step(args.path)
    manifest = read_manifest(step)
    wanted = weight_names(manifest, args.ema)
    size = merge(step, manifest, wanted, out)
    print(f"{out}: {len(wanted)} tensors, {size / 1e6:.1f} MB, from step {manifest.step}{' (EMA)' if args.ema else ''}")
    print(_timm_line(step, manifest, out))
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.merge_checkpoint",
        description="Merge a sharded checkpoint's weights into one safetensors file with timm's names.",
    )
    parser.add_argument("path", type=Path, help="a step folder, or a run folder for its newest whole step")
    parser.add_argument("--out", type=Path, required=True, help="the file to make; ends in .safetensors")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights instead of the weights")
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
    return parser


def _pick_step(path: Path) -> Path:
    """A step folder as it is (`merge` hashes what it copies), of a run the newest whole step."""
    if step_folders(path) == [path]:
        return path
    found, left_out = choose_step(path)
    for step in left_out:
        print(step.reason, file=sys.stderr)
    return found.path


def merge(step: Path, manifest: Manifest, wanted: dict[str, str], out: Path) -> int:
    """Write the tensors of `wanted` to `out`; its size. Raises CheckpointError; then `out` is as it was."""
    specs = file_order(
        TensorSpec(new, manifest.tensors[old].dtype, manifest.tensors[old].shape) for new, old in wanted.items()
    )
    header = encode_header(specs, {"format": "pt", "step": str(manifest.step)})
    target = len(header)
    targets: dict[str, int] = {}
    for spec in specs:
        targets[wanted[spec.name]] = target
        target += spec.bytes
    draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        file = create_file(draft)
        try:
            # Room for all of it at once: a full disk shows here, not after an hour.
            os.posix_fallocate(file, 0, target)
            os.pwrite(file, header, 0)
            for shard in manifest.shards:
                pieces = _pieces(step / shard.file, manifest, targets)
                sha256 = _copy(step / shard.file, pieces, file)
                if sha256 != shard.sha256:
                    raise CheckpointError(f"{step / shard.file}: content changed; run tools.verify_checkpoint {step}")
            os.fsync(file)
        finally:
            os.close(file)
        draft.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise CheckpointError(describe(error, out)) from None
    finally:
        draft.unlink(missing_ok=True)
    return target


def _pieces(path: Path, manifest: Manifest, targets: dict[str, int]) -> list[Piece]:
    """Wanted tensors of one shard, in file order."""
    start, specs = read_header(path)
    pieces = []
    for spec in specs:
        entry = manifest.tensors.get(spec.name)
        if entry is None or (entry.shard, entry.dtype, entry.shape) != (path.name, spec.dtype, spec.shape):
            raise CheckpointError(f"{path}: {spec.name} is not as the manifest says")
        if spec.name in targets:
            pieces.append(Piece(start, start + spec.bytes, targets[spec.name]))
        start += spec.bytes
    return pieces


def _copy(path: Path, pieces: list[Piece], target: int) -> str:
    """Copy `pieces` of a shard into the file `target`; the sha256 of the whole shard."""
    digest = hashlib.sha256()
    at = 0
    left = iter(pieces)
    piece = next(left, None)
    for chunk in _chunks(path):
        digest.update(chunk)
        end = at + len(chunk)
        while piece is not None and piece.start < end:
            first, last = max(piece.start, at), min(piece.end, end)
            _write_at(target, chunk[first - at : last - at], piece.target + first - piece.start)
            if piece.end > end:
                break
            piece = next(left, None)
        at = end
    return digest.hexdigest()


def _chunks(path: Path) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    file = open_regular(path)
    try:
        while count := os.readv(file, [buffer]):
            yield buffer[:count]
    finally:
        os.close(file)


def _write_at(file: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count


def _timm_line(step: Path, manifest: Manifest, out: Path) -> str:
    """The Python that loads the merged file, from the run's config.yaml if it is there."""
    config = RunFolder(step.resolve().parent.parent).config
    model: dict[str, Any] = {}
    if config.is_file():
        tree = yaml.safe_load(config.read_text(encoding="utf-8"))
        model = tree.get("model", {}) if isinstance(tree, dict) else {}
    return timm_line(model, _num_classes(manifest), out)


def _num_classes(manifest: Manifest) -> int | None:
    head = manifest.tensors.get("model.fc.weight")
    return head.shape[0] if head is not None and head.shape else None


if __name__ == "__main__":
    run(main)
