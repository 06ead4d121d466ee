"""ImageNet from archives in the official formats: the right bytes under the right class, whatever happens."""

import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ii_dist.config import DataError
from ii_dist.data import Index, check_files
from tests.archives import (
    CLASSES,
    DEVKIT_IDS,
    VAL_WNIDS,
    devkit_files,
    make_imagenet,
    tar_bytes,
    train_images,
    val_images,
)
from tools import _imagenet, import_dataset
from tools._archive import Official, list_members

REPOSITORY = Path(__file__).parents[3]
TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_imagenet(tmp_path / "source")


def run_import(source: Path, out: Path, *options: str) -> int:
    return import_dataset.main(["imagenet", str(source), "--out", str(out), "--allow-other-archive", *options])


def all_files(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.JPEG")}


def expected_files() -> dict[str, bytes]:
    files = {f"train/{wnid}/{name}": data for wnid, images in train_images(4).items() for name, data in images.items()}
    truth = zip(VAL_WNIDS, val_images().items(), strict=True)
    return files | {f"val/{wnid}/{name}": data for wnid, (name, data) in truth}


def test_every_image_is_under_its_class_with_its_bytes(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_import(source, out) == 0
    assert all_files(out) == expected_files()
    for split, count in (("train", 12), ("val", 5)):
        index = Index.open(out / f"{split}.index")
        assert len(index) == count
        assert index.classes == CLASSES  # by WordNet id, not by the devkit's numbers
        check_files(index)
        for row in range(count):
            path = Path(index.place(row)[0])
            assert path.parent.name == CLASSES[index.label[row]]
            assert index.sha256[row].tobytes() == hashlib.sha256(path.read_bytes()).digest()
    assert DEVKIT_IDS[CLASSES[0]] != 1


def test_a_second_import_does_nothing_and_needs_no_archive_to_be_read(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run_import(source, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.setattr(_imagenet, "list_members", None)
    assert run_import(source, out) == 0
    assert "complete (17 images); nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def unpacked(source: Path) -> list[str]:
    """The same data as people keep it: inner tars in a folder, a flat validation folder, an unpacked devkit."""
    for name, files in (("ILSVRC2012_img_val", val_images()), (".", devkit_files())):
        for path, content in files.items():
            (source / name / path).parent.mkdir(parents=True, exist_ok=True)
            (source / name / path).write_bytes(content)
    (source / "ILSVRC2012_img_train").mkdir()
    for wnid, images in train_images(4).items():
        (source / "ILSVRC2012_img_train" / f"{wnid}.tar").write_bytes(tar_bytes(images.items()))
    for name in (TRAIN, VAL, DEVKIT):
        (source / name).unlink()
    return []


def kaggle(source: Path) -> list[str]:
    (source / DEVKIT).unlink()
    lines = [f"{Path(name).stem},{wnid} 1 2 3 4 " for name, wnid in zip(val_images(), VAL_WNIDS, strict=True)]
    random.Random(0).shuffle(lines)
    (source / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(lines) + "\n")
    return []


def text(source: Path) -> list[str]:
    (source / DEVKIT).unlink()
    lines = [f"{name} {wnid}\n" for name, wnid in zip(val_images(), VAL_WNIDS, strict=True)]
    (source / "mine.txt").write_text("".join(lines[::-1]) + "\n")
    return ["--val-labels", str(source / "mine.txt")]


@pytest.mark.parametrize("form", [unpacked, kaggle, text])
def test_other_forms_of_the_sources_give_the_same(
    source: Path, tmp_path: Path, form: Callable[[Path], list[str]]
) -> None:
    assert run_import(source, tmp_path / "out", *form(source)) == 0
    assert all_files(tmp_path / "out") == expected_files()


def refused(source: Path, out: Path, *parts: str) -> None:
    with pytest.raises(DataError) as error:
        run_import(source, out)
    said = str(error.value)
    assert said.isprintable(), said
    for part in parts:
        assert part in said
    assert not (out / "train.index").exists()


def test_the_official_archives_are_told_from_others(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ["imagenet", str(source), "--out", str(tmp_path / "out")]
    with pytest.raises(
        DataError, match=r"147,897,477,120 bytes and MD5 1d675b47d978889d74fa0da5fadfb00e.*--allow-other"
    ):
        import_dataset.main(out)
    for constant, name in (("TRAIN", TRAIN), ("VAL", VAL), ("DEVKIT", DEVKIT)):
        content = (source / name).read_bytes()
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        monkeypatch.setattr(_imagenet, constant, Official(name, len(content), md5))
    with pytest.raises(DataError, match=r"3 classes, the official archive 1,000"):
        import_dataset.main(out)
    monkeypatch.setattr(_imagenet, "OFFICIAL_CLASSES", 3)
    with pytest.raises(DataError, match=r"5 images, the official archive 50,000"):
        import_dataset.main(out)
    monkeypatch.setattr(_imagenet, "OFFICIAL_IMAGES", {"train": 12, "val": 5})
    assert import_dataset.main(out) == 0
    flipped = bytearray((source / VAL).read_bytes())
    flipped[3000] ^= 1
    (source / VAL).write_bytes(flipped)
    with pytest.raises(DataError, match=r"has MD5 .* but the official"):
        import_dataset.main([*out[:-1], str(tmp_path / "other")])


def test_a_folder_begun_from_another_source_is_not_mixed(source: Path, tmp_path: Path) -> None:
    run_import(source, tmp_path / "out")
    make_imagenet(source, per_class=9)
    with pytest.raises(DataError, match="another source"):
        run_import(source, tmp_path / "out")


def test_wrong_truth_is_named(source: Path, tmp_path: Path) -> None:
    truth = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
    files = devkit_files()
    meta = files["ILSVRC2012_devkit_t12/data/meta.mat"]
    wrong: list[tuple[dict[str, bytes], str]] = [
        ({truth: b"\n".join(files[truth].split()[1:])}, "ILSVRC2012_val_00000005.JPEG"),
        ({truth: b"1\n2\n3\n1\n77\n"}, "line 5"),
        ({truth: b"1\n2\n3\n1\n4\n"}, "'n00001740', which has no training images"),
        ({truth.replace("validation", "test"): b""}, "has no ILSVRC2012_validation_ground_truth.txt"),
        ({truth: files[truth], "meta.mat": b"not MATLAB" * 30}, "not a MATLAB file"),
        ({truth: files[truth], "meta.mat": meta[:-40]}, "meta.mat"),
        ({truth: files[truth], "../meta.mat": meta}, "not allowed"),
    ]
    for number, (content, reason) in enumerate(wrong):
        content = content if any("meta" in name for name in content) else {**content, "data/meta.mat": meta}
        (source / DEVKIT).write_bytes(tar_bytes(content.items(), "w:gz"))
        refused(source, tmp_path / f"out{number}", DEVKIT, reason)
    (source / DEVKIT).unlink()
    (source / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nILSVRC2012_val_00000001\n")
    refused(source, tmp_path / "csv", "LOC_val_solution.csv", "each line must name")
    (source / "LOC_val_solution.csv").write_text("ILSVRC2012_val_00000001,n01440764 1 2 3 4\n")
    refused(source, tmp_path / "csv2", "says nothing of ILSVRC2012_val_00000002.JPEG")
    (source / "LOC_val_solution.csv").unlink()
    refused(source, tmp_path / "none", "no truth of the validation images", "--val-labels")


def test_archives_that_are_cut_off_or_not_what_they_should_be_are_named(source: Path, tmp_path: Path) -> None:
    train, val = (source / TRAIN).read_bytes(), (source / VAL).read_bytes()
    inner = [(f"{wnid}.tar", tar_bytes(images.items())) for wnid, images in train_images(2).items()]
    third = list_members(source / VAL)[2]
    between = third.offset + -(-third.length // 512) * 512  # where a reader that trusts the archive sees its end
    wrong = [
        (TRAIN, train[: len(train) // 2], "cut off"),
        (VAL, val[:between], "cut off"),
        (VAL, val[: between - 1], "end of data"),
        (TRAIN, b"<html>", "not a tar"),
        (TRAIN, b"", "not a tar"),
        (TRAIN, tar_bytes([]), "holds no tars"),
        (TRAIN, tar_bytes([*inner, ("cats.tar", b"")]), "cats.tar is not the tar of a class"),
        (TRAIN, tar_bytes([*inner, inner[0]]), "holds n01440764 twice"),
        (TRAIN, tar_bytes([(inner[0][0], inner[0][1][:1000]), *inner[1:]]), "cut off"),
        (TRAIN, tar_bytes([(inner[0][0], b"x" * 2048), *inner[1:]]), "n01440764.tar"),
        (TRAIN, tar_bytes([("n01440764.tar", tar_bytes([("a.JPEG", b"1"), ("b/a.JPEG", b"2")])), *inner[1:]]), "twice"),
        (
            TRAIN,
            tar_bytes([*inner[:2], ("n02084071.tar", tar_bytes([("readme.txt", b"1")]))]),
            "not an image by its name",
        ),
        (TRAIN, tar_bytes([*inner[:2], ("n02084071.tar", tar_bytes([("a.JPEG", b"html")]))]), "not an image"),
        (VAL, tar_bytes([]), "holds no images"),
        (VAL, tar_bytes([("notes.txt", b"")]), "not an image by its name"),
    ]
    for number, (name, content, reason) in enumerate(wrong):
        good = (source / name).read_bytes()
        (source / name).write_bytes(content)
        refused(source, tmp_path / f"out{number}", reason)
        (source / name).write_bytes(good)
    (source / VAL).unlink()
    (source / "val" / "n01440764").mkdir(parents=True)
    refused(source, tmp_path / "sorted", "import folder")


def command(source: Path, out: Path) -> list[str]:
    words = ["imagenet", source, "--out", out, "--allow-other-archive", "--workers", "2"]
    return [sys.executable, "-m", "tools.import_dataset", *map(str, words)]


def test_kills_at_many_moments_leave_what_a_later_start_completes(source: Path, tmp_path: Path) -> None:
    """Each start is killed a little later than the one before; files with their names are whole at every moment."""
    make_imagenet(source, per_class=150)
    out, left = tmp_path / "out", []
    whole = {f"{wnid}/{name}": len(d) for wnid, files in train_images(150).items() for name, d in files.items()}
    for goal in (1, 120, 300, 450):
        with subprocess.Popen(command(source, out), cwd=REPOSITORY, stderr=subprocess.DEVNULL) as killed:
            while sum(1 for _ in out.glob("train/*/*.JPEG")) < goal and killed.poll() is None:
                time.sleep(0.001)
            killed.send_signal(signal.SIGKILL)
        files = list(out.glob("train/*/*.JPEG"))
        left.append(len(files))
        assert all(whole[str(f.relative_to(out / "train"))] == f.stat().st_size for f in files)
    assert left[0] < 450
    kept = {path: path.stat().st_mtime_ns for path in out.glob("train/*/*.JPEG")}
    subprocess.run(command(source, out), cwd=REPOSITORY, check=True, capture_output=True)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # none was written twice
    assert run_import(source, tmp_path / "at_once") == 0
    for split in ("train", "val"):
        assert Index.open(out / f"{split}.index").digest == Index.open(tmp_path / "at_once" / f"{split}.index").digest
    assert not list(out.rglob("*.partial"))


def test_files_that_went_missing_or_were_cut_are_written_again(source: Path, tmp_path: Path) -> None:
    """As after a power cut: the import had not come to its index."""
    out = tmp_path / "out"
    run_import(source, out)
    for split in ("train", "val"):
        (out / f"{split}.index").unlink()
    files = sorted(out.glob("*/*/*.JPEG"))
    files[0].unlink()
    files[-1].write_bytes(b"")
    assert run_import(source, out) == 0
    assert all_files(out) == expected_files()


def test_a_file_that_is_not_of_the_archive_is_noticed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_import(source, out)
    (out / "train.index").unlink()
    (out / "train" / CLASSES[0] / "mine.JPEG").write_bytes(next(iter(val_images().values())))
    with pytest.raises(DataError, match="holds 13 images, the source has 12"):
        run_import(source, out)


def test_a_write_that_fails_is_one_line_and_what_is_there_is_kept(source: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the writes themselves fail."""
    big = {f"n01440764_{i}.JPEG": next(iter(val_images().values())) + bytes(20_000 * (i == 3)) for i in range(4)}
    (source / TRAIN).write_bytes(tar_bytes([(f"{wnid}.tar", tar_bytes(big.items())) for wnid in CLASSES]))
    out = tmp_path / "out"
    ended = subprocess.run(
        command(source, out),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    lines = [line for line in ended.stderr.splitlines() if "taken as it is" not in line]
    assert (ended.returncode, len(lines)) == (3, 1), ended.stderr
    assert "File too large" in lines[0]
    assert 3 <= len(list(out.glob("train/*/*.JPEG"))) <= 9
    assert not list(out.rglob("*.partial"))
    assert run_import(source, out) == 0
    assert len(list(out.glob("train/*/*.JPEG"))) == 12


def test_an_import_that_cannot_fit_is_not_begun(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = _imagenet.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(_imagenet.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(source, tmp_path / "out", "the disk has 0.0 GB left")
    assert not (tmp_path / "out" / "train").exists()


def test_two_imports_into_one_folder_are_refused(source: Path, tmp_path: Path) -> None:
    from tools._datasets import claim

    out = tmp_path / "out"
    with claim(out, "imagenet"), pytest.raises(DataError, match="another import"), claim(out, "imagenet"):
        pass
    with claim(out, "imagenet"):
        pass


def test_ctrl_c_ends_soon_and_quietly(source: Path, tmp_path: Path) -> None:
    make_imagenet(source, per_class=400)

    def hear_ctrl_c() -> None:  # the tests themselves may run in the background, where a shell has it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command(source, tmp_path / "out"), cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c
    ) as run:
        while not list((tmp_path / "out").glob("train/*/*.JPEG")):
            assert run.poll() is None
            time.sleep(0.001)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert said.splitlines()[-1] == "interrupted"
    assert "Traceback" not in said
