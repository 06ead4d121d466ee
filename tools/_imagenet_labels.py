"""The truth of ImageNet's validation images: which WordNet id each of them has.

In: the official development kit (`ILSVRC2012_devkit_t12.tar.gz`, or the folder unpacked from it), Kaggle's
`LOC_val_solution.csv`, or a text file with lines `<image> <WordNet id>`. Out: WordNet id by file name.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ii_dist.config.errors import DataError
from tools._archive import Official, read_gzipped
from tools._matlab import read_matlab

DEVKIT = Official("ILSVRC2012_devkit_t12.tar.gz", 2_568_145, "fa75699e90414af021442c21a62c3abf")
LABEL_FILES = (DEVKIT.name, "ILSVRC2012_devkit_t12", "LOC_val_solution.csv", "val_labels.txt")
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_NUMBER = re.compile(r".*_(\d{8})\.\w+")


def read_labels(source: Path, images: Sequence[str], classes: Sequence[str]) -> dict[str, str]:
    """WordNet id of each of `images`; one without, or of a class that is not among `classes`, is a DataError."""
    if source.is_dir() or source.name.endswith((".tar.gz", ".tgz")):
        labels = _from_devkit(source, images)
    else:
        labels = _from_table(source)
    known = set(classes)
    for image in images:
        wnid = labels.get(image)
        if wnid is None:
            raise DataError(f"{source}: says nothing of {image}")
        if wnid not in known:
            raise DataError(f"{source}: {image} is of class {wnid!r}, which has no training images")
    return {image: labels[image] for image in images}


def _from_devkit(source: Path, images: Sequence[str]) -> dict[str, str]:
    """Line n of the ground truth is the id of image n, the number in its name; meta.mat says each id's WordNet id."""
    parts = _devkit_parts(source)
    for name in (_TRUTH, _META):
        if name not in parts:
            raise DataError(f"{source}: has no {name}; is it the devkit of tasks 1 and 2 ({DEVKIT.name})?")
    lines = parts[_TRUTH].decode("ascii", "replace").split()
    wnids = _wnids(parts[_META], f"{source}: {_META}")
    labels = {}
    for image in images:
        match = _NUMBER.fullmatch(image)
        number = int(match[1]) if match else 0
        if not 1 <= number <= len(lines):
            raise DataError(
                f"{source}: {image} has not a number from 1 to {len(lines):,} in its name (as val_00000001.JPEG)"
            )
        wnid = wnids.get(lines[number - 1])
        if wnid is None:
            raise DataError(f"{source}: line {number:,} of {_TRUTH} is {lines[number - 1]!r}, which is no class's id")
        labels[image] = wnid
    return labels


def _devkit_parts(source: Path) -> dict[str, bytes]:
    if source.is_dir():
        found = {name: sorted(source.rglob(name)) for name in (_TRUTH, _META)}
        return {name: paths[0].read_bytes() for name, paths in found.items() if paths}
    return {
        file_name: content
        for name, content in read_gzipped(source)
        if (file_name := name.rsplit("/", 1)[-1]) in (_TRUTH, _META)
    }


def _wnids(meta: bytes, where: str) -> Mapping[str, str]:
    """The devkit's id, as text -> WordNet id. Ids of inner nodes of the tree (above 1000) are there, too."""
    synsets = read_matlab(meta, where).get("synsets")
    try:
        return {str(int(entry["ILSVRC2012_ID"][0])): str(entry["WNID"]) for entry in synsets or []}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise DataError(f"{where}: its variable synsets has no ILSVRC2012_ID and WNID") from None


def _from_table(source: Path) -> dict[str, str]:
    """Kaggle's `ImageId,PredictionString` (class first, then boxes), or lines `<image> <WordNet id>`."""
    labels = {}
    try:
        with source.open(newline="", encoding="utf-8") as file:
            if source.suffix == ".csv":
                rows = [(row[0], row[1].split()[0]) for row in csv.reader(file) if row and row[0] != "ImageId"]
            else:
                rows = [(words[0], words[1]) for words in map(str.split, file) if words]
    except (IndexError, UnicodeDecodeError, csv.Error):
        raise DataError(f"{source}: each line must name an image and its WordNet id") from None
    for image, wnid in rows:
        labels[image if "." in image else f"{image}.JPEG"] = wnid
    return labels
