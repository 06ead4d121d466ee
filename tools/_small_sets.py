"""Digits (comes with scikit-learn) and Fashion-MNIST (four gzip'd IDX files), as PNG files.

In: a target folder, and the folder of the four files. Out: images of both splits, and both indexes.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ii_dist.config.errors import ClusterError, DataError
from tools._datasets import SPLITS, claim, write_images

U8 = NDArray[np.uint8]

DIGITS_SIDE = 32
DIGITS_IMAGES = {"train": 1442, "val": 355}
DIGITS_VAL_EVERY = 5  # of each class, the 5th, 10th, ... goes to the validation split

FASHION_SOURCE = "/usr/share/datasets/fashion-mnist"
FASHION_IMAGES = {"train": 60_000, "val": 10_000}
FASHION_FILES = {"train": "train", "val": "t10k"}
FASHION_SIDE = 28
FASHION_CLASSES = (
    "0_tshirt_top",
    "1_trouser",
    "2_pullover",
    "3_dress",
    "4_coat",
    "5_sandal",
    "6_shirt",
    "7_sneaker",
    "8_bag",
    "9_ankle_boot",
)
_IDX_IMAGES, _IDX_LABELS = 0x00000803, 0x00000801  # unsigned bytes of 3 axes, of 1 axis


def import_digits(out: Path, workers: int) -> None:
    """8x8 grey digits, enlarged to 32x32; the same split on every machine."""
    with claim(out, "digits", workers=workers) as target:
        if target.complete():
            print(f"{out}: digits is complete ({sum(DIGITS_IMAGES.values()):,} images); nothing to do")
            return
        for split, images in _digits().items():
            write_images(target, split, iter(images), len(images))
        target.finish(DIGITS_IMAGES)


def _digits() -> dict[str, list[tuple[str, Callable[[], bytes]]]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ClusterError("digits: scikit-learn is missing; run: pip install scikit-learn==1.7.2") from None
    digits = load_digits()
    files: dict[str, list[tuple[str, Callable[[], bytes]]]] = {split: [] for split in SPLITS}
    seen = [0] * 10
    for number, (image, label) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
        seen[label] += 1
        split = "val" if seen[label] % DIGITS_VAL_EVERY == 0 else "train"
        grey = np.rint(image * (255 / 16)).astype(np.uint8)
        files[split].append((f"{label}/{number:04d}.png", partial(encode_png, grey, DIGITS_SIDE)))
    return files


def import_fashion_mnist(source: Path, out: Path, workers: int) -> None:
    """28x28 grey pictures of clothes, with the pixels as they are."""
    with claim(out, "fashion-mnist", workers=workers) as target:
        if target.complete():
            print(f"{out}: fashion-mnist is complete ({sum(FASHION_IMAGES.values()):,} images); nothing to do")
            return
        for split in SPLITS:
            prefix, count = FASHION_FILES[split], FASHION_IMAGES[split]
            labels = _read_idx(source / f"{prefix}-labels-idx1-ubyte.gz", _IDX_LABELS, (count,))
            if int(labels.max()) >= len(FASHION_CLASSES):
                raise DataError(f"{source / prefix}-labels-idx1-ubyte.gz: a label above 9; the file is damaged")
            shape = (count, FASHION_SIDE, FASHION_SIDE)
            images = _read_idx(source / f"{prefix}-images-idx3-ubyte.gz", _IDX_IMAGES, shape)
            write_images(target, split, _fashion_files(images, labels), count)
        target.finish(FASHION_IMAGES)


def _fashion_files(images: U8, labels: U8) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        yield f"{FASHION_CLASSES[label]}/{number:05d}.png", partial(encode_png, image)


def _read_idx(path: Path, magic: int, shape: tuple[int, ...]) -> U8:
    """The array of a gzip'd IDX file: magic number, one 4-byte size an axis (big endian), values."""
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; install Debian's package dataset-fashion-mnist or name its folder"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked ({error})") from None
    header = np.frombuffer(content[: 4 * (1 + len(shape))], dtype=">u4").tolist()
    if header != [magic, *shape]:
        raise DataError(f"{path}: header says {header}, expected {[magic, *shape]}; the file is of another data set")
    values = np.frombuffer(content, dtype=np.uint8, offset=4 * len(header))
    if values.size != np.prod(shape):
        raise DataError(f"{path}: {values.size:,} values, expected {np.prod(shape):,}; the file is cut off")
    return values.reshape(shape)


def encode_png(image: U8, side: int = 0) -> bytes:
    """PNG bytes of a grey or RGB image; side: enlarge to side x side first."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image))
    if side:
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
