"""One safetensors file of what DeepSpeed or torch saved: ``python -m tools.import_checkpoint FOLDER --out FILE``.

In: a folder of DeepSpeed (ZeRO stages 0 to 3) or of torch.distributed.checkpoint. Out: a safetensors file with the
network's own parameter names; from DeepSpeed the float32 weights, put together from all ranks' partitions. Neither
program's own loader is used, and nothing in the folder is ever run.
"""

import argparse
import json
import re
from pathlib import Path

from ii_dist.checkpoint.casting import TARGETS, cast, cast_code
from ii_dist.checkpoint.disk import read_small
from ii_dist.checkpoint.foreign_tensor import ForeignTensor
from ii_dist.checkpoint.shards import TensorSpec
from ii_dist.checkpoint.streams import draft_tensors, pieces, tensor_bytes
from ii_dist.checkpoint.weights import check_target
from ii_dist.config.errors import EXIT_DONE, CheckpointError
from tools._border import run
from tools._progress import Progress

_HASH_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def main(arguments: list[str]) -> int:
    args = _parser().parse_args(arguments)
    check_target(args.out, ".safetensors", args.force)
    hashes = _read_hashes(args.hashes) if args.hashes else {}
    kind, found = _open(args.folder, args.trust, hashes)
    chosen = _choose(found, args.prefix, args.folder)
    size = _write(chosen, args.out, TARGETS.get(args.dtype or ""), kind)
    if args.json:
        told = {"out": str(args.out), "kind": kind, "tensors": len(chosen), "bytes": size, "names": sorted(chosen)}
        print(json.dumps(told, indent=1))
    else:
        print(f"{args.out}: {len(chosen)} of {len(found)} tensors, {size / 1e6:.1f} MB, from a {kind} checkpoint")
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.import_checkpoint",
        description="Turn a checkpoint folder of DeepSpeed or torch.distributed.checkpoint into one safetensors file.",
    )
    parser.add_argument("folder", type=Path, help="the folder with `latest`, one of its tags, or one with `.metadata`")
    parser.add_argument("--out", type=Path, required=True, help="the file to make; ends in .safetensors")
    parser.add_argument(
        "--prefix", help="take names that begin so, and cut it off (default: model. where there is any)"
    )
    parser.add_argument("--trust", action="store_true", help="open DeepSpeed's optimizer files: you know who made them")
    parser.add_argument("--hashes", type=Path, metavar="FILE", help="open them after their sha256 (lines of sha256sum)")
    parser.add_argument("--dtype", choices=list(TARGETS), help="type of all floating-point tensors (default: as found)")
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _read_hashes(path: Path) -> dict[str, str]:
    """File name -> sha256, from the output of sha256sum."""
    lines = read_small(path, 64 << 20).decode(errors="replace").splitlines()
    matches = [_HASH_LINE.fullmatch(line.strip()) for line in lines if line.strip()]
    if not matches or not all(matches):
        raise CheckpointError(f"{path}: not a list as sha256sum writes it")
    return {Path(match[2]).name: match[1] for match in matches if match}


def _open(folder: Path, trust: bool, hashes: dict[str, str]) -> tuple[str, dict[str, ForeignTensor]]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    from ii_dist.checkpoint.dcp_folder import METADATA, dcp_tensors  # torch only when there is something to read
    from ii_dist.checkpoint.deepspeed_folder import Consent, deepspeed_tensors, is_deepspeed

    if (folder / METADATA).is_file():
        return "torch.distributed.checkpoint", dcp_tensors(folder)
    if is_deepspeed(folder):
        return "DeepSpeed", deepspeed_tensors(folder, Consent(trust, hashes))
    raise CheckpointError(f"{folder}: neither a DeepSpeed folder (latest, *_model_states.pt) nor one with {METADATA}")


def _choose(found: dict[str, ForeignTensor], prefix: str | None, folder: Path) -> dict[str, ForeignTensor]:
    """Tensors by the name that they get."""
    if prefix is None:
        prefix = "model." if any(name.startswith("model.") for name in found) else ""
    chosen = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    if not chosen:
        some = ", ".join(sorted(found)[:3])
        raise CheckpointError(
            f"{folder}: no tensor's name begins with {prefix!r}; there are {len(found)}, such as {some}"
        )
    return chosen


def _write(chosen: dict[str, ForeignTensor], out: Path, dtype: str | None, kind: str) -> int:
    """One tensor in memory at a time."""
    specs = [TensorSpec(n, cast_code(t.spec.dtype, dtype), t.spec.shape) for n, t in chosen.items()]
    progress, total = Progress("import", "GB", 1e9), sum(spec.bytes for spec in specs)
    with draft_tensors(out, specs, {"imported_from": kind}) as draft:
        for spec in specs:
            source = chosen[spec.name]
            data = tensor_bytes(source.load())
            for at, count in pieces(len(data)):
                part = cast(data[at : at + count], source.spec.dtype, spec.dtype, spec.name)
                draft.write(spec.name, at // source.spec.element_bytes * spec.element_bytes, part)
                progress.add(len(part), total)
    return draft.bytes


if __name__ == "__main__":
    run(main)
