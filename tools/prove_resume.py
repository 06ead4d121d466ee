"""Shows that a resumed run sees the very images that it would have seen: ``python -m tools.prove_resume CONFIG``.

Ranks are simulated one after the other, with the data as configured, and every image that they hand out is hashed. Some
ranks go to step k and, undisturbed, k steps on. Another number of ranks then seeks the position where the first stood
after step k, and goes on from there; the same in the middle of an epoch of which nothing was read before.

Out: one line of proof. Exit codes: 0 proved; 2 wrong config or arguments; 3 data, or the first image that differs.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from ii_dist.config import DataError, RunConfig, data_facts, load_config, make_plan
from ii_dist.config.errors import EXIT_DATA, EXIT_DONE
from ii_dist.data import Index, Position
from tools._border import run
from tools._image_log import Recording, first_difference, first_repeat, ranks_text, record, train_index
from tools._progress import Progress

DEFAULT_IMAGES = 2048
MIDDLE_STEPS = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Proof:
    """What was shown, for --json."""

    steps: int
    global_batch: int
    images: int
    bad_files: int
    """Images in whose place another one was given."""
    from_ranks: int
    to_ranks: int
    resumed_after_step: int
    resumed_at: Position
    middle_at: Position
    seek_s: float
    """The slowest seek of any rank."""
    sha256: str
    """Over all images of the uninterrupted run."""

    def line(self) -> str:
        bad = f" ({self.bad_files:,} in the place of bad files)" if self.bad_files else ""
        return (
            f"{self.steps} steps of {self.global_batch}: {self.images:,} images{bad}, hashes agree between "
            f"{ranks_text(self.from_ranks)} uninterrupted and {ranks_text(self.to_ranks)} resumed at step "
            f"{self.resumed_after_step}, and from the middle of epoch {self.middle_at.epoch} (image "
            f"{self.middle_at.offset:,}); each sample at most once an epoch; images {self.sha256[:12]}"
        )


def main(arguments: list[str]) -> int:
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if unknown := [text for text in rest if text.startswith("-")]:
        parser.error(f"unknown option {unknown[0]}")
    cfg = load_config(args.config, args.overrides + rest)  # overrides may stand between and after options
    steps = args.steps or max(2, DEFAULT_IMAGES // cfg.train.global_batch)
    try:
        proof = prove(cfg, steps, args.from_ranks, args.to_ranks)
    except DataError as error:
        if not args.json:
            raise
        print(json.dumps({"ok": False, "error": str(error)}, indent=1))
        return EXIT_DATA
    print(json.dumps({"ok": True, **dataclasses.asdict(proof)}, indent=1) if args.json else proof.line())
    return EXIT_DONE


def prove(cfg: RunConfig, steps: int, from_ranks: int, to_ranks: int) -> Proof:
    """Run, seek, compare. Raises DataError that names the first image that differs or comes twice."""
    facts = data_facts(cfg.data)
    plan, _ = (make_plan(cfg, ranks, facts) for ranks in (from_ranks, to_ranks))  # refused before anything is read
    device, index = _device(cfg), train_index(cfg)
    half_epoch = plan.steps_per_epoch // 2
    middle, middle_steps = (
        Position(1, half_epoch * plan.global_batch),
        min(MIDDLE_STEPS, plan.steps_per_epoch - half_epoch),
    )
    reached = 2 * steps >= plan.steps_per_epoch + half_epoch + middle_steps
    count = _Count((3 * steps + (1 if reached else 2) * middle_steps) * plan.global_batch)

    whole = record(cfg, from_ranks, 2 * steps, device, None, count.add)
    resumed = record(cfg, to_ranks, steps, device, whole.positions[steps], count.add)
    _compare(whole, resumed, index)
    first_half = {place: image for place, image in whole.images.items() if place not in resumed.images}
    for parts in ([whole.images], [first_half, resumed.images]):
        if repeat := first_repeat(parts, index):
            raise DataError(repeat)
    # Where the run did not come so far: one that sought there, too. To read a large epoch up to there takes hours.
    expected = whole if reached else record(cfg, from_ranks, middle_steps, device, middle, count.add)
    from_middle = record(cfg, to_ranks, middle_steps, device, middle, count.add)
    _compare(expected, from_middle, index)
    return Proof(
        steps=2 * steps,
        global_batch=plan.global_batch,
        images=len(whole.images),
        bad_files=sum(image.given != image.row for image in whole.images.values()),
        from_ranks=from_ranks,
        to_ranks=to_ranks,
        resumed_after_step=steps,
        resumed_at=whole.positions[steps],
        middle_at=middle,
        seek_s=max(resumed.seek_s, from_middle.seek_s),
        sha256=whole.digest(),
    )


def _compare(expected: Recording, found: Recording, index: Index | None) -> None:
    if difference := first_difference(expected, found, index):
        raise DataError(difference)


def _device(cfg: RunConfig) -> str:
    """Where a run of this config would make its images on this machine."""
    import torch

    return "cuda:0" if cfg.engine.device != "cpu" and torch.cuda.is_available() else "cpu"


class _Count:
    """Images hashed so far, told on stderr."""

    def __init__(self, total: int) -> None:
        self._done, self._total = 0, total
        self._tell = Progress("images hashed")

    def add(self, images: int) -> None:
        self._done += images
        self._tell(self._done, self._total)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.prove_resume",
        description="Show that a run resumed on another number of ranks sees the very images it would have seen.",
        epilog="exit codes: 0 proved, 2 wrong config or arguments, 3 data, or the first image that differs",
    )
    parser.add_argument("config", type=Path, help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="other values, such as data.source=torch")
    parser.add_argument(
        "--steps",
        type=_count,
        default=0,
        metavar="K",
        help="stop after K steps, then go on for K more (default: as many as hold 2,048 images)",
    )
    parser.add_argument("--from-ranks", type=_count, default=2, metavar="A", help="ranks before the stop (default 2)")
    parser.add_argument("--to-ranks", type=_count, default=4, metavar="B", help="ranks after it (default 4)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: needs 1 or more")
    return number


if __name__ == "__main__":
    run(main)
