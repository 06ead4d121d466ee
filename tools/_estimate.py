"""A model of a training step over many ranks: compute, exchange of gradients, input.

In: a config, its plan, what the ranks are and what joins them. Out: an `Estimate`.

Compute is the roofline of the network (`ii_dist.models.work`), divided by the share of it that such devices reach.
Gradients go round a ring: each rank sends and receives 2 (n - 1) / n of their bytes. On GPUs that runs while the last
backward pass goes on, all but the last bucket; what is longer than the backward pass is exposed too. On a CPU the cores
that would exchange are the ones that compute: nothing overlaps. Input is made ahead: it costs nothing until it is
slower than the rest, except on a CPU without cores to spare, where it adds to compute.
"""

import math
from dataclasses import dataclass
from functools import partial

from ii_dist.config import Plan, RunConfig
from ii_dist.metrics.peaks import Device
from ii_dist.models import create_model
from ii_dist.models.roofline import StepRoofline, run_rate, step_roofline
from ii_dist.models.work import TrainingWork, training_work

BUCKET_BYTES = 25 << 20  # torch's DistributedDataParallel
HOST_S = 1e-4  # the loop itself: votes, clock, metrics
EVAL_SHARE = 1 / 3  # of a training image: no backward pass


@dataclass(frozen=True, slots=True)
class Cluster:
    """Ranks and what joins and feeds them; a rate of 0 = without limit."""

    device: Device
    ranks: int
    nodes: int
    link_gb_per_s: float
    """Slowest link of the ring, for each rank and way."""
    link_latency_s: float
    share: float
    """Of the roofline."""
    cores_per_rank: float
    loader_images_per_core_s: float
    storage_gb_per_s: float
    """Of a node."""
    image_bytes: float


@dataclass(frozen=True, slots=True)
class StepEstimate:
    """Seconds of one step."""

    compute_s: float
    exchange_s: float
    exposed_s: float
    """The part of the exchange that nothing hides."""
    loader_s: float
    storage_s: float
    host_s: float
    step_s: float
    bound: str
    """arithmetic, memory, exchange, loader or storage."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of a whole run; `step` is that of its last epoch."""

    images_per_s: float
    """All ranks, mean over the epochs, evaluation left out."""
    images_per_s_rank: float
    roofline_images_per_s: float
    """What the devices could do at most, with nothing to wait for."""
    mfu_share: float
    step: StepEstimate
    steps: int
    parameters: int
    gflop_per_image: float
    mb_per_image: float
    epochs_per_hour: float
    hours: float
    rank_hours: float


def estimate(cfg: RunConfig, plan: Plan, cluster: Cluster) -> Estimate:
    """Of the whole run, each epoch at its own image size."""
    flops_per_s = cluster.device.flops_per_s(cfg.engine.precision)
    rate = run_rate(cfg, flops_per_s, 1e9 * cluster.device.gb_per_s)
    total_s = least_s = flops = 0.0
    works: dict[int, TrainingWork] = {}
    for side, steps in _steps_of_sides(plan):
        if side not in works:
            works[side] = training_work(partial(create_model, cfg.model, plan.num_classes), side)
        least = step_roofline(cfg, works[side], plan.micro_batch, plan.accumulate_steps, rate)
        step = step_estimate(cfg, plan, works[side], least, cluster)
        total_s += steps * step.step_s
        least_s += steps * least.seconds
        flops += steps * least.flops
    work = works[side]
    images = plan.total_steps * plan.global_batch
    evaluations = plan.total_steps // plan.eval_every_steps
    eval_s = evaluations * plan.eval_images * EVAL_SHARE * total_s / images
    epochs = plan.total_steps / plan.steps_per_epoch
    hours = (total_s + eval_s) / 3600
    return Estimate(
        images_per_s=images / total_s,
        images_per_s_rank=images / total_s / plan.world_size,
        roofline_images_per_s=images / least_s,
        mfu_share=flops / (total_s * flops_per_s),
        step=step,
        steps=plan.total_steps,
        parameters=work.parameters,
        gflop_per_image=work.flops_per_image / 1e9,
        mb_per_image=work.elements_per_image(rate.fused) * rate.bytes_per_element / 1e6,
        epochs_per_hour=epochs / hours,
        hours=hours,
        rank_hours=hours * plan.world_size,
    )


def step_estimate(
    cfg: RunConfig, plan: Plan, work: TrainingWork, least: StepRoofline, cluster: Cluster
) -> StepEstimate:
    """Of one step."""
    on_gpu = cluster.device.kind == "cuda"
    compute_s = least.seconds / cluster.share
    element = 2 if cfg.engine.compress_gradients == "bf16" else 4
    exchange_s = ring_s(element * work.parameters, cluster)
    exposed_s = exchange_s
    if on_gpu:
        last_s = ring_s(min(BUCKET_BYTES, element * work.parameters), cluster)
        exposed_s = max(last_s, exchange_s - least.last_backward_s / cluster.share)
    loader_s = _seconds(plan.images_per_rank, cluster.cores_per_rank * cluster.loader_images_per_core_s)
    node_bytes = plan.images_per_rank * cluster.ranks / cluster.nodes * cluster.image_bytes
    storage_s = _seconds(node_bytes, 1e9 * cluster.storage_gb_per_s)
    if not on_gpu and cluster.cores_per_rank <= cluster.device.threads:
        compute_s += loader_s
    parts = {"compute": compute_s + exposed_s + HOST_S, "loader": loader_s, "storage": storage_s}
    bound = max(parts, key=lambda name: parts[name])
    if bound == "compute":
        shared = compute_s - least.seconds / cluster.share
        waits = {least.bound: compute_s - shared, "exchange": exposed_s, "loader": shared}
        bound = max(waits, key=lambda name: waits[name])
    return StepEstimate(
        compute_s, exchange_s, exposed_s, loader_s, storage_s, HOST_S, step_s=max(parts.values()), bound=bound
    )


def ring_s(size_bytes: float, cluster: Cluster) -> float:
    """An all-reduce of so many bytes, in buckets."""
    if cluster.ranks == 1:
        return 0.0
    moved = 2 * (cluster.ranks - 1) / cluster.ranks * size_bytes
    return moved / (1e9 * cluster.link_gb_per_s) + math.ceil(size_bytes / BUCKET_BYTES) * cluster.link_latency_s


def _seconds(amount: float, per_s: float) -> float:
    return amount / per_s if per_s else 0.0


def _steps_of_sides(plan: Plan) -> list[tuple[int, int]]:
    """(side, steps) in the order of the epochs."""
    starts = [min(epoch * plan.steps_per_epoch, plan.total_steps) for epoch, _ in plan.image_sizes]
    ends = [*starts[1:], plan.total_steps]
    return [(side, end - start) for (_, side), start, end in zip(plan.image_sizes, starts, ends, strict=True)]
