"""CIFAR from the binary archives: pixels, labels, class order; the pickled archives are refused."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ii_dist.config import ConfigError, DataError
from ii_dist.data import Index
from tests.archives import CIFAR10_NAMES, cifar10_files, cifar100_files, tar_bytes
from tools import _cifar, import_dataset
from tools._archive import Official

ARCHIVES = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}


def write(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / ARCHIVES[name]
    path.write_bytes(tar_bytes(files.items(), "w:gz"))
    return path


def run_import(name: str, source: Path, out: Path) -> int:
    return import_dataset.main([name, str(source), "--out", str(out), "--allow-other-archive"])


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_images_have_the_pixels_and_labels_of_the_records(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = cifar10_files() if name == "cifar10" else cifar100_files()
    write(tmp_path / "source", name, files)
    assert run_import(name, tmp_path / "source", tmp_path / "out") == 0
    if name == "cifar10":
        raw = b"".join(files[f"cifar-10-batches-bin/data_batch_{i}.bin"] for i in range(1, 6))
        skip, classes = 1, [f"{i}_{c}" for i, c in enumerate(CIFAR10_NAMES)]
    else:
        raw, skip, classes = files["cifar-100-binary/train.bin"], 2, [f"{i:02d}_thing_{i}" for i in range(100)]
    index = Index.open(tmp_path / "out" / "train.index")
    assert list(index.classes) == classes
    assert len(index) == len(raw) // (skip + 3072)
    for row in range(0, len(index), 7):
        record = raw[int(Path(index.name(row)).stem) * (skip + 3072) :][: skip + 3072]
        assert record[skip - 1] == index.label[row]
        with Image.open(index.place(row)[0]) as image:
            pixels = np.asarray(image)
        assert pixels.shape == (32, 32, 3)
        for y, x in ((0, 0), (3, 17), (31, 31)):
            assert tuple(pixels[y, x]) == tuple(record[skip + plane * 1024 + y * 32 + x] for plane in range(3))
    assert len(Index.open(tmp_path / "out" / "val.index")) == (20 if name == "cifar10" else 100)
    capsys.readouterr()
    assert run_import(name, tmp_path / "source", tmp_path / "out") == 0
    assert "nothing to do" in capsys.readouterr().out


def test_wrong_archives_are_named(tmp_path: Path) -> None:
    files, inside = cifar10_files(), "cifar-10-batches-bin"
    label = bytearray(files[f"{inside}/data_batch_2.bin"])
    label[0] = 10
    python = {f"cifar-10-batches-py/{n}": b"\x80" for n in ("batches.meta", "data_batch_1", "test_batch")}
    wrong = {
        "label 10": {**files, f"{inside}/data_batch_2.bin": bytes(label)},
        "whole records": {**files, f"{inside}/test_batch.bin": files[f"{inside}/test_batch.bin"][:-1]},
        "has no data_batch_3.bin": {k: v for k, v in files.items() if "batch_3" not in k},
        "can run code and is never loaded": python,
        "names 9 classes": {**files, f"{inside}/batches.meta.txt": b"\n".join(map(str.encode, CIFAR10_NAMES[:9]))},
        "'../../escaped' is not the name of a class": {
            **files,
            f"{inside}/batches.meta.txt": files[f"{inside}/batches.meta.txt"].replace(b"bird", b"../../escaped"),
        },
        "not allowed": {**files, "../../escaped": b""},
    }
    for number, (reason, content) in enumerate(wrong.items()):
        path = write(tmp_path / "source", "cifar10", content)
        with pytest.raises(DataError) as error:
            run_import("cifar10", path, tmp_path / f"out{number}")
        assert reason in str(error.value)
        assert path.name in str(error.value)
        assert not list((tmp_path / f"out{number}").rglob("*.png"))
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("out")) == ["source"]


def test_the_official_archive_is_told_from_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "source", "cifar10", cifar10_files())
    arguments = ["cifar10", str(path), "--out", str(tmp_path / "out")]
    with pytest.raises(DataError, match="170,052,171 bytes and MD5 c32a1d4ab5d03f1284b67883e8d87530"):
        import_dataset.main(arguments)
    content = path.read_bytes()
    official = Official(path.name, len(content), hashlib.md5(content, usedforsecurity=False).hexdigest())
    layout = replace(_cifar.CIFAR["cifar10"], archive=official)
    monkeypatch.setitem(_cifar.CIFAR, "cifar10", layout)
    with pytest.raises(DataError, match="the official archive"):
        import_dataset.main(arguments)
    monkeypatch.setitem(_cifar.CIFAR, "cifar10", replace(layout, images={"train": 100, "val": 20}))
    assert import_dataset.main(arguments) == 0


def test_wrong_words_on_the_command_line(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="SOURCE"):
        import_dataset.main(["cifar10", *out])
    with pytest.raises(ConfigError, match="SOURCE"):
        import_dataset.main(["imagenet", *out, "--train", "x"])
    with pytest.raises(ConfigError, match="for imagenet"):
        import_dataset.main(["cifar10", "x", *out, "--val", "x"])
    with pytest.raises(ConfigError, match="allow-other-archive is for"):
        import_dataset.main(["folder", "x", *out, "--allow-other-archive"])
    with pytest.raises(ConfigError, match="--workers 0"):
        import_dataset.main(["folder", "x", *out, "--workers", "0"])
    with pytest.raises(DataError, match="the binary version"):
        import_dataset.main(["cifar100", str(tmp_path), *out])
