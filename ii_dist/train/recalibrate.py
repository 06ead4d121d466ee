"""`ii-dist recalibrate`: BatchNorm statistics of a network measured anew, for weights that no training step made.

In: a safetensors file of weights (an average of checkpoints, say) and a config. Out: the same weights with running
means and variances that are plain averages over batches of training images, as the last epoch of training sees them.
"""

import contextlib
import itertools
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from ii_dist.checkpoint.shards import spec_of
from ii_dist.checkpoint.streams import draft_tensors, tensor_bytes
from ii_dist.checkpoint.weights import check_target, load_network_file
from ii_dist.config import ConfigError, Plan, RunConfig
from ii_dist.config.errors import EXIT_DONE
from ii_dist.data import BatchSource, Position, make_train_source
from ii_dist.models import create_model
from ii_dist.runtime import World, set_up_logging
from ii_dist.runtime.seeds import seed_init
from ii_dist.train.commands import Outcome
from ii_dist.train.opening import join
from ii_dist.train.preflight import WEIGHTS_SUFFIX

logger = logging.getLogger(__name__)

_LOG_EVERY_BATCHES = 50


def recalibrate(
    cfg: RunConfig, plan: Plan, world: World, weights: Path, out: Path, images: int, force: bool = False
) -> Outcome:
    """Write `out`: float32 weights, statistics of at least `images` training images, at most of one epoch.

    Raises ConfigError, CheckpointError.
    """
    set_up_logging(world)
    check_target(out, WEIGHTS_SUFFIX, force)
    if world.world_size > 1:
        raise ConfigError("recalibrate runs in one process; start it without launch and torchrun")
    if images < 1:
        raise ConfigError(f"--images {images}: needs 1 or more")
    batches = math.ceil(min(images, plan.steps_per_epoch * plan.global_batch) / plan.micro_batch)
    with contextlib.ExitStack() as stack:
        device = join(cfg, world, stack)
        network = create_model(cfg.model, plan.num_classes)
        facts = load_network_file(network, weights)
        source = make_train_source(
            cfg.data_on(device.type), plan, world, cfg.seed, str(device), cfg.engine.channels_last
        )
        stack.callback(source.close)
        seed_init(cfg.seed)  # stochastic depth draws the same each time
        recompute_statistics(network, _images(source, plan, batches), device)
    facts["recalibrated_images"] = str(batches * plan.micro_batch)
    tensors = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    with draft_tensors(out, [spec_of(name, tensor) for name, tensor in tensors.items()], facts) as draft:
        for name, tensor in tensors.items():
            draft.write(name, 0, tensor_bytes(tensor))
    return Outcome(EXIT_DONE, f"{out}: BatchNorm statistics of {facts['recalibrated_images']} training images")


def recompute_statistics(network: nn.Module, images: Iterator[torch.Tensor], device: torch.device) -> None:
    """Replace the running statistics of all BatchNorm layers by averages over the batches of `images` (NCHW)."""
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        raise ConfigError("recalibrate: this network has no BatchNorm layers; its average is used as it is")
    network.to(device).train()
    update_bn(images, network, device)


def _images(source: BatchSource, plan: Plan, batches: int) -> Iterator[torch.Tensor]:
    last_epoch = math.ceil(plan.total_steps / plan.steps_per_epoch) - 1
    source.seek(Position(last_epoch, 0))
    for number, batch in enumerate(itertools.islice(source, batches)):
        if number % _LOG_EVERY_BATCHES == 0:
            logger.info("recalibrating: batch %d of %d", number + 1, batches)
        yield batch.images_NCHW
