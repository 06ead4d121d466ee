"""What `benchmarks.loader` measures: the images, and each way to read or decode them.

In: a folder. Out: 1,000 JPEGs with their index; for each variant an endless iterator that does the work of one batch at
every `next`.
"""

import io
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ii_dist.config import Plan
    from ii_dist.data import BatchSource

IMAGES, CLASSES, SIZE, QUALITY = 1000, 10, (500, 375), 90
BATCH, SIDE = 50, 224
SEED = 0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# name -> what runs; "ours" gives the layout of the hand-written pipeline, "ours_channels_last" the one that training
# uses unless told otherwise; the twin is the hand-written pipeline once more. The last two only decode whole images.
VARIANTS = (
    "ours",
    "ours_channels_last",
    "hand_written",
    "hand_written_twin",
    "pil_dataloader",
    "ours_torch",
    "libjpeg_turbo",
    "pil_decode",
)
SETTLE_S, IDLE_S = 0.1, 0.001


def make_images(root: Path) -> None:
    """Clouds of five scales and a little grain: about 58 kB each, close to photographs of this size."""
    from PIL import Image

    from ii_dist.data import build_index, write_index

    if (root / "train.index").exists():
        return
    for number in range(IMAGES):
        rng = np.random.Generator(np.random.PCG64(number))
        pixels = rng.normal(128, 3.2, (SIZE[1], SIZE[0], 3))
        for cells, strength in ((8, 60), (32, 40), (128, 25), (400, 12)):
            coarse = rng.integers(0, 256, (max(2, cells * 3 // 4), cells, 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC), dtype=np.float64)
            pixels += (smooth - 127.5) / 127.5 * strength
        folder = root / "train" / f"class_{number % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number:04d}.jpg", quality=QUALITY)
    rows, classes = build_index(root / "train")
    write_index(root / "train.index", rows, classes, root="train")


def plan_of_batches(batch: int) -> "Plan":
    """One rank's plan over the images."""
    from ii_dist.config import DataFacts, RunConfig, make_plan

    run = RunConfig.model_validate({"name": "bench", "train": {"global_batch": batch}})
    return make_plan(run, 1, DataFacts(IMAGES, IMAGES, CLASSES))


def our_source(
    root: Path, source: str, channels_last: bool = False, batch: int = BATCH, side: int = SIDE
) -> "BatchSource":
    """This project's loader."""
    from ii_dist.config import DataConfig
    from ii_dist.data import make_train_source
    from ii_dist.runtime import World

    data = DataConfig.model_validate({"source": source, "root": str(root), "image_size": side, "threads_per_rank": 1})
    return make_train_source(data, plan_of_batches(batch), World(), SEED, "cpu", channels_last)


def hand_written(root: Path) -> Iterator[Any]:
    """What one writes with DALI alone: its reader, its random crop and flip, the same operators and output."""
    from nvidia.dali import Pipeline, fn, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    pipeline = Pipeline(batch_size=BATCH, num_threads=1, device_id=None, seed=SEED)
    with pipeline:
        encoded, labels = fn.readers.file(file_root=str(root / "train"), random_shuffle=True, name="Reader")
        images = fn.decoders.image_random_crop(
            encoded, device="cpu", random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3], num_attempts=10
        )
        images = fn.resize(images, size=(SIDE, SIDE), interp_type=types.INTERP_LINEAR, antialias=True)
        images = fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip(probability=0.5),
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * value for value in MEAN],
            std=[255 * value for value in STD],
        )
        pipeline.set_outputs(images, labels)
    batches = DALIGenericIterator([pipeline], ["images", "labels"], reader_name="Reader", auto_reset=True)
    while True:
        for batch in batches:
            yield batch[0]["images"]


def pil_dataloader(root: Path) -> Iterator[Any]:
    """The torchvision example: PIL, float32, two worker processes. An iteration's workers end with it, and so count."""
    import torch
    from torch.utils.data import DataLoader

    from ii_dist.models.compat import ensure_torchvision

    ensure_torchvision()
    from torchvision import datasets, transforms

    steps = [
        transforms.RandomResizedCrop(SIDE),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    folder = datasets.ImageFolder(str(root / "train"), transforms.Compose(steps))
    generator = torch.Generator().manual_seed(SEED)
    while True:
        loader = DataLoader(folder, BATCH, shuffle=True, num_workers=2, drop_last=True, generator=generator)
        for images, _ in loader:
            yield images


def libjpeg_turbo(root: Path) -> Iterator[Any]:
    """Nothing but libjpeg-turbo's full decode, of bytes that are in memory already."""
    from simplejpeg import decode_jpeg

    return _decoded(root, lambda content: decode_jpeg(content, colorspace="RGB"))


def pil_decode(root: Path) -> Iterator[Any]:
    """The same with PIL, whose wheel brings a libjpeg-turbo of its own."""
    from PIL import Image

    def decode(content: bytes) -> Any:
        image = Image.open(io.BytesIO(content))
        image.load()
        return np.broadcast_to(0, (image.height, image.width, 3))

    return _decoded(root, decode)


def _decoded(root: Path, decode: Callable[[bytes], Any]) -> Iterator[Any]:
    contents = [path.read_bytes() for path in sorted((root / "train").rglob("*.jpg"))]
    while True:
        for first in range(0, IMAGES - BATCH + 1, BATCH):
            shapes = {decode(content).shape for content in contents[first : first + BATCH]}
            yield np.broadcast_to(0, (BATCH, *shapes.pop()))


def iterator(variant: str, root: Path) -> Iterator[Any]:
    """The variant's batches, as something that has a shape."""
    if variant.startswith("ours"):
        source = "torch" if variant == "ours_torch" else "dali"
        return (batch.images_NCHW for batch in our_source(root, source, variant == "ours_channels_last"))
    makers = {
        "hand_written": hand_written,
        "hand_written_twin": hand_written,
        "pil_dataloader": pil_dataloader,
        "libjpeg_turbo": libjpeg_turbo,
        "pil_decode": pil_decode,
    }
    return makers[variant](root)


def expected_shape(variant: str) -> tuple[int, ...]:
    """Of one batch."""
    return (BATCH, SIZE[1], SIZE[0], 3) if variant in ("libjpeg_turbo", "pil_decode") else (BATCH, 3, SIDE, SIDE)


def cpu_s() -> float:
    """CPU seconds of this process and of its ended children."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def settle() -> None:
    """Wait until what was begun ahead is done, so that every turn pays for as many images as it takes."""
    before_s = cpu_s()
    while True:
        time.sleep(SETTLE_S)
        now_s = cpu_s()
        if now_s - before_s < IDLE_S:
            return
        before_s = now_s
