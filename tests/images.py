"""Small real image folders for tests, the same on every call."""

from pathlib import Path

import numpy as np
from PIL import Image

from ii_dist.config import DataConfig, Plan, RunConfig, make_plan
from ii_dist.config.plan import DataFacts
from ii_dist.data import build_index, write_index


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Smooth coloured blobs: close to what JPEG is made for, and different everywhere."""
    rng = np.random.Generator(np.random.PCG64(seed))
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def make_image_folder(
    path: Path, classes: int, per_class: int, size: tuple[int, int] = (60, 44), suffix: str = ".jpg", seed: int = 0
) -> Path:
    """`path`/class_00/00000.jpg ...: `classes` x `per_class` images of about `size` (width, height)."""
    for label in range(classes):
        folder = path / f"class_{label:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            number = label * per_class + i
            image = picture(seed * 1_000_003 + number, size[0] + number % 5, size[1] + number % 3)
            image.save(folder / f"{i:05d}{suffix}", **({"quality": 90} if suffix == ".jpg" else {}))
    return path


def make_data_set(root: Path, classes: int, train_per_class: int, val_per_class: int, size: tuple[int, int]) -> Path:
    """`root` with train/, val/ and both indexes."""
    for split, per_class, seed in (("train", train_per_class, 1), ("val", val_per_class, 2)):
        rows, names = build_index(make_image_folder(root / split, classes, per_class, size, seed=seed))
        write_index(root / f"{split}.index", rows, names, root=split)
    return root


def run_config(cfg: DataConfig, global_batch: int, max_images_per_rank: int = 0, eval_batch: int = 4) -> RunConfig:
    """A run over the data set of `cfg`."""
    train = {
        "global_batch": global_batch,
        "max_images_per_rank": max_images_per_rank,
        "eval_batch_per_rank": eval_batch,
        "epochs": 10.0,
    }
    return RunConfig.model_validate({"name": "test", "data": cfg, "train": train})


def plan_of(run: RunConfig, world_size: int, train_images: int, eval_images: int, classes: int) -> Plan:
    return make_plan(run, world_size, DataFacts(train_images, eval_images, classes))
