"""Packs the images of an indexed data set into tar shards, and makes the indexes that training reads them by.

    python -m tools.pack_dataset DIR --out SHARDS                                          bytes as they are
    python -m tools.pack_dataset DIR --out SHARDS --shorter-side 384 --quality 90          made smaller

DIR holds train.index and val.index. Then train with data.root=SHARDS: the same images in the same order. Shards are in
the WebDataset layout, so other readers open them too. The same input and options give the same bytes. Started again, it
goes on where it stopped, and does nothing where all is there. Exit codes: 0 done, 2 wrong arguments, 3 wrong data.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ii_dist.config.errors import ConfigError, DataError
from ii_dist.data import Index
from tools._border import run
from tools._datasets import MARKER, SPLITS, as_data_error, write_whole
from tools._packing import (
    NOTES,
    Plan,
    Shard,
    Tally,
    default_workers,
    is_complete,
    left_overs,
    pack,
    plan_shards,
    remove_notes,
    write_packed_index,
)
from tools._shrink import Shrink

_NAMED_FILES = 10


class RateLine:
    """Progress on stderr: images done, how fast, how long still."""

    def __init__(self, split: str, done: int, total: int, tally: Tally) -> None:
        self._split, self._before, self._total, self._tally = split, done, total, tally
        self._start_s = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._pause_s = 0.5 if self._terminal else 10.0
        self._next_s = self._start_s + self._pause_s

    def __call__(self, last: bool = False) -> None:
        now_s = time.monotonic()
        if now_s < self._next_s and not last:
            return
        self._next_s = now_s + self._pause_s
        took_s, done = max(now_s - self._start_s, 1e-9), self._before + self._tally.images
        rate = self._tally.images / took_s
        left = f", {_duration((self._total - done) / rate)} left" if rate and done < self._total else ""
        print(
            f"{self._split}: {done:,} of {self._total:,} images, {rate:,.0f} images/s, "
            f"{self._tally.read_bytes / took_s / 1e6:,.1f} MB/s{left}",
            file=sys.stderr,
            end="\r" if self._terminal and not last else "\n",
            flush=True,
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.pack_dataset", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="holds train.index and val.index")
    parser.add_argument("--out", required=True, type=Path, metavar="SHARDS", help="folder to make or to go on with")
    parser.add_argument("--shard-mb", type=float, default=256.0, help="about how large a shard becomes (256)")
    parser.add_argument("--workers", type=int, default=default_workers(), help="shards made at a time (all cores)")
    parser.add_argument("--shorter-side", type=int, default=0, help="pixels; larger images are made so small")
    parser.add_argument("--quality", type=int, help="JPEG quality of images made smaller, 1 to 95 (90)")
    parser.add_argument("--split", choices=(*SPLITS, "both"), default="both", help="what to pack (both)")
    return parser


def _checked_options(asked: argparse.Namespace) -> Shrink | None:
    for name, value, good in (
        ("--shard-mb", asked.shard_mb, asked.shard_mb > 0),
        ("--workers", asked.workers, asked.workers >= 1),
        ("--shorter-side", asked.shorter_side, asked.shorter_side >= 0),
        ("--quality", asked.quality, asked.quality is None or 1 <= asked.quality <= 95),
    ):
        if not good:
            raise ConfigError(f"{name} {value}: is out of range; see python -m tools.pack_dataset --help")
    if asked.quality is not None and not asked.shorter_side:
        raise ConfigError("--quality: goes with --shorter-side; without it bytes stay as they are")
    return Shrink(asked.shorter_side, asked.quality or 90) if asked.shorter_side else None


def _claim(out: Path, sources: dict[str, str], options: dict[str, float]) -> None:
    """Make `out` the folder of these shards, or see that it is. Raises DataError, naming the difference."""
    marker = out / MARKER
    held: dict[str, dict[str, object]] = {"sources": {}}
    if marker.exists():
        try:
            held = json.loads(marker.read_text())
            known, was = dict(held["sources"]), dict(held["options"])
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{out}: already holds another data set; choose another --out") from None
        for name, value in options.items():
            if was.get(name) != value:
                raise DataError(f"{out}: was begun with --{name} {was.get(name)}, not {value}; choose another --out")
        for split, digest in sources.items():
            if known.get(split, digest) != digest:
                raise DataError(f"{out}: holds shards of another {split}.index; choose another --out")
    elif any(out.iterdir()):
        raise DataError(f"{out}: is not empty and was not made by this program; choose another --out")
    about = {"name": "shards", "sources": {**held["sources"], **sources}, "options": options}
    write_whole(marker, json.dumps(about, sort_keys=True).encode())


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold `out` against a second packing at the same time."""
    lock = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{out}: another packing is at work here; wait for it or choose another --out") from None
        yield
    finally:
        os.close(lock)


