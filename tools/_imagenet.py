"""ImageNet (ILSVRC 2012) from its official archives, in parallel, going on after a kill.

In: the training tar (of one tar a class) or a folder of the inner tars, the validation tar or a flat folder, and the
truth of the validation images. Out: `train/<WordNet id>/<image>`, `val/<WordNet id>/<image>` with the bytes as they
are, and both indexes; classes in the order of their WordNet ids.
"""

import os
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ii_dist.config.errors import DataError
from ii_dist.data import in_parallel
from ii_dist.data.scan import IMAGE_SUFFIXES
from tools._archive import Member, Official, check_official, list_members, read_member
from tools._datasets import Filling, Target, claim
from tools._imagenet_labels import DEVKIT, LABEL_FILES, read_labels
from tools._progress import Progress

TRAIN = Official("ILSVRC2012_img_train.tar", 147_897_477_120, "1d675b47d978889d74fa0da5fadfb00e")
VAL = Official("ILSVRC2012_img_val.tar", 6_744_924_160, "29b22e2961454d5413ddabcf34fc5622")
OFFICIAL_IMAGES = {"train": 1_281_167, "val": 50_000}
OFFICIAL_CLASSES = 1000
_CLASS_TAR = re.compile(r"(?:\./)?(n\d{8})\.tar")


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the three parts lie."""

    train: Path
    val: Path
    labels: Path


def find_sources(folder: Path | None, train: Path | None, val: Path | None, labels: Path | None) -> Sources:
    """The parts that were named, else those that lie in `folder` under their usual names. Raises DataError."""

    def find(named: Path | None, names: tuple[str, ...], what: str, option: str) -> Path:
        candidates = [named] if named else [folder / name for name in names] if folder else []
        for path in candidates:
            if path.exists():
                return path
        raise DataError(f"{named or folder}: no {what} here (looked for {', '.join(names)}); name it with {option}")

    return Sources(
        find(train, (TRAIN.name, "ILSVRC2012_img_train", "train"), "training images", "--train"),
        find(val, (VAL.name, "ILSVRC2012_img_val", "val"), "validation images", "--val"),
        find(labels, LABEL_FILES, "truth of the validation images", "--val-labels"),
    )


def import_imagenet(sources: Sources, out: Path, workers: int, allow_other: bool) -> None:
    """All of it. Raises DataError, OSError."""
    identity = {name: [path.name, _bytes(path)] for name, path in (("train", sources.train), ("val", sources.val))}
    with claim(out, "imagenet", identity, workers) as target:
        if target.complete():
            print(f"{out}: imagenet is complete ({sum(target.noted('images').values()):,} images); nothing to do")
            return
        official = dict.fromkeys(OFFICIAL_IMAGES, False)
        for split, path, archive in (("train", sources.train, TRAIN), ("val", sources.val, VAL)):
            if path.is_file():
                official[split] = check_official(path, archive, target, allow_other)
        if sources.labels.is_file() and sources.labels.name == DEVKIT.name:
            check_official(sources.labels, DEVKIT, target, allow_other)
        classes = _class_tars(sources.train)
        names = [wnid for wnid, _, _ in classes]
        _check_count(sources.train, "classes", len(names), OFFICIAL_CLASSES, official["train"])
        # Labels before images: what is wrong with them is known at once, not after an hour.
        val = _val_images(sources, names)
        _check_count(sources.val, "images", len(val), OFFICIAL_IMAGES["val"], official["val"])
        _check_space(target, sum(member.length for _, _, member in classes), sum(m.length for _, m in val))
        images = {"train": _fill_train(target, classes), "val": _fill_val(target, sources.val, val)}
        _check_count(sources.train, "images", images["train"], OFFICIAL_IMAGES["train"], official["train"])
        target.finish(images)


def _class_tars(source: Path) -> list[tuple[str, Path, Member]]:
    """WordNet id, file and place of each class's tar, in the order in which they lie on disk."""
    if source.is_dir():
        tars = sorted(path for path in source.iterdir() if path.suffix == ".tar")
        found = [(path, Member(path.name, 0, path.stat().st_size)) for path in tars]
    else:
        found = [(source, member) for member in list_members(source)]
    classes = []
    for path, member in found:
        match = _CLASS_TAR.fullmatch(member.name)
        if not match:
            raise DataError(f"{source}: {member.name} is not the tar of a class (as n01440764.tar)")
        classes.append((match[1], path, member))
    if not classes:
        raise DataError(f"{source}: holds no tars of classes (as n01440764.tar); is it unpacked? then: import folder")
    _check_unique(source, [wnid for wnid, _, _ in classes])
    return classes


