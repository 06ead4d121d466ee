"""Brings a data set into the layout that training reads: an image folder a split and an index of each.

    python -m tools.import_dataset imagenet SOURCE --out DIR            the official archives in folder SOURCE
    python -m tools.import_dataset folder SOURCE --out DIR              SOURCE/train/<class>/..., SOURCE/val/<class>/...
    python -m tools.import_dataset cifar10|cifar100 SOURCE --out DIR    the binary archive (never the pickles)
    python -m tools.import_dataset fashion-mnist [SOURCE] --out DIR     four gzip files of 70,000 images
    python -m tools.import_dataset digits --out DIR                     scikit-learn's 1,797 digits

Started again, it goes on where it stopped, and does nothing where all is there. Exit codes: 0 done, 2 wrong arguments,
3 wrong data, 5 missing package.
"""

import argparse
from pathlib import Path

from ii_dist.config.errors import ConfigError
from ii_dist.data.scan import THREADS
from tools._border import run
from tools._cifar import CIFAR, import_cifar
from tools._datasets import as_data_error, claim, write_indexes
from tools._imagenet import find_sources, import_imagenet
from tools._small_sets import FASHION_SOURCE, import_digits, import_fashion_mnist

_ABOUT = """
imagenet takes from the folder SOURCE, or from where the options say:
  --train       ILSVRC2012_img_train.tar (one tar a class inside), or a folder of those inner tars
  --val         ILSVRC2012_img_val.tar, or a flat folder of its images
  --val-labels  ILSVRC2012_devkit_t12.tar.gz or the folder unpacked from it (its ground truth, with the devkit's ids
                translated by its meta.mat); or Kaggle's LOC_val_solution.csv; or val_labels.txt, a text file with
                lines such as: ILSVRC2012_val_00000001.JPEG n01751748
All three archives come from https://image-net.org/download-images (sign in, ILSVRC 2012), the csv file with Kaggle's
"ImageNet Object Localization Challenge". Images unpacked into train/<class> and val/<class> are indexed with: folder.

cifar10 and cifar100 take cifar-10-binary.tar.gz and cifar-100-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html
(SOURCE: the archive or its folder). fashion-mnist takes a folder (default: {fashion}).

Official archives are compared with their published size and MD5. Nothing is written outside --out.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.import_dataset",
        description=__doc__.split("\n")[0],
        epilog=_ABOUT.format(fashion=FASHION_SOURCE),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ("digits", "fashion-mnist", *CIFAR, "imagenet", "folder")
    parser.add_argument("name", choices=names, help="which data set")
    parser.add_argument("source", nargs="?", type=Path, help="where it is now (see below)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to make or to go on with")
    parser.add_argument("--workers", type=int, default=THREADS, metavar="N", help=f"threads (default: {THREADS})")
    parser.add_argument(
        "--allow-other-archive",
        action="store_true",
        help="take an archive that is not the official one (a subset of your own); without comparing size and MD5",
    )
    for part, what in (("train", "training images"), ("val", "validation images"), ("val-labels", "their classes")):
        parser.add_argument(f"--{part}", type=Path, metavar="PATH", help=f"imagenet: {what}, where not in SOURCE")
    return parser


def main(arguments: list[str]) -> int:
    asked = _parser().parse_args(arguments)
    _check(asked)
    try:
        _import(asked)
    except OSError as error:
        raise as_data_error(error, asked.out) from None
    return 0


def _check(asked: argparse.Namespace) -> None:
    """Raises ConfigError."""
    parts = (asked.train, asked.val, asked.val_labels)
    if asked.name == "digits" and asked.source is not None:
        raise ConfigError(f"digits: comes with scikit-learn and takes no source ({asked.source})")
    if asked.name not in ("digits", "fashion-mnist") and asked.source is None and not all(parts):
        raise ConfigError(
            f"{asked.name}: name its SOURCE, as in: python -m tools.import_dataset {asked.name} SOURCE --out DIR"
        )
    if asked.name != "imagenet" and any(parts):
        raise ConfigError(f"{asked.name}: --train, --val and --val-labels are for imagenet")
    if asked.name not in ("imagenet", *CIFAR) and asked.allow_other_archive:
        raise ConfigError(f"{asked.name}: --allow-other-archive is for imagenet, cifar10 and cifar100")
    if asked.workers < 1:
        raise ConfigError(f"--workers {asked.workers}: must be at least 1")


def _import(asked: argparse.Namespace) -> None:
    out: Path = asked.out
    if asked.name == "digits":
        import_digits(out, asked.workers)
    elif asked.name == "fashion-mnist":
        import_fashion_mnist(asked.source or Path(FASHION_SOURCE), out, asked.workers)
    elif asked.name == "imagenet":
        sources = find_sources(asked.source, asked.train, asked.val, asked.val_labels)
        import_imagenet(sources, out, asked.workers, asked.allow_other_archive)
    elif asked.name in CIFAR:
        import_cifar(asked.name, asked.source, out, asked.workers, asked.allow_other_archive)
    elif out.resolve() == asked.source.resolve():
        write_indexes(asked.source, out, asked.workers)
    else:
        with claim(out, f"an index of {asked.source.resolve()}"):
            write_indexes(asked.source, out, asked.workers)


if __name__ == "__main__":
    run(main)