def _check_space(out: Path, todo: dict[str, list[Shard]]) -> None:
    need = sum(shard.about_bytes for shards in todo.values() for shard in shards)
    free = shutil.disk_usage(out).free
    if free < need:
        raise DataError(f"{out}: the shards need about {need / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free")


def _pack_split(plan: Plan, todo: list[Shard], workers: int) -> None:
    total, left = len(plan.index), sum(len(shard.row_N) for shard in todo)
    if left < total:
        print(f"{plan.split}: {total - left:,} of {total:,} images are packed already", file=sys.stderr)
    (plan.out / NOTES).mkdir(exist_ok=True)
    tally = Tally()
    line = RateLine(plan.split, total - left, total, tally)
    pack(plan, todo, workers, tally, line)
    line(last=True)
    digest, unreadable = write_packed_index(plan)
    remove_notes(plan)
    for name in unreadable[:_NAMED_FILES]:
        print(f"warning: cannot be decoded, packed as it is: {name}", file=sys.stderr)
    if len(unreadable) > _NAMED_FILES:
        print(f"warning: and {len(unreadable) - _NAMED_FILES:,} more", file=sys.stderr)
    packed_mb = sum((plan.out / shard.name).stat().st_size for shard in plan.shards) / 1e6
    print(
        f"{plan.out / plan.split}.index: {total:,} images, {len(plan.shards):,} shards, {packed_mb:,.1f} MB, "
        f"sha256 {digest[:12]}"
    )


def _pack_all(folder: Path, out: Path, asked: argparse.Namespace, shrink: Shrink | None) -> None:
    splits = SPLITS if asked.split == "both" else (asked.split,)
    indexes = {split: Index.open(folder / f"{split}.index") for split in splits}
    if out.resolve() == folder.resolve():
        raise DataError(f"{out}: holds the images themselves; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    options = {
        "shard-mb": asked.shard_mb,
        "shorter-side": asked.shorter_side,
        "quality": shrink.quality if shrink else 0,
    }
    with _alone(out):
        _claim(out, {split: index.digest for split, index in indexes.items()}, options)
        for path in left_overs(out):
            path.unlink()
        plans = [plan_shards(split, index, asked.shard_mb * 1e6, shrink, out) for split, index in indexes.items()]
        todo = {
            plan.split: [shard for shard in plan.shards if not plan.is_done(shard)]
            for plan in plans
            if not is_complete(plan)
        }
        _check_space(out, todo)
        for plan in plans:
            if plan.split in todo:
                _pack_split(plan, todo[plan.split], asked.workers)
            else:
                print(f"{out}: {plan.split} is complete ({len(plan.index):,} images); nothing to do")


def main(arguments: list[str]) -> int:
    asked = _parser().parse_args(arguments)
    shrink = _checked_options(asked)
    try:
        _pack_all(asked.folder, asked.out, asked, shrink)
    except OSError as error:
        raise as_data_error(error, asked.out) from None
    return 0


if __name__ == "__main__":
    run(main)
