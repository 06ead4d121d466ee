"""Packs the images of an index into shards, several at a time; goes on where an earlier packing was stopped.

In: a split's index and options. Out: whole shards `<out>/<split>-000000.tar` ... and, when all are there,
`<out>/<split>.index` with the rows of the source index in the same order. Beside each shard a note of what lies where
in it is kept in `<out>/.packing` until the index is written: with its note a shard is done, without it made again.
"""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ii_dist.config.errors import DataError
from ii_dist.data import Index, Row, write_index
from ii_dist.data.order import epoch_indices
from ii_dist.data.shards import ShardWriter, image_suffix, sample_bytes, sample_key, shard_name
from tools._datasets import write_whole
from tools._shrink import Shrink, Undecodable

NOTES = ".packing"
_ORDER_SEED = 0x5348415244  # "SHARD": the mixing of samples is the same for everyone
_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard to make: its samples as rows of the index, and about how large it will be."""

    name: str
    row_N: NDArray[np.int64]
    about_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All shards of one split."""

    split: str
    index: Index
    shards: list[Shard]
    shrink: Shrink | None
    out: Path

    def note(self, shard: Shard) -> Path:
        return self.out / NOTES / f"{shard.name}.json"

    def is_done(self, shard: Shard) -> bool:
        """Whether the shard is whole and its note is there."""
        try:
            noted = int(json.loads(self.note(shard).read_text())["bytes"])
            return (self.out / shard.name).stat().st_size == noted
        except (OSError, ValueError, KeyError, TypeError):
            return False


@dataclass(slots=True)
class Tally:
    """What the packing threads have done so far, for the one that shows it."""

    images: int = 0
    read_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, read_bytes: int) -> None:
        with self._lock:
            self.images += 1
            self.read_bytes += read_bytes


class _Stopped(Exception):
    """Another shard failed, or the user interrupted."""


