"""Which images ranks hand out, as hashes by global position, and whether two such logs agree.

In: a config and a number of ranks, simulated one after the other in this process, so that only one rank's buffers are
in memory. Out: a `Recording`; the first difference between two of them in words.
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ii_dist.config import DataError, Plan, RunConfig, data_facts, make_plan
from ii_dist.data import Batch, Index, Position, make_train_source
from ii_dist.runtime import World

if TYPE_CHECKING:
    import torch

Place = tuple[int, int]
"""Epoch, and number of the image in it."""
Tell = Callable[[int], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    """One image as it was handed out: the row that stands at its place; the row that was given, another one where the
    file is bad; a hash of its values, label, weight and so on."""

    row: int
    given: int
    sha256: bytes


@dataclasses.dataclass(slots=True)
class Recording:
    """What `ranks` ranks handed out; `positions[n]` is where they stood after n steps."""

    plan: Plan
    ranks: int
    positions: list[Position]
    images: dict[Place, Image]
    seek_s: float

    def digest(self) -> str:
        """Hex digest of all images in the order of their positions: the same on every machine that decodes alike."""
        whole = hashlib.sha256()
        for place in sorted(self.images):
            whole.update(self.images[place].sha256)
        return whole.hexdigest()


def record(cfg: RunConfig, ranks: int, steps: int, device: str, start: Position | None, tell: Tell) -> Recording:
    """Hash all images of `steps` global steps from `start` on (None: a fresh run that never seeks). tell: called with
    the number of images of each batch. Raises ConfigError where the batch does not divide, DataError."""
    plan = make_plan(cfg, ranks, data_facts(cfg.data))
    found = Recording(plan, ranks, [], {}, 0.0)
    for rank in range(ranks):
        # A node of one rank: it has the machine to itself while the others wait for their turn.
        world = World(rank=rank, world_size=ranks, node_rank=rank, num_nodes=ranks)
        source = make_train_source(cfg.data, plan, world, cfg.seed, device, cfg.engine.channels_last)
        try:
            if start is not None:
                started_s = time.monotonic()
                source.seek(start)
                found.seek_s = max(found.seek_s, time.monotonic() - started_s)
            positions, batches = [source.position()], iter(source)
            for _ in range(steps):
                for _ in range(plan.accumulate_steps):
                    at, outlook = source.position(), source.outlook()
                    row_N = outlook.rows([outlook.number])[0].tolist()
                    first = at.offset + rank * plan.micro_batch
                    for i, image in enumerate(hash_images(next(batches), row_N)):
                        found.images[at.epoch, first + i] = image
                    tell(plan.micro_batch)
                positions.append(source.position())
        finally:
            source.close()
        if rank and positions != found.positions:
            raise DataError(f"rank {rank} of {ranks} stands at {positions}, rank 0 at {found.positions}")
        found.positions = positions
    return found


def hash_images(batch: Batch, row_N: list[int]) -> list[Image]:
    """Each image of `batch` with all that belongs to it: every tensor that has an entry for each image. row_N: the rows
    that the batch was asked for."""
    given_N = batch.index_N.tolist()
    fields = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    columns = [_bytes_of(value) for value in fields if getattr(value, "ndim", 0) and len(value) == len(row_N)]
    images = []
    for i, (row, given) in enumerate(zip(row_N, given_N, strict=True)):
        content = hashlib.sha256()
        for column in columns:
            content.update(column(i))
        images.append(Image(row, given, content.digest()))
    return images


def _bytes_of(tensor: "torch.Tensor") -> Callable[[int], memoryview]:
    """Bytes of the i-th entry, in the order of the axes whatever the strides."""
    import torch

    host = tensor.cpu()
    return lambda i: host[i].contiguous().reshape(-1).view(torch.uint8).numpy().data


def first_difference(expected: Recording, found: Recording, index: Index | None) -> str:
    """The first place between the ends of `found` where the two differ, in words; "" if there is none. `expected` must
    reach over all of `found`."""
    for place in sorted(found.images):
        image, other = found.images[place], expected.images.get(place)
        if image == other:
            continue
        step, at = divmod(place[1], found.plan.global_batch)
        where = f"image {at} of step {place[0] * found.plan.steps_per_epoch + step + 1} (epoch {place[0]}"
        at_start = found.positions[0]
        who = f"{ranks_text(found.ranks)} resumed at image {at_start.offset:,} of epoch {at_start.epoch}"
        if other is None:
            return f"{where}): handed out by {who}, never by {ranks_text(expected.ranks)} uninterrupted"
        if other.given != image.given:
            return (
                f"{where}): is {_name(index, image.given)} for {who}, "
                f"{_name(index, other.given)} for {ranks_text(expected.ranks)} uninterrupted"
            )
        image_name, others = _name(index, image.given), f"{ranks_text(expected.ranks)} uninterrupted"
        return f"{where}, {image_name}): values differ between {who} and {others}"
    first, last = (dataclasses.astuple(found.positions[i]) for i in (0, -1))
    missing = sorted(place for place in expected.images if first <= place < last and place not in found.images)
    return (
        f"image {missing[0][1]} of epoch {missing[0][0]}: not handed out by {ranks_text(found.ranks)}"
        if missing
        else ""
    )


def first_repeat(parts: list[dict[Place, Image]], index: Index | None) -> str:
    """The first image that comes twice in an epoch of the run made of `parts`, in words; "" if there is none."""
    seen: set[Place] = set()
    for part in parts:
        for (epoch, _), image in sorted(part.items()):
            if (epoch, image.row) in seen:
                return f"{_name(index, image.row)}: handed out twice in epoch {epoch}"
            seen.add((epoch, image.row))
    return ""


def train_index(cfg: RunConfig) -> Index | None:
    """The index that names the images; None for synthetic ones."""
    return None if cfg.data.source == "synthetic" else Index.open(Path(cfg.data.root) / "train.index")


def ranks_text(ranks: int) -> str:
    return "1 rank" if ranks == 1 else f"{ranks} ranks"


def _name(index: Index | None, row: int) -> str:
    return f"image of row {row}" if index is None else f"row {row}, {index.name(row)}"
