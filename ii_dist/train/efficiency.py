"""How much of the machine a run uses: its speed beside what arithmetic and memory would allow at most.

In: config, plan, device. Out: an `Efficiency` on rank 0, where the peaks are known (`metrics.machine`); its figures go
to the boards and into the summary. The network is counted once, for each size of image that the run will have.
"""

import logging
from bisect import bisect_right
from functools import partial

import torch

from ii_dist.config import Plan, RunConfig
from ii_dist.metrics.peaks import Device, choose_device
from ii_dist.models import create_model
from ii_dist.models.roofline import StepRoofline, run_rate, step_roofline
from ii_dist.models.work import TrainingWork, training_work
from ii_dist.runtime import World
from ii_dist.train.agree import on_rank0

logger = logging.getLogger(__name__)


class Efficiency:
    """Shares of the peak arithmetic (MFU) and of the roofline, since the last line and over the whole attempt."""

    def __init__(self, cfg: RunConfig, plan: Plan, peaks: Device) -> None:
        self._plan, self._flops_per_s = plan, peaks.flops_per_s(cfg.engine.precision)
        rate = run_rate(cfg, self._flops_per_s, 1e9 * peaks.gb_per_s)
        self._epochs, sides = zip(*plan.image_sizes, strict=True)
        works = {side: _count(cfg, plan, side) for side in sorted(set(sides))}
        self._steps = [step_roofline(cfg, works[s], plan.micro_batch, plan.accumulate_steps, rate) for s in sides]
        self._lines = 0
        self._last_step: int | None = None
        self._took_s = self._least_s = self._flops = 0.0
        first, work = self._steps[0], works[sides[0]]
        logger.info(
            "%.3g GFLOP and %.4g MB an image of %d pixels; at most %.4g images/s a rank, %s bound (%s)",
            work.flops_per_image / 1e9,
            work.elements_per_image(rate.fused) * rate.bytes_per_element / 1e6,
            sides[0],
            first.images / first.seconds,
            first.bound,
            peaks.name,
        )

    def tags(self, step: int, images_per_s: float) -> dict[str, float]:
        """Of the steps since the last line, which ended with `step`; images_per_s: of all ranks."""
        if not images_per_s:
            return {}
        now = self._at(step)
        took_s = self._plan.global_batch / images_per_s
        self._note(step, now, took_s)
        return {
            "throughput/mfu_share": now.flops / (took_s * self._flops_per_s),
            "throughput/roofline_share": now.seconds / took_s,
        }

    @property
    def mfu_share(self) -> float | None:
        """Of the attempt so far, its first line left out where there are more; None before the first line."""
        return self._flops / (self._took_s * self._flops_per_s) if self._took_s else None

    @property
    def roofline_share(self) -> float | None:
        return self._least_s / self._took_s if self._took_s else None

    @property
    def bound(self) -> str:
        """What most of the least time of the newest step is: arithmetic or memory."""
        return self._at(self._last_step or 1).bound

    def _at(self, step: int) -> StepRoofline:
        epoch = max(0, step - 1) // self._plan.steps_per_epoch
        return self._steps[bisect_right(self._epochs, epoch) - 1]

    def _note(self, step: int, now: StepRoofline, took_s: float) -> None:
        steps = step - self._last_step if self._last_step is not None else 1
        if self._lines == 1:  # the cold start
            self._took_s = self._least_s = self._flops = 0.0
        self._took_s += steps * took_s
        self._least_s += steps * now.seconds
        self._flops += steps * now.flops
        self._lines, self._last_step = self._lines + 1, step


def open_efficiency(cfg: RunConfig, plan: Plan, world: World, device: torch.device) -> Efficiency | None:
    """On rank 0, where the peaks are known; else None. Collective. Raises ConfigError for a wrong `metrics.machine`."""
    made: list[Efficiency] = []

    def make() -> str:
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peaks = choose_device(cfg.metrics.machine, gpu, torch.get_num_threads(), world.local_world_size)
        made.extend([] if peaks is None else [Efficiency(cfg, plan, peaks)])
        return ""

    on_rank0(world, make)
    return made[0] if made else None


def _count(cfg: RunConfig, plan: Plan, side: int) -> TrainingWork:
    return training_work(partial(create_model, cfg.model, plan.num_classes), side)
