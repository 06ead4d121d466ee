"""The least time of a run's training step on a rank, from the work of its network.

In: config, `TrainingWork`, images a step, what the device can do at most. Out: a `StepRoofline`, which knows how fast
the rank could train and what would hold it there.
"""

from dataclasses import dataclass

from ii_dist.config.schema import RunConfig
from ii_dist.models.work import Bound, Rate, TrainingWork

_UPDATE_PASSES = {"sgd": 5, "adamw": 7, "lamb": 15, "lars": 12, "muon": 20}
"""Passes over all weights in float32 of one update. The first two are fused kernels that read weights, gradients and
state and write weights and state; the others are counted from timm's code, roughly."""
_NORM_PASSES, _AVERAGE_PASSES = 1, 3  # of the gradient norm and of a moving average
_WEIGHT_BYTES = 4


@dataclass(frozen=True, slots=True)
class StepRoofline:
    """One step of one rank; images: of the rank in a step. Seconds of all its micro-batches."""

    images: int
    forward_s: float
    backward_s: float
    last_backward_s: float
    """Of the last micro-batch, in which gradients are exchanged."""
    update_s: float
    flops: float
    """By the convention of MFU: recomputed activations and updates count as nothing."""
    bound: Bound

    @property
    def seconds(self) -> float:
        return self.forward_s + self.backward_s + self.update_s


def run_rate(cfg: RunConfig, flops_per_s: float, bytes_per_s: float) -> Rate:
    """What the device can do at most, in the run's own type and form."""
    return Rate(flops_per_s, bytes_per_s, 4 if cfg.engine.precision == "fp32" else 2, cfg.engine.compile)


def step_roofline(
    cfg: RunConfig, work: TrainingWork, micro_batch: int, accumulate_steps: int, rate: Rate
) -> StepRoofline:
    """Of a step of `accumulate_steps` micro-batches."""
    forward_s, backward_s = work.pass_seconds(micro_batch, rate)
    if cfg.engine.checkpoint_activations:
        backward_s += forward_s
    passes = _UPDATE_PASSES[cfg.optim.optimizer] + _NORM_PASSES
    passes += _AVERAGE_PASSES if cfg.engine.ema_half_life_epochs else 0
    return StepRoofline(
        images=micro_batch * accumulate_steps,
        forward_s=accumulate_steps * forward_s,
        backward_s=accumulate_steps * backward_s,
        last_backward_s=backward_s,
        update_s=passes * _WEIGHT_BYTES * work.parameters / rate.bytes_per_s,
        flops=float(micro_batch * accumulate_steps * work.flops_per_image),
        bound=work.bound(micro_batch, rate),
    )