def plan_shards(split: str, index: Index, shard_bytes: float, shrink: Shrink | None, out: Path) -> Plan:
    """Samples in a fixed mixed order, cut into shards of about equal size, at most about `shard_bytes`.

    Mixed, because readers that shuffle only within a window would else see a few classes at a time. Sizes are those of
    the source, scaled by the area where images are made smaller, so that no file need be opened.
    """
    row_N = epoch_indices(len(index), _ORDER_SEED, 0, np.arange(len(index), dtype=np.int64))
    image_bytes_N = index.length[row_N]
    if shrink:
        shorter_N = np.minimum(index.width, index.height)[row_N]
        share_N = np.minimum(1.0, (shrink.shorter_side / shorter_N) ** 2)
        image_bytes_N = np.ceil(image_bytes_N * share_N).astype(np.int64)
    end_N = np.cumsum(sample_bytes(image_bytes_N))
    count = max(1, -int(-int(end_N[-1]) // shard_bytes))
    # Each shard ends behind the sample that reaches its equal share of the whole.
    cut_S = np.searchsorted(end_N, int(end_N[-1]) * np.arange(1, count + 1) / count) + 1
    shards, first = [], 0
    for number, cut in enumerate(np.unique(np.minimum(cut_S, len(index))).tolist()):
        about = int(end_N[cut - 1] - (end_N[first - 1] if first else 0))
        shards.append(Shard(shard_name(split, number), row_N[first:cut], about))
        first = cut
    assert first == len(index)
    return Plan(split, index, shards, shrink, out)


def pack(plan: Plan, todo: list[Shard], workers: int, tally: Tally, show: Callable[[], None]) -> None:
    """Make the shards of `todo` in `workers` threads. Raises the first error; shards that are whole stay.

    Threads suffice: reading, hashing, decoding, resizing, encoding and writing all release the interpreter lock.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(workers, thread_name_prefix="pack") as pool:
        waiting: set[Future[None]] = {pool.submit(_pack_shard, plan, shard, tally, stop) for shard in todo}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=_POLL_S, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                show()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _pack_shard(plan: Plan, shard: Shard, tally: Tally, stop: threading.Event) -> None:
    places: list[tuple[int, int, int, int, int, str]] = []
    unreadable: list[str] = []
    with ShardWriter(plan.out / shard.name) as writer:
        for row in shard.row_N.tolist():
            if stop.is_set():
                raise _Stopped
            content = _checked(plan.index, row)
            name, width, height = plan.index.name(row), int(plan.index.width[row]), int(plan.index.height[row])
            suffix, source_bytes = image_suffix(name), len(content)
            try:
                shrunk = plan.shrink(content) if plan.shrink else None
            except Undecodable as error:  # it stays what and where it was: training has a rule for such files
                unreadable.append(f"{name} ({error})")
                shrunk = None
            if shrunk:
                content, width, height, suffix = shrunk.content, shrunk.width, shrunk.height, "jpg"
            label = int(plan.index.label[row])
            offset = writer.add(sample_key(plan.split, row), suffix, content, label)
            places.append((row, offset, len(content), width, height, hashlib.sha256(content.data).hexdigest()))
            tally.add(source_bytes)
    note = {"bytes": writer.written_bytes, "places": places, "unreadable": unreadable}
    write_whole(plan.note(shard), json.dumps(note).encode())


def _checked(index: Index, row: int) -> NDArray[np.uint8]:
    content = index.read_bytes(row)
    if hashlib.sha256(content.data).digest() != index.sha256[row].tobytes():
        raise DataError(
            f"{index.told(row)}: is not what {index.path} says (its sha256 differs); bring the file back, or make the "
            "index again with: python -m tools.index_dataset"
        )
    return content


def write_packed_index(plan: Plan) -> tuple[str, list[str]]:
    """Write the split's index from the notes; returns its digest and the files that could not be decoded."""
    source, images = plan.index, len(plan.index)
    offset_N, length_N = np.zeros(images, np.int64), np.zeros(images, np.int64)
    shard_N, width_N, height_N = (np.zeros(images, np.int32) for _ in range(3))
    sha256_N = np.zeros((images, 32), np.uint8)
    shard_bytes, unreadable = [], []
    for number, shard in enumerate(plan.shards):
        note = json.loads(plan.note(shard).read_text())
        for row, offset, length, width, height, sha256 in note["places"]:
            shard_N[row], offset_N[row], length_N[row] = number, offset, length
            width_N[row], height_N[row] = width, height
            sha256_N[row] = np.frombuffer(bytes.fromhex(sha256), np.uint8)
        shard_bytes.append(int(note["bytes"]))
        unreadable += note["unreadable"]
    rows = [
        Row(
            path=source.name(row),
            label=int(source.label[row]),
            width=int(width_N[row]),
            height=int(height_N[row]),
            length=int(length_N[row]),
            sha256=sha256_N[row].tobytes(),
            shard=int(shard_N[row]),
            offset=int(offset_N[row]),
        )
        for row in range(images)
    ]
    names = [shard.name for shard in plan.shards]
    path = plan.out / f"{plan.split}.index"
    return write_index(path, rows, source.classes, shards=names, shard_bytes=shard_bytes), unreadable


def is_complete(plan: Plan) -> bool:
    """Whether the split's index is there and all its shards have their size."""
    try:
        packed = Index.open(plan.out / f"{plan.split}.index")
        for shard in range(len(packed.header.shards)):
            packed.shards.check(shard)
    except DataError:
        return False
    return len(packed) == len(plan.index) and packed.header.shards == tuple(shard.name for shard in plan.shards)


def remove_notes(plan: Plan) -> None:
    """Once the index says where everything lies, the notes are of no more use."""
    for shard in plan.shards:
        plan.note(shard).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the other split's notes may be there
        (plan.out / NOTES).rmdir()


def left_overs(out: Path) -> Iterator[Path]:
    """Shards that a killed packing had begun."""
    return out.glob(".*.tar.partial")


def default_workers() -> int:
    return len(os.sched_getaffinity(0))
