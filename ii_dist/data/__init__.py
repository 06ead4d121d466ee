"""IMAGES: what the data set is, in which order, cut how, and the batches of one rank.

In: a `DataConfig`, a `Plan`, a `World`, a seed. Out: a `BatchSource`: normalized batches on the rank's device.

    index           the index file: the only thing that says what the data set is; index_write writes it
    scan            building it from a folder; facts: what a file is; journal: files that were hashed before a kill
    shards          writing tar shards; shard_reader: reading them by offset; staging: copying them to the node's disk
    retry           reading files patiently; content: what is in them
    substitute      what takes the place of a bad file; bad_files: counts and names them; quarantine: the list of them
    counter         random bits as a pure function of integers
    order           the permutation of an epoch; positions: which part of it a rank's n-th batch takes
    augment         crop windows, flips, erased rectangles; evaluation windows
    policies        colour jitter and augmentation policies: which operations, how strongly
    exact_math      functions without a last bit of doubt
    mix             which images are mixed with which, and how much; mix_images does it
    digests         what a source is about to read, and whether all ranks together read what they should
    source          Batch, Position, BatchSource and what a producer is told
    dali            decoded by DALI, on a GPU finished there too; torch_reader: decoded by PIL; synthetic: no files
    resample        resize, flip and normalize on the CPU, for both readers
    retouch         what policies and augment drew, applied to one image or a whole batch; image_ops: the operations
    ahead           threads that work ahead, in order

Images are a pure function of (seed, epoch, index row), and rows one of (seed, epoch, position): the number of ranks,
threads and prefetched batches changes nothing. Importing this package imports no torch.
"""

import importlib
import math
import os
from collections.abc import Callable
from pathlib import Path

from ii_dist.config.errors import ConfigError, DataError
from ii_dist.config.plan import Plan
from ii_dist.config.schema import DataConfig
from ii_dist.data.facts import FileFacts, examine_bytes, examine_file
from ii_dist.data.index import Index, Row, check_files
from ii_dist.data.index_write import write_columns, write_index
from ii_dist.data.journal import Journal
from ii_dist.data.positions import EvalSchedule, Position, Schedule, TrainSchedule
from ii_dist.data.scan import build_index, in_parallel
from ii_dist.data.source import Batch, BatchSource, NumberedSource, Producer, Request
from ii_dist.data.staging import start_staging
from ii_dist.runtime.world import World

__all__ = [
    "SOURCES",
    "Batch",
    "BatchSource",
    "FileFacts",
    "Index",
    "Journal",
    "Position",
    "Row",
    "build_index",
    "check_files",
    "examine_bytes",
    "examine_file",
    "in_parallel",
    "make_eval_source",
    "make_train_source",
    "write_columns",
    "write_index",
]

SOURCES: dict[str, str] = {
    "dali": "ii_dist.data.dali:DaliProducer",
    "torch": "ii_dist.data.torch_reader:TorchProducer",
    "synthetic": "ii_dist.data.synthetic:SyntheticProducer",
}
"""Name of a source -> its producer, imported only when it is asked for."""


def make_train_source(
    cfg: DataConfig, plan: Plan, world: World, seed: int, device: str, channels_last: bool
) -> BatchSource:
    """Endless micro-batches of this rank. Raises ConfigError, DataError, ClusterError before any image is read."""
    index = _open_index(cfg, "train", plan.train_images, plan.num_classes, world)
    schedule = TrainSchedule(plan, world.rank, seed)
    mix_epochs = math.ceil(plan.total_steps / plan.steps_per_epoch) - cfg.augment.mix_off_epochs
    return _make(
        Request(
            cfg,
            schedule,
            True,
            seed,
            device,
            channels_last,
            _threads(cfg, world),
            index,
            mix_epochs=mix_epochs if cfg.augment.mixes else 0,
        ),
        world,
    )


def make_eval_source(
    cfg: DataConfig, plan: Plan, world: World, seed: int, device: str, channels_last: bool, eval_batch_per_rank: int
) -> BatchSource:
    """One pass over the evaluation images for each `iter`; padding carries weight 0. `seed`: for synthetic only."""
    index = _open_index(cfg, "val", plan.eval_images, plan.num_classes, world)
    schedule: Schedule = EvalSchedule(plan, world.rank, eval_batch_per_rank)
    return _make(Request(cfg, schedule, False, seed, device, channels_last, _threads(cfg, world), index), world)


def _make(request: Request, world: World) -> BatchSource:
    if request.cfg.source not in SOURCES:
        raise ConfigError(f"data.source {request.cfg.source!r}: is not one of {', '.join(SOURCES)}")
    module, name = SOURCES[request.cfg.source].split(":")
    producer: Callable[[Request], Producer] = getattr(importlib.import_module(module), name)
    made, stage_to = producer(request), request.cfg.stage_to
    staging = start_staging(request.index, stage_to, world) if request.index and stage_to else None
    return NumberedSource(request, made, staging.close if staging else None)


def _open_index(cfg: DataConfig, split: str, images: int, num_classes: int, world: World) -> Index | None:
    """The split's index, checked against the plan and, this rank's share of it, against the disk."""
    if cfg.source == "synthetic":
        return None
    index = Index.open(Path(cfg.root) / f"{split}.index")
    if (len(index), len(index.classes)) != (images, num_classes):
        raise DataError(
            f"{index.path}: {len(index)} images of {len(index.classes)} classes, but the run was planned for {images} "
            f"of {num_classes}; the data set changed, or the two splits have different classes"
        )
    check_files(index, world.rank, world.world_size, cfg.max_bad_share)
    return index


def _threads(cfg: DataConfig, world: World) -> int:
    return cfg.threads_per_rank or max(1, len(os.sched_getaffinity(0)) // world.local_world_size)
