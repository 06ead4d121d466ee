"""How fast the loader and the network go on this machine, a few seconds each.

In: a config whose data set is a small sample, a `Setting`. Out: images a second of one rank.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ii_dist.config import AugmentConfig, DataConfig, DataFacts, Plan, RunConfig, RuntimeConfig, make_plan
from ii_dist.data import make_train_source
from ii_dist.runtime import World

_CPU_STEP_IMAGES = 4


@dataclass(frozen=True, slots=True)
class Setting:
    """What the doctor varies; `data` keys of the config, but the device."""

    source: str
    threads_per_rank: int
    prefetch_batches: int
    device: str = "cpu"
    decode: str = "auto"
    hw_decoder_share: float | None = None
    """None: the config has no such key, or the rank no GPU."""

    def keys(self) -> dict[str, object]:
        """As keys of the config's `data`."""
        keys: dict[str, object] = {
            "source": self.source,
            "threads_per_rank": self.threads_per_rank,
            "prefetch_batches": self.prefetch_batches,
            "decode": self.decode,
        }
        return keys | ({} if self.hw_decoder_share is None else {"hw_decoder_share": self.hw_decoder_share})


@dataclass(frozen=True, slots=True)
class Speed:
    """Images a second of one rank, wall time; CPU milliseconds of all its threads an image."""

    images_per_s: float
    cpu_ms_per_image: float

    @property
    def busy_cores(self) -> float:
        return self.images_per_s * self.cpu_ms_per_image / 1000


def source_speed(cfg: RunConfig, sample: Path, facts: DataFacts, batch: int, setting: Setting, seconds: float) -> Speed:
    """The training source of one rank over the sample, as the loop uses it. Raises what the source raises."""
    changes = setting.keys() | {"root": str(sample), "stage_to": "", "synthetic_images": facts.train_images}
    data = DataConfig.model_validate(cfg.data.model_dump() | changes | {"synthetic_classes": facts.num_classes})
    train = cfg.train.model_copy(update={"global_batch": batch, "max_images_per_rank": 0})
    plan = make_plan(cfg.model_copy(update={"data": data, "train": train, "runtime": RuntimeConfig()}), 1, facts)
    source = make_train_source(data, plan, World(), cfg.seed, setting.device, cfg.engine.channels_last)
    try:
        batches = iter(source)
        # What was made ahead of the clock would flatter: begin when the queues are as they stay.
        _repeat(lambda: next(batches), seconds, 2 * setting.prefetch_batches + 2)
        _finish(setting.device)
        cpu_s, start_s = time.process_time(), time.monotonic()
        count = _repeat(lambda: next(batches), seconds)
        _finish(setting.device)
        wall_s, cpu_s = time.monotonic() - start_s, time.process_time() - cpu_s
    finally:
        source.close()
    return Speed(count * batch / wall_s, 1000 * cpu_s / (count * batch))


def windows_per_cpu_s(cfg: RunConfig, sample: Path, facts: DataFacts, batch: int, seconds: float) -> float:
    """Crop windows that one core decodes in a second, with the loader's own work: its images are shrunk to 8x8, so that
    little else remains."""
    crops = AugmentConfig(crop_scale=cfg.data.augment.crop_scale, crop_ratio=cfg.data.augment.crop_ratio)
    data = DataConfig(source=cfg.data.source, root=cfg.data.root, image_size=8, augment=crops)
    alone = Setting(cfg.data.source, 1, 2)
    small = cfg.model_copy(update={"data": data})
    return 1000 / source_speed(small, sample, facts, batch, alone, seconds).cpu_ms_per_image


def step_speed(cfg: RunConfig, plan: Plan, device: str, threads: int, seconds: float) -> Speed:
    """Forward, backward and update of the network on images that are there already; on a CPU a few at a time."""
    import torch
    from torch.nn import functional

    from ii_dist.models import create_model

    if device == "cpu":
        torch.set_num_threads(threads)
    images = plan.micro_batch if device != "cpu" else min(plan.micro_batch, _CPU_STEP_IMAGES)
    layout = torch.channels_last if cfg.engine.channels_last else torch.contiguous_format
    model = create_model(cfg.model, plan.num_classes).to(device, memory_format=layout).train()  # type: ignore[call-overload]
    side = cfg.data.image_size
    images_NCHW = torch.randn(images, 3, side, side).to(device, memory_format=layout)
    labels_N = torch.arange(images, device=device) % plan.num_classes
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, nesterov=True)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.engine.precision)

    def step() -> None:
        with torch.autocast(device.partition(":")[0], half, enabled=half is not None):
            loss = functional.cross_entropy(model(images_NCHW), labels_N)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    _repeat(step, seconds / 2, 2)
    _finish(device)
    cpu_s, start_s = time.process_time(), time.monotonic()
    steps = _repeat(step, seconds)
    _finish(device)
    wall_s, cpu_s = time.monotonic() - start_s, time.process_time() - cpu_s
    return Speed(steps * images / wall_s, 1000 * cpu_s / (steps * images))


def _repeat(work: Callable[[], object], seconds: float, most: int | None = None) -> int:
    """Do it once, and again until `seconds` are over or it was done `most` times; returns how often."""
    end_s, count = time.monotonic() + seconds, 0
    while True:
        work()
        count += 1
        if time.monotonic() >= end_s or count == most:
            return count


def _finish(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)
