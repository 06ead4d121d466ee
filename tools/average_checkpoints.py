"""The average of several trained networks: ``python -m tools.average_checkpoints PATH PATH ... --out FILE``.

In: step folders, runs (their newest whole step) or safetensors files, all of one network. Out: one safetensors file
under timm's names, which ``timm.create_model`` loads and ``ii-dist eval FILE --config CONFIG`` evaluates. Streams: in
memory are a few MB, whatever the networks' size.

    uniform   all alike
    ema       a = decay * a + (1 - decay) * next, from the first PATH to the last
    greedy    best first, keeping what does not lower the score of the command after --

The mean of networks has not the mean of their BatchNorm statistics: ``--recalibrate CONFIG`` measures them anew on
training images.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ii_dist.checkpoint.averaging import Weights, average, check_same_network, exponential, open_weights, uniform
from ii_dist.checkpoint.casting import TARGETS
from ii_dist.checkpoint.disk import describe, sync_folder
from ii_dist.checkpoint.weights import check_target, loading_line
from ii_dist.config.errors import EXIT_BUG, EXIT_DONE, CheckpointError, ConfigError, UserError
from tools._border import run
from tools._progress import Progress
from tools._soup import Tried, check_command, greedy, score_file


@dataclass(frozen=True, slots=True)
class Recipe:
    """What becomes of an average before it is a file: its type, and the config of the images that measure it anew."""

    dtype: str | None
    config: Path | None
    images: int


def main(arguments: list[str]) -> int:
    arguments, command = _split(arguments)
    args = _parser().parse_args(arguments)
    check_target(args.out, ".safetensors", args.force)
    if args.mode == "greedy":
        check_command(command)
    elif command:
        raise ConfigError("a command after -- goes with --mode greedy only")
    if not 0 <= args.decay < 1:
        raise ConfigError(f"--decay {args.decay}: needs 0 <= decay < 1")
    inputs = [_open(path, args.ema) for path in args.paths]
    check_same_network(inputs)
    recipe = Recipe(TARGETS.get(args.dtype or ""), args.recalibrate, args.images)
    tried: list[Tried] = []
    # Beside the result, so that the last step is a rename; gone in any case.
    work = Path(tempfile.mkdtemp(prefix=f".{args.out.name}.", dir=args.out.parent))
    try:
        if args.mode == "greedy":
            shares, made, tried = _greedy(inputs, command, recipe, work)
        else:
            shares = uniform(len(inputs)) if args.mode == "uniform" else exponential(len(inputs), args.decay)
            made = _make(inputs, shares, recipe, work / "average.safetensors")
        size = made.stat().st_size
        made.rename(args.out)
        sync_folder(args.out.parent)
    except OSError as error:
        raise CheckpointError(describe(error, args.out)) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _tell(args, inputs, shares, size, tried)
    return EXIT_DONE


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What is ours, and the evaluation command after `--`."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.average_checkpoints",
        usage="%(prog)s PATH [PATH ...] --out FILE [--mode uniform|ema|greedy] [options] [-- COMMAND ... {file} ...]",
        description="Average several checkpoints of one network into one safetensors file with timm's names.",
        epilog="greedy: COMMAND is run for each candidate, with {file} replaced by its name and through no shell; the "
        "last line that it prints must be its score, a number, higher is better, as `ii-dist eval {file} --config "
        "CONFIG --score` prints it.",
    )
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="step folder, run folder or .safetensors")
    parser.add_argument("--out", type=Path, required=True, help="the file to make; ends in .safetensors")
    parser.add_argument("--mode", choices=["uniform", "ema", "greedy"], default="uniform")
    parser.add_argument("--decay", type=float, default=0.9, help="of --mode ema: the old average's share (0.9)")
    parser.add_argument("--ema", action="store_true", help="average the moving averages that the steps hold")
    parser.add_argument("--dtype", choices=list(TARGETS), help="type of all floating-point tensors (default: as given)")
    parser.add_argument(
        "--recalibrate", type=Path, metavar="CONFIG", help="measure BatchNorm statistics anew on CONFIG's images"
    )
    parser.add_argument("--images", type=int, default=10_000, help="training images for --recalibrate (10000)")
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _open(path: Path, ema: bool) -> Weights:
    weights = open_weights(path, ema)
    for step in weights.left_out:
        print(step.reason, file=sys.stderr)
    return weights


def _greedy(
    inputs: Sequence[Weights], command: Sequence[str], recipe: Recipe, work: Path
) -> tuple[list[float], Path, list[Tried]]:
    """Shares of the soup, its file, what was tried."""

    def path_of(members: tuple[int, ...]) -> Path:
        return work / f"soup_{'_'.join(map(str, members))}.safetensors"

    def score(members: tuple[int, ...]) -> float:
        chosen = [inputs[k] for k in members]
        made = _make(chosen, uniform(len(chosen)), recipe, path_of(members))
        found = score_file(command, made)
        made.unlink()  # the soup is made again at the end: one candidate on the disk at a time
        print(f"inputs {', '.join(str(k + 1) for k in members)}: {found:g}", file=sys.stderr)
        return found

    soup, tried = greedy(len(inputs), score)
    chosen = [inputs[k] for k in soup]
    shares = [1 / len(soup) if k in soup else 0.0 for k in range(len(inputs))]
    return shares, _make(chosen, uniform(len(chosen)), recipe, path_of(soup)), tried


def _make(inputs: Sequence[Weights], shares: Sequence[float], recipe: Recipe, out: Path) -> Path:
    """The average as a file, measured anew and in its type."""
    progress, total = Progress("average", "GB", 1e9), sum(weights.bytes for weights in inputs)
    if recipe.config is None:
        average(inputs, shares, out, recipe.dtype, lambda count: progress.add(count, total))
        return out
    raw, measured = (out.with_name(f"{kind}.safetensors") for kind in ("raw", "measured"))
    average(inputs, shares, raw, "F32", lambda count: progress.add(count, total))
    _recalibrate(raw, recipe.config, recipe.images, measured)
    raw.unlink()
    if recipe.dtype in (None, "F32"):
        measured.rename(out)
    else:
        average([open_weights(measured, ema=False)], [1.0], out, recipe.dtype)
        measured.unlink()
    return out


def _recalibrate(file: Path, config: Path, images: int, out: Path) -> None:
    """`ii-dist recalibrate` in a process of its own: it needs the network, the images and torch."""
    command = [sys.executable, "-m", "ii_dist", "recalibrate", str(file), "--config", str(config), "--out", str(out)]
    done = subprocess.run(
        [*command, "--images", str(images)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode == EXIT_BUG:
        print(done.stderr, file=sys.stderr)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        refused = UserError(f"--recalibrate {config}: {lines[-1].removeprefix('error: ')}")
        refused.exit_code = done.returncode
        raise refused


def _tell(
    args: argparse.Namespace, inputs: Sequence[Weights], shares: Sequence[float], size: int, tried: list[Tried]
) -> None:
    steps = [weights.step for weights in inputs if weights.step is not None]
    line = loading_line(steps[0].path, steps[0].manifest, args.out) if steps else ""
    rows = [{"path": str(weights.path), "share": share} for weights, share in zip(inputs, shares, strict=True)]
    if args.json:
        scored = [{"inputs": [k + 1 for k in t.members], "score": t.score, "kept": t.kept} for t in tried]
        told = {"out": str(args.out), "mode": args.mode, "tensors": len(inputs[0].tensors), "bytes": size}
        print(json.dumps(told | {"inputs": rows, "tried": scored, "load": line}, indent=1))
        return
    used = sum(share > 0 for share in shares)
    print(
        f"{args.out}: {len(inputs[0].tensors)} tensors, {size / 1e6:.1f} MB, {args.mode} average of {used} checkpoints"
    )
    for row in rows:
        print(f"  {row['share']:.4f}  {row['path']}")
    if line:
        print(line)


if __name__ == "__main__":
    run(main)
