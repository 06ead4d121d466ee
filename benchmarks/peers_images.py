"""The images of `benchmarks.peers`: photograph-sized JPEGs in a folder for each class, which every trainer reads.

In: the synthetic JPEGs of `benchmarks.loader`. Out: a folder of links to them. Their own classes say nothing about
them, so that no network could learn; here the class is the colour that prevails.
"""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from ii_dist.data import build_index, write_index

CLASSES = ("red", "green", "blue", "even")


def arrange(source: Path, into: Path, images: int, copies: int) -> None:
    """`into`/train/<class>/*.jpg, and an index of them for ii_dist. copies: links to each image, for longer epochs."""
    files = sorted(source.rglob("*.jpg"))[:images]
    for name in CLASSES:
        (into / "train" / name).mkdir(parents=True)
    for number, (file, label) in enumerate(zip(files, _labels(files), strict=True)):
        for copy in range(copies):
            (into / "train" / CLASSES[label] / f"{copy:02d}_{number:04d}.jpg").symlink_to(file.resolve())
    rows, classes = build_index(into / "train")
    write_index(into / "train.index", rows, classes, root="train")
    shutil.copy(into / "train.index", into / "val.index")


def _labels(files: list[Path]) -> list[int]:
    """Place in `CLASSES`, a quarter of the images each for "even" and about as many for each colour."""
    means = []
    for file in files:
        with Image.open(file) as image:
            image.draft("RGB", (64, 64))
            means.append(np.asarray(image.resize((8, 8)), dtype=np.float64).mean((0, 1)))
    colour = np.asarray(means) - np.mean(means, axis=0)
    colour -= colour.mean(1, keepdims=True)
    strength = colour.max(1)
    even = strength <= np.quantile(strength, 0.25)
    return [3 if is_even else int(place) for is_even, place in zip(even, colour.argmax(1), strict=True)]
