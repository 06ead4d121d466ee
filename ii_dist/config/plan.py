"""Numbers that follow from a config, a world size and a data set. Pure.

In: `RunConfig`, ranks, images. Out: a frozen `Plan`, written to `plan.json` and printed by ``ii-dist show``.
"""

import math
from dataclasses import dataclass

from ii_dist.config.errors import ConfigError
from ii_dist.config.schema import DataConfig, RunConfig


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What a plan needs to know of the data: images of both splits and classes."""

    train_images: int
    eval_images: int
    num_classes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Derived numbers of one attempt. Only world_size, images_per_rank, micro_batch, accumulate_steps and eval_steps
    depend on the number of ranks, max_images_per_rank and fits on the machine; everything else is the recipe and
    stays."""

    world_size: int
    global_batch: int
    images_per_rank: int
    micro_batch: int
    accumulate_steps: int
    train_images: int
    eval_images: int
    num_classes: int
    steps_per_epoch: int
    dropped_images_per_epoch: int
    total_steps: int
    warmup_steps: int
    peak_lr: float
    final_lr: float
    ema_decay: float
    """Share of the average that stays after one step; 0 = no average."""
    eval_steps: int
    """Evaluation batches of each rank."""
    eval_every_steps: int
    save_every_steps: tuple[int, ...]
    """A step is saved when one of these divides it."""
    log_every_steps: int
    image_sizes: tuple[tuple[int, int], ...] = ()
    """(epoch, side in pixels) of the first training images and of each change."""
    canonical_shards: int = 0
    """Virtual shards of a global batch: micro-batch k of rank r is shard k * world_size + r. 0 = ranks are shards."""
    max_images_per_rank: int = 0
    """Largest micro-batch; 0 = no limit. Where the config says auto it was found by trying, for `fits` alone."""
    fits: str = ""
    """The memory and the settings that `max_images_per_rank` was found for."""


def make_plan(cfg: RunConfig, world_size: int, facts: DataFacts, found_limit: int = 0, fits: str = "") -> Plan:
    """Derive the plan. Raises ConfigError, naming the key, where a number does not come out whole.

    found_limit, fits: what `train.max_images_per_rank` auto came to; without them auto is no limit.
    """
    batch, limit = cfg.train.global_batch, cfg.train.max_images_per_rank
    limit = found_limit if limit == "auto" else limit
    images_per_rank, accumulate = _split_batch(cfg, world_size, limit)
    if facts.train_images < batch:
        raise ConfigError(
            f"train.global_batch {batch}: the data set has {facts.train_images} training images; use that or less"
        )
    steps_per_epoch = facts.train_images // batch
    total_steps = max(1, round(cfg.train.epochs * steps_per_epoch))
    peak_lr = cfg.optim.lr
    if cfg.optim.lr_reference_batch:
        peak_lr *= batch / cfg.optim.lr_reference_batch
    half_life_steps = cfg.engine.ema_half_life_epochs * steps_per_epoch
    saves = [cfg.checkpoint.every_steps, round(cfg.checkpoint.every_epochs * steps_per_epoch)]
    return Plan(
        world_size=world_size,
        global_batch=batch,
        images_per_rank=images_per_rank,
        micro_batch=images_per_rank // accumulate,
        accumulate_steps=accumulate,
        train_images=facts.train_images,
        eval_images=facts.eval_images,
        num_classes=facts.num_classes,
        steps_per_epoch=steps_per_epoch,
        dropped_images_per_epoch=facts.train_images - steps_per_epoch * batch,
        total_steps=total_steps,
        warmup_steps=min(total_steps, round(cfg.optim.warmup_epochs * steps_per_epoch)),
        peak_lr=peak_lr,
        final_lr=peak_lr * cfg.optim.final_lr_share,
        ema_decay=0.5 ** (1 / half_life_steps) if half_life_steps else 0.0,
        eval_steps=math.ceil(facts.eval_images / (world_size * cfg.train.eval_batch_per_rank)),
        eval_every_steps=max(1, round(cfg.train.eval_every_epochs * steps_per_epoch)),
        save_every_steps=tuple(sorted({n for n in saves if n > 0})),
        log_every_steps=cfg.metrics.log_every_steps,
        image_sizes=_image_sizes(cfg.data, math.ceil(total_steps / steps_per_epoch)),
        canonical_shards=cfg.runtime.canonical_shards,
        max_images_per_rank=limit,
        fits=fits,
    )


