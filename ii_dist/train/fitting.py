"""`train.max_images_per_rank` auto: the largest micro-batch that every rank's memory holds, found once.

In: a config, its plan without a limit, a device, the run folder. Out: the plan with the limit, which goes to plan.json
and is taken from there as long as memory, recipe and engine stay. The global batch never changes.

On a GPU a step is tried, from the largest micro-batch down, in `_GPU_SHARE` of the memory: the rest is for decoders,
other libraries and the exchange of gradients. It is tried with all state on one rank and without a compiler, so that
ZeRO's share leaves room to spare. On a CPU nothing is tried: bytes are counted on tensors without memory.
"""

import dataclasses
import gc
import hashlib
import json
import logging
from pathlib import Path

import torch

from ii_dist.config import ConfigError, DataFacts, Plan, RunConfig, RunFolder, make_plan, recipe_sha256
from ii_dist.data import Batch
from ii_dist.engine import CanonicalEngine, EngineParts
from ii_dist.engine.losses import Labels, loss_sum
from ii_dist.engine.peak import PeakBytes
from ii_dist.models import create_model
from ii_dist.runtime import World
from ii_dist.runtime.group import all_gather_bytes
from ii_dist.train.agree import on_rank0

logger = logging.getLogger(__name__)

_GPU_SHARE = 0.9
_CPU_MARGIN = {False: 1.4, True: 2.5}
"""Memory of a process / bytes of tensors, without and with checkpointed activations, whose coming and going leaves
holes in the heap. Measured: up to 1.36 and 2.35."""
_CPU_LIBRARIES = 150e6  # what a process loads and compiles at its first step
_MOMENTS = {"sgd": 1, "lars": 1, "adamw": 2, "lamb": 2, "muon": 2}


def fitting_plan(cfg: RunConfig, plan: Plan, world: World, device: torch.device, folder: RunFolder) -> Plan:
    """`plan`, or the plan with the limit found where the config says auto. Collective. Raises ConfigError."""
    if cfg.train.max_images_per_rank != "auto":
        return plan
    fits = on_rank0(world, lambda: _what_counts(cfg, plan, device))
    limit = int(on_rank0(world, lambda: str(_remembered(folder.plan, fits))))
    if not limit:
        mine = _try_on_gpu(cfg, plan, device) if device.type == "cuda" else _count_on_cpu(cfg, plan)
        limit = min(int.from_bytes(row, "little") for row in all_gather_bytes(mine.to_bytes(8, "little")))
        logger.info("train.max_images_per_rank auto: %d images fit every rank", limit)
    if not limit:
        raise ConfigError(
            "train.max_images_per_rank auto: not even the smallest micro-batch fits; use more ranks, "
            "engine.checkpoint_activations=true or a smaller network"
        )
    facts = DataFacts(plan.train_images, plan.eval_images, plan.num_classes)
    return make_plan(cfg, world.world_size, facts, limit, fits)


def candidates(cfg: RunConfig, plan: Plan) -> list[int]:
    """The micro-batches that a rank's share can be cut into, largest first; of whole pairs where images are mixed."""
    unit = 2 if cfg.data.augment.mixes else 1
    share = plan.images_per_rank // unit
    return [unit * n for n in range(share, 0, -1) if share % n == 0]


def _what_counts(cfg: RunConfig, plan: Plan, device: torch.device) -> str:
    """Memory and settings: with the same ones the same micro-batch fits."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        memory = f"{gpu.name}, {gpu.total_memory / 1e9:.1f} GB"
    elif cfg.engine.memory_gb:
        memory = "CPU"
    else:
        raise ConfigError("train.max_images_per_rank auto: on a CPU needs engine.memory_gb, what a rank may use")
    settings = [recipe_sha256(cfg), cfg.engine.model_dump(), plan.images_per_rank, cfg.data.prefetch_batches]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"{memory}, settings {digest[:16]}"


def _remembered(path: Path, fits: str) -> int:
    """The limit in an earlier attempt's plan.json, if it was found for the same; else 0."""
    try:
        plan = json.loads(path.read_text())
        return int(plan["max_images_per_rank"]) if plan["fits"] == fits else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


