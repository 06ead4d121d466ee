"""How much of the network's speed is left when images come from the loader (G6).

In: the images of `benchmarks.loader`, a device. Out: images a second of the training step with the loader, with one
batch that is on the device already, and their ratio. Wall time, blocks of steps in turn; the synthetic block runs twice
a turn, and the ratio of these twins is the noise to read the other ratio by.
"""

import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.loader_variants import CLASSES, IMAGES, SEED, SIDE

if TYPE_CHECKING:
    from ii_dist.data import Batch

NETWORK, BATCH, STEPS = "ini_resnet50", 256, 20


def measure_end_to_end(
    root: Path, turns: int, device: str = "cuda:0", side: int = SIDE, network: str = NETWORK, batch: int = BATCH
) -> dict[str, Any]:
    """Medians over the turns, each of `STEPS` steps of each kind (on a CPU one, to show that it runs)."""
    import torch

    from ii_dist.config import DataFacts, RunConfig, make_plan
    from ii_dist.data import make_train_source
    from ii_dist.engine import EngineParts, make_engine
    from ii_dist.models import create_model
    from ii_dist.runtime import World

    on_gpu = device != "cpu"
    cfg = RunConfig.model_validate(
        {
            "name": "bench",
            "data": {"root": str(root), "image_size": side, "eval_resize": side, "eval_image_size": side},
            "model": {"network": network},
            "engine": {"device": "cuda" if on_gpu else "cpu", "precision": "bf16" if on_gpu else "fp32"},
            "train": {"global_batch": batch},
        }
    )
    plan = make_plan(cfg, 1, DataFacts(IMAGES, IMAGES, CLASSES))
    parts = EngineParts(cfg.engine, cfg.optim, plan, torch.device(device), image_size=side)
    engine = make_engine(create_model(cfg.model, CLASSES), parts)
    source = make_train_source(cfg.data, plan, World(gpus=int(on_gpu)), SEED, device, cfg.engine.channels_last)
    loaded = iter(source)
    fixed = itertools.repeat(next(loaded))
    steps = STEPS if on_gpu else 1

    def images_per_s(batches: "Iterator[Batch]") -> float:
        start_s = time.monotonic()
        for one in itertools.islice(batches, steps):
            engine.train_step([one])
        if on_gpu:
            torch.cuda.synchronize()
        return steps * batch / (time.monotonic() - start_s)

    images_per_s(fixed)  # kernels are chosen, memory is taken
    found = [(images_per_s(loaded), images_per_s(fixed), images_per_s(fixed)) for _ in range(turns)]
    source.close()
    return {
        "network": network,
        "batch": batch,
        "whole": statistics.median(whole for whole, _, _ in found),
        "synthetic": statistics.median(synthetic for _, synthetic, _ in found),
        "ratio": statistics.median(whole / synthetic for whole, synthetic, _ in found),
        "noise": statistics.median(twin / synthetic for _, synthetic, twin in found),
    }
