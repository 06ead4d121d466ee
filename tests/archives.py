"""Tiny archives in the official formats of ImageNet and CIFAR, for the tests of the importers."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import scipy.io

from tests.images import picture

CLASSES = ("n01440764", "n01443537", "n02084071")
# The devkit numbers classes in another order than their WordNet ids, and inner nodes of the tree after them.
DEVKIT_IDS = {"n02084071": 1, "n01440764": 2, "n01443537": 3, "n00001740": 4}
VAL_WNIDS = ("n01443537", "n02084071", "n02084071", "n01440764", "n01443537")


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed, 40 + seed % 7, 30 + seed % 5).save(buffer, "JPEG")
    return buffer.getvalue()


def tar_bytes(files: Iterable[tuple[str, bytes]], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]  # one of w, w:gz
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def train_images(per_class: int) -> dict[str, dict[str, bytes]]:
    return {
        wnid: {f"{wnid}_{i}.JPEG": jpeg(100 * label + i) for i in range(per_class)}
        for label, wnid in enumerate(CLASSES)
    }


def val_images() -> dict[str, bytes]:
    return {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(1000 + i) for i in range(1, len(VAL_WNIDS) + 1)}


def devkit_files() -> dict[str, bytes]:
    """As MATLAB saved them: an array of structs with compressed elements."""
    fields = (
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    )
    synsets = np.empty((len(DEVKIT_IDS), 1), dtype=[(field, object) for field in fields])
    for row, (wnid, number) in enumerate(DEVKIT_IDS.items()):
        inner = number > len(CLASSES)
        children = np.array([[1.0, 2.0]]) if inner else np.zeros((1, 0))
        synsets[row, 0] = (float(number), wnid, "a fish, Carassius", "what it is", float(inner), children, 0.0, 1300.0)
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets}, do_compression=True)
    truth = "".join(f"{DEVKIT_IDS[wnid]}\n" for wnid in VAL_WNIDS)
    return {
        "ILSVRC2012_devkit_t12/readme.txt": b"hello",
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }


def make_imagenet(folder: Path, per_class: int = 4) -> Path:
    """`folder` with the three official archives; the inner tars are not in the order of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    inner = [(f"{wnid}.tar", tar_bytes(files.items())) for wnid, files in train_images(per_class).items()]
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(inner[::-1]))
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(val_images().items()))
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar_bytes(devkit_files().items(), "w:gz"))
    return folder


CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar_records(count: int, classes: int, label_bytes: int, seed: int) -> bytes:
    rng = np.random.Generator(np.random.PCG64(seed))
    records = rng.integers(0, 256, (count, label_bytes + 3072), dtype=np.uint8)
    records[:, 0] = np.arange(count) % 20  # coarse labels, where there are two
    records[:, label_bytes - 1] = np.arange(count) % classes
    return records.tobytes()


def cifar10_files(per_file: int = 20) -> dict[str, bytes]:
    inside = "cifar-10-batches-bin"
    files = {f"{inside}/batches.meta.txt": ("\n".join(CIFAR10_NAMES) + "\n\n").encode()}
    files |= {f"{inside}/data_batch_{i}.bin": cifar_records(per_file, 10, 1, i) for i in range(1, 6)}
    return files | {f"{inside}/test_batch.bin": cifar_records(per_file, 10, 1, 6), f"{inside}/readme.html": b"<html>"}


def cifar100_files(count: int = 200) -> dict[str, bytes]:
    inside = "cifar-100-binary"
    names = "".join(f"thing_{i}\n" for i in range(100))
    return {
        f"{inside}/train.bin": cifar_records(count, 100, 2, 1),
        f"{inside}/test.bin": cifar_records(100, 100, 2, 2),
        f"{inside}/fine_label_names.txt": names.encode(),
        f"{inside}/coarse_label_names.txt": b"".join(b"group_%d\n" % i for i in range(20)),
    }