# On a GPU ------------------------------------------------------------------------------------------------------------


def _try_on_gpu(cfg: RunConfig, plan: Plan, device: torch.device) -> int:
    """The largest micro-batch whose step ends, alone on this rank; 0 for none."""
    total = torch.cuda.get_device_properties(device).total_memory
    share = min(_GPU_SHARE, cfg.engine.memory_gb * 1e9 / total) if cfg.engine.memory_gb else _GPU_SHARE
    torch.cuda.set_per_process_memory_fraction(share, device)
    try:
        return next((images for images in candidates(cfg, plan) if _fits(cfg, plan, device, images)), 0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _fits(cfg: RunConfig, plan: Plan, device: torch.device, images: int) -> bool:
    try:
        two_steps(cfg, plan, device, images)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()  # what was let go in a circle still holds memory
        torch.cuda.empty_cache()


def two_steps(cfg: RunConfig, plan: Plan, device: torch.device, images: int) -> None:
    """Two updates with `images` images, on this rank alone, thrown away; after the first all state is there."""
    alone = {"kind": "ddp", "zero_stage": 0, "offload_optimizer": False, "sync_batchnorm": False, "compile": False}
    small = dataclasses.replace(
        plan,
        world_size=1,
        global_batch=images,
        images_per_rank=images,
        micro_batch=images,
        accumulate_steps=1,
        canonical_shards=1,  # the engine that needs no other ranks
    )
    parts = EngineParts(cfg.engine.model_copy(update=alone), cfg.optim, small, device)
    engine = CanonicalEngine(create_model(cfg.model, plan.num_classes), parts)
    for _ in range(2):
        engine.train_step([_blank(cfg, plan, images, device)])


def _blank(cfg: RunConfig, plan: Plan, images: int, device: torch.device) -> Batch:
    """Images without content, of the largest size of any epoch."""
    side: int = max(side for _, side in plan.image_sizes)
    dtype = getattr(torch, cfg.data_on(device.type).image_dtype.replace("auto", "float32"))
    images_NCHW = torch.zeros(images, 3, side, side, dtype=dtype, device=device)
    whole_N = torch.zeros(images, dtype=torch.int64, device=device)
    return Batch(images_NCHW, whole_N, torch.ones(images, device=device), whole_N)


# On a CPU ------------------------------------------------------------------------------------------------------------


def _count_on_cpu(cfg: RunConfig, plan: Plan) -> int:
    """The largest micro-batch whose tensors, and what the process has now, stay below engine.memory_gb; 0 for none."""
    two, four = (step_bytes(cfg, plan, images) for images in (2, 4))
    an_image = (four - two) / 2
    room = cfg.engine.memory_gb * 1e9 - _resident_bytes() - _CPU_LIBRARIES
    margin = _CPU_MARGIN[cfg.engine.checkpoint_activations]
    fitting = (n for n in candidates(cfg, plan) if margin * (two + (n - 2) * an_image) <= room)
    return next(fitting, 0)


def step_bytes(cfg: RunConfig, plan: Plan, images: int) -> int:
    """Bytes of tensors at the peak of a step with micro-batches of `images` images, and of those waiting for it.

    In float32, whatever the precision: autocast keeps some tensors twice and saves little.
    """
    device = torch.device("meta")
    with device:
        model = create_model(cfg.model, plan.num_classes).train()
    if cfg.engine.checkpoint_activations:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    batch = _blank(cfg, plan, images, device)
    with PeakBytes([*model.parameters(), *model.buffers(), batch.images_NCHW]) as bytes_of:
        loss = loss_sum(model(batch.images_NCHW), Labels.of(batch, device), cfg.optim)
        loss.backward()  # type: ignore[no-untyped-call]
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    beside = weights * (1 + _MOMENTS[cfg.optim.optimizer] + bool(plan.ema_decay))
    an_image = 4 * batch.images_NCHW[0].numel()
    waiting = an_image * (plan.images_per_rank + images * cfg.data.prefetch_batches)
    peak: int = bytes_of.peak
    return peak + beside + waiting


def _resident_bytes() -> int:
    """Memory of this process now: interpreter and libraries."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0