def _fill_train(target: Target, classes: list[tuple[str, Path, Member]]) -> int:
    """Write the images of all classes, a class a thread; returns how many there are."""
    progress, total = Progress("train images", "GB", 1e9), sum(member.length for _, _, member in classes)
    done_path = target.out / ".train.done"
    done = _classes_done(done_path)
    lock, stop = threading.Lock(), threading.Event()
    with target.filling("train") as filling:

        def fill(entry: tuple[str, Path, Member]) -> int:
            wnid, path, tar = entry
            if not _whole(filling.folder / wnid, done.get(wnid, 0)):
                images = list_members(path, tar)
                _write_members(filling, path, [(f"{wnid}/{image.file_name}", image) for image in images], stop)
                if stop.is_set():
                    return 0
                with lock, done_path.open("a") as file:
                    file.write(f"{wnid} {len(images)}\n")
                done[wnid] = len(images)
            progress.add(tar.length, total)
            return done[wnid]

        return sum(in_parallel(fill, classes, target.workers, chunk=1, stop=stop))


def _write_members(
    filling: Filling, archive: Path, images: list[tuple[str, Member]], stop: threading.Event | None = None
) -> None:
    """Write the images that are not there yet; gives up when `stop` is set."""
    _check_unique(archive, [name for name, _ in images])
    file = os.open(archive, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for name, image in images:
            if stop and stop.is_set():
                return
            _check_image_name(archive, image)
            if not filling.has(name, image.length):
                filling.put(name, read_member(file, archive, image))
    finally:
        os.close(file)


def _classes_done(path: Path) -> dict[str, int]:
    """WordNet id -> images, of the classes that an earlier start wrote to the end; a torn last line does not count."""
    if not path.exists():
        return {}
    lines = re.findall(r"^(n\d{8}) (\d+)\n", path.read_text(errors="replace"), re.MULTILINE)
    return {wnid: int(count) for wnid, count in lines}


def _whole(folder: Path, images: int) -> bool:
    """Whether a class that was noted as done still has all its files."""
    if not images or not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return sum(not entry.name.startswith(".") for entry in entries) == images


def _val_images(sources: Sources, classes: list[str]) -> list[tuple[str, Member]]:
    """Target name and place of each validation image."""
    if sources.val.is_dir():
        with os.scandir(sources.val) as entries:
            files = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
            if folders := [entry.name for entry in files if entry.is_dir()]:
                raise DataError(
                    f"{sources.val}: holds the folder {folders[0]}; sorted into classes? then: import folder"
                )
            members = [Member(entry.name, 0, entry.stat().st_size) for entry in files]
    else:
        members = list_members(sources.val)
    for member in members:
        _check_image_name(sources.val, member)
    _check_unique(sources.val, [member.file_name for member in members])
    if not members:
        raise DataError(f"{sources.val}: holds no images")
    labels = read_labels(sources.labels, [member.file_name for member in members], classes)
    return [(f"{labels[member.file_name]}/{member.file_name}", member) for member in members]


def _fill_val(target: Target, source: Path, images: list[tuple[str, Member]]) -> int:
    progress = Progress("val images")
    with target.filling("val") as filling:

        def fill(image: tuple[str, Member]) -> None:
            name, member = image
            _write_members(filling, source / member.name if source.is_dir() else source, [(name, member)])

        for done, _ in enumerate(in_parallel(fill, images, target.workers), start=1):
            progress(done, len(images))
    return len(images)


def _check_image_name(archive: Path, image: Member) -> None:
    if image.file_name.startswith(".") or os.path.splitext(image.file_name)[1].lower() not in IMAGE_SUFFIXES:  # noqa: PTH122
        raise DataError(f"{archive}: {image.name} is not an image by its name")


def _check_unique(archive: Path, names: list[str]) -> None:
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise DataError(f"{archive}: holds {twice} twice")


def _check_count(source: Path, what: str, found: int, expected: int, official: bool) -> None:
    if official and found != expected:
        raise DataError(f"{source}: has {found:,} {what}, the official archive {expected:,}")


def _check_space(target: Target, *lengths: int) -> None:
    """An import that cannot end is not begun. What is there already counts as room."""
    needed, folders = sum(lengths), (target.out / "train", target.out / "val")
    free = shutil.disk_usage(target.out).free
    if free < needed:  # only then is it worth a look at each file
        there = sum(entry.stat().st_size for folder in folders for entry in _files_below(folder))
        if free + there < needed:
            raise DataError(
                f"{target.out}: the images take {needed / 1e9:,.1f} GB, the disk has {free / 1e9:,.1f} GB left; "
                "free some or choose another --out"
            )


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)


def _bytes(path: Path) -> int:
    return 0 if path.is_dir() else path.stat().st_size