def _image_sizes(cfg: DataConfig, epochs: int) -> tuple[tuple[int, int], ...]:
    sides = [cfg.side_of_epoch(epoch) for epoch in range(epochs)]
    return tuple((epoch, side) for epoch, side in enumerate(sides) if epoch == 0 or side != sides[epoch - 1])


def _split_batch(cfg: RunConfig, world_size: int, max_images: int) -> tuple[int, int]:
    """Images a rank and the fewest equal micro-batches that respect the limit, of whole pairs where images are mixed:
    an image and its partner, neighbours in the epoch's order, must be in the same micro-batch on any number of ranks.
    """
    global_batch = cfg.train.global_batch
    if cfg.runtime.canonical_shards:
        return _split_canonical(cfg, world_size, max_images)
    if global_batch % world_size:
        near = ", ".join(str(n) for n in range(1, global_batch + 1) if global_batch % n == 0 and n <= 2 * world_size)
        raise ConfigError(
            f"train.global_batch {global_batch}: does not divide over {world_size} ranks; "
            f"use a multiple of {world_size}, or one of {near} ranks"
        )
    images_per_rank = global_batch // world_size
    limit, unit = max_images or images_per_rank, 2 if cfg.data.augment.mixes else 1
    if images_per_rank % unit:
        near = ", ".join(str(n) for n in range(1, 2 * world_size + 1) if global_batch % (2 * n) == 0)
        raise ConfigError(
            f"train.global_batch {global_batch}: {images_per_rank} images a rank are no whole pairs, which Mixup and "
            f"CutMix need; use a multiple of {2 * world_size}{f', or one of {near} ranks' if near else ''}"
        )
    if limit < unit:
        raise ConfigError(f"train.max_images_per_rank {limit}: Mixup and CutMix need pairs of images; use 2 or more")
    pairs = images_per_rank // unit
    return images_per_rank, next(n for n in range(1, pairs + 1) if pairs % n == 0 and images_per_rank // n <= limit)


def _split_canonical(cfg: RunConfig, world_size: int, max_images: int) -> tuple[int, int]:
    """Images a rank and its virtual shards, each of which is a micro-batch."""
    batch, shards = cfg.train.global_batch, cfg.runtime.canonical_shards
    unit = 2 if cfg.data.augment.mixes else 1  # an image and its partner stay together
    said = f"runtime.canonical_shards {shards}:"
    if batch % (shards * unit):
        near = [n for n in range(1, batch // unit + 1) if batch % (n * unit) == 0 and n <= 2 * shards]
        whole = "whole pairs of images" if unit == 2 else "equal shards"
        raise ConfigError(f"{said} train.global_batch {batch} gives no {whole}; use one of {_listed(near)} shards")
    if shards % world_size:
        near = [n for n in range(1, shards + 1) if shards % n == 0]
        more = [n for n in range(world_size, batch // unit + 1, world_size) if batch % (n * unit) == 0]
        other = f", or one of {_listed(more)} shards" if more else ""
        raise ConfigError(f"{said} does not divide over {world_size} ranks; use one of {_listed(near)} ranks{other}")
    if 0 < max_images < batch // shards:
        raise ConfigError(
            f"{said} a shard is {batch // shards} images, more than train.max_images_per_rank {max_images}; use more "
            "shards (which changes the training) or a larger limit"
        )
    return batch // world_size, shards // world_size


def _listed(numbers: list[int]) -> str:
    """The last few."""
    return ", ".join(str(number) for number in numbers[-8:])
