"""Brings a data set into the layout that training reads: an image folder a split and an index of each.

    python -m tools.import_dataset digits --out data/digits             scikit-learn's 1,797 digits
    python -m tools.import_dataset fashion-mnist [SOURCE] --out DIR     four gzip files of 70,000 images
    python -m tools.import_dataset folder SOURCE --out DIR              SOURCE/train/<class>/..., SOURCE/val/<class>/...

Started again, it goes on where it stopped, and does nothing where all is there. Exit codes: 0 done, 2 wrong arguments,
3 wrong data, 5 missing package.
"""

import argparse
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ii_dist.config.errors import ClusterError, ConfigError, DataError
from tools._border import run
from tools._datasets import SPLITS, as_data_error, claim, complete, write_images, write_indexes

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


def import_digits(out: Path) -> None:
    """8x8 grey digits, enlarged to 32x32, as PNG files; the same split on every machine."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ClusterError("digits: scikit-learn is missing; run: pip install scikit-learn==1.7.2") from None
    from PIL import Image

    digits = load_digits()
    files: dict[str, list[tuple[str, bytes]]] = {split: [] for split in SPLITS}
    seen = [0] * 10
    for number, (image, label) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
        seen[label] += 1
        split = "val" if seen[label] % DIGITS_VAL_EVERY == 0 else "train"
        grey = Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8))
        enlarged = grey.resize((DIGITS_SIDE, DIGITS_SIDE), Image.Resampling.BICUBIC)
        files[split].append((f"{label}/{number:04d}.png", _png(np.asarray(enlarged))))
    for split in SPLITS:
        write_images(out / split, files[split], len(files[split]))


def import_fashion_mnist(source: Path, out: Path) -> None:
    """28x28 grey pictures of clothes, as PNG files with the pixels as they are."""
    for split in SPLITS:
        prefix, count = FASHION_FILES[split], FASHION_IMAGES[split]
        labels = _read_idx(source / f"{prefix}-labels-idx1-ubyte.gz", _IDX_LABELS, (count,))
        if int(labels.max()) >= len(FASHION_CLASSES):
            raise DataError(f"{source / prefix}-labels-idx1-ubyte.gz: a label above 9; the file is damaged")
        shape = (count, FASHION_SIDE, FASHION_SIDE)
        images = _read_idx(source / f"{prefix}-images-idx3-ubyte.gz", _IDX_IMAGES, shape)
        write_images(out / split, _fashion_files(out / split, images, labels), count)


def _fashion_files(folder: Path, images: U8, labels: U8) -> Iterator[tuple[str, bytes]]:
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        name = f"{FASHION_CLASSES[label]}/{number:05d}.png"
        yield name, b"" if (folder / name).exists() else _png(image)  # encode only what is to be written


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


def _png(image: U8) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.import_dataset", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=("digits", "fashion-mnist", "folder"), help="which data set")
    parser.add_argument("source", nargs="?", type=Path, help=f"where it is now (fashion-mnist: {FASHION_SOURCE})")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to make or to go on with")
    return parser


def main(arguments: list[str]) -> int:
    asked = _parser().parse_args(arguments)
    out: Path = asked.out
    expected = {"digits": DIGITS_IMAGES, "fashion-mnist": FASHION_IMAGES}.get(asked.name)
    if asked.name == "folder" and asked.source is None:
        raise ConfigError(
            "folder: name the image folder, as in: python -m tools.import_dataset folder SOURCE --out DIR"
        )
    if asked.name == "digits" and asked.source is not None:
        raise ConfigError(f"digits: comes with scikit-learn and takes no source ({asked.source})")
    try:
        if asked.name == "folder":
            if out.resolve() != asked.source.resolve():
                claim(out, f"an index of {asked.source.resolve()}")
            write_indexes(asked.source, out)
            return 0
        claim(out, asked.name)
        if expected and complete(out, expected):
            print(f"{out}: {asked.name} is complete ({sum(expected.values()):,} images); nothing to do")
            return 0
        if asked.name == "digits":
            import_digits(out)
        else:
            import_fashion_mnist(asked.source or Path(FASHION_SOURCE), out)
        write_indexes(out, out)
    except OSError as error:
        raise as_data_error(error, out) from None
    return 0


if __name__ == "__main__":
    run(main)
