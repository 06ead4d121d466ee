"""Packing: the same images in the same order, shards that others read, and an end after any number of kills."""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ii_dist.config import ConfigError, DataConfig, DataError
from ii_dist.data import Batch, Index, Row, build_index, make_eval_source, make_train_source, write_index
from ii_dist.runtime import World
from tests.images import make_data_set, make_image_folder, picture, plan_of, run_config
from tools._packing import plan_shards
from tools._shrink import Shrink
from tools.pack_dataset import main as pack

ROOT = Path(__file__).resolve().parents[3]
CLASSES, PER_CLASS, VAL_PER_CLASS = 5, 24, 5
SIDE = 40
SHRINK = ("--shorter-side", str(SIDE), "--quality", "85")
SMALL_SHARDS = ("--shard-mb", "0.06")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of 97x75, and among them what a real collection has."""
    root = make_data_set(tmp_path_factory.mktemp("images"), CLASSES, PER_CLASS, VAL_PER_CLASS, (97, 75))
    images = root / "train" / "class_03"
    odd = picture(9, 90, 120)
    odd.save(images / "00000.jpg", "PNG")  # in disguise
    odd.convert("CMYK").save(images / "00001.jpg", quality=90)
    odd.convert("L").save(images / "00002.jpg", quality=90)
    odd.resize((SIDE - 1, SIDE + 30)).save(images / "00003.jpg", quality=90)
    odd.resize((SIDE - 1, SIDE + 30)).convert("CMYK").save(images / "00004.jpg", quality=90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    odd.save(images / "00005.jpg", quality=90, exif=exif, icc_profile=b"p" * 200, comment=b"a comment")
    odd.convert("RGBA").save(images / "00006.png")
    rows, names = build_index(root / "train")
    write_index(root / "train.index", rows, names, root="train")
    return root


def packed_into(out: Path, folder: Path, *options: str) -> Path:
    assert pack([str(folder), "--out", str(out), "--workers", "2", *options]) == 0
    return out


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_into(tmp_path_factory.mktemp("packed"), folder, *SMALL_SHARDS)


@pytest.fixture(scope="module")
def shrunk(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_into(tmp_path_factory.mktemp("shrunk"), folder, "--shard-mb", "0.03", *SHRINK)


def files(folder: Path) -> dict[str, str]:
    """Hash of every file; the marker too."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


def samples(folder: Path, split: str) -> list[tuple[str, dict[str, bytes]]]:
    """As webdataset reads them: members in order, grouped by what stands before the first dot."""
    found: list[tuple[str, dict[str, bytes]]] = []
    for shard in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if not found or found[-1][0] != key:
                    found.append((key, {}))
                found[-1][1][suffix] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return found


def test_bytes_and_rows_are_those_of_the_folder_in_the_same_order(folder: Path, packed: Path) -> None:
    for split in ("train", "val"):
        before, after = Index.open(folder / f"{split}.index"), Index.open(packed / f"{split}.index")
        assert len(after.header.shards) > 1
        assert after.classes == before.classes
        for row in range(len(before)):
            assert after.name(row) == before.name(row)
            assert after.read_bytes(row).tobytes() == before.read_bytes(row).tobytes()
        for column in ("label", "width", "height", "length", "sha256"):
            assert np.array_equal(getattr(after, column), getattr(before, column))


def test_any_tar_reader_finds_each_sample_once_with_its_label(folder: Path, packed: Path) -> None:
    index = Index.open(folder / "train.index")
    found = samples(packed, "train")
    assert len({key for key, _ in found}) == len(found) == len(index)
    for key, parts in found:
        row = int(key.removeprefix("train_"))
        suffix = "png" if index.name(row).endswith(".png") else "jpg"
        assert parts == {suffix: index.read_bytes(row).tobytes(), "cls": str(index.label[row]).encode()}


def test_dali_reads_the_shards(packed: Path) -> None:
    from nvidia.dali import Pipeline, fn

    shards = sorted(map(str, packed.glob("train-*.tar")))
    index = Index.open(packed / "train.index")
    pipe = Pipeline(batch_size=len(index), num_threads=1, device_id=None)
    with pipe:
        parts = fn.readers.webdataset(paths=shards, ext=["jpg;png", "cls"], missing_component_behavior="error")
        pipe.set_outputs(*parts)
    pipe.build()
    images, labels = pipe.run()
    for i, (key, _) in enumerate(samples(packed, "train")):
        row = int(key.removeprefix("train_"))
        assert images.at(i).tobytes() == index.read_bytes(row).tobytes()
        assert int(labels.at(i).tobytes()) == index.label[row]


def test_every_stretch_of_a_shard_has_many_classes(packed: Path) -> None:
    labels = [int(parts["cls"]) for _, parts in samples(packed, "train")]
    assert all(len(set(labels[i : i + 15])) >= 4 for i in range(len(labels) - 15))
    sizes = [path.stat().st_size for path in sorted(packed.glob("train-*.tar"))]
    assert max(sizes) < 1.2 * 60_000
    assert min(sizes) > 0.6 * max(sizes)


@pytest.mark.parametrize("source", ["dali", "torch"])
def test_the_loader_makes_the_same_images_of_shards_as_of_files(folder: Path, packed: Path, source: str) -> None:
    def batches(root: Path) -> list[Batch]:
        sizes = {"image_size": 32, "eval_resize": 36, "eval_image_size": 32, "threads_per_rank": 1}
        cfg = DataConfig.model_validate({"source": source, "root": str(root), **sizes})
        plan = plan_of(run_config(cfg, 40), 1, CLASSES * PER_CLASS + 1, CLASSES * VAL_PER_CLASS, CLASSES)
        train = make_train_source(cfg, plan, World(), 3, "cpu", False)
        evaluation = make_eval_source(cfg, plan, World(), 3, "cpu", False, 8)
        found = [*islice(train, 2 * plan.steps_per_epoch), *evaluation]
        train.close()
        evaluation.close()
        return found

    of_files, of_shards = batches(folder), batches(packed)
    assert len(of_files) == len(of_shards) == 10
    for a, b in zip(of_files, of_shards, strict=True):
        for name in ("images_NCHW", "labels_N", "weight_N", "index_N"):
            assert torch.equal(getattr(a, name), getattr(b, name))


def test_images_are_made_smaller_never_larger_and_become_plain_rgb_jpegs(folder: Path, shrunk: Path) -> None:
    before, after = Index.open(folder / "train.index"), Index.open(shrunk / "train.index")
    kept = 0
    for row in range(len(before)):
        with Image.open(io.BytesIO(before.read_bytes(row).tobytes())) as old:
            old.load()
        content = after.read_bytes(row).tobytes()
        with Image.open(io.BytesIO(content)) as new:
            new.load()
        assert (new.format, new.size) == ("JPEG", (int(after.width[row]), int(after.height[row])))
        assert hashlib.sha256(content).digest() == after.sha256[row].tobytes()
        if content == before.read_bytes(row).tobytes():
            kept += 1
            assert min(old.size) <= SIDE
            continue
        assert new.mode == "RGB"
        assert not {"icc_profile", "comment", "exif"} & set(new.info)
        assert min(new.size) == min(SIDE, *old.size)
        assert max(new.size) == round(max(old.size) * min(new.size) / min(old.size))
        by_hand = old.convert("RGB").resize(new.size, Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(new, float) - np.asarray(by_hand, float)).mean() < 8
    assert kept == 1  # the one that was small and of a kind that needs no change
    assert after.label.tolist() == before.label.tolist()
    assert sum(after.length) < 0.7 * sum(before.length)
    sizes = [path.stat().st_size for path in sorted(shrunk.glob("train-*.tar"))]
    assert 0.5 * 30_000 < min(sizes) <= max(sizes) < 1.5 * 30_000  # of which the plan knew nothing but areas


def test_shards_are_planned_by_the_area_that_is_left(tmp_path: Path) -> None:
    write_index(tmp_path / "train.index", [Row(f"{i}", 0, 600, 400, 100_000, bytes(32)) for i in range(100)], ["x"])
    index = Index.open(tmp_path / "train.index")
    for side, image_bytes in ((200, 25_088), (400, 100_352), (999, 100_352)):  # padded to blocks of 512
        plan = plan_shards("train", index, 500_000, Shrink(side, 90), tmp_path)
        total = 100 * (image_bytes + 3 * 512)
        assert sum(shard.about_bytes for shard in plan.shards) == total
        assert len(plan.shards) == -(-total // 500_000)
        assert sorted(row for shard in plan.shards for row in shard.row_N.tolist()) == list(range(100))


def test_the_longer_side_is_rounded_to_the_nearest_pixel() -> None:
    for width in range(1, 200, 3):
        for height in range(1, 200, 7):
            new_width, new_height = Shrink(SIDE, 90).size(width, height)
            scale = min(Fraction(1), Fraction(SIDE, min(width, height)))
            assert abs(new_width - width * scale) <= Fraction(1, 2) >= abs(new_height - height * scale)
            assert min(new_width, new_height) == min(SIDE, width, height)


def test_quality_is_that_asked_for(folder: Path, tmp_path: Path, shrunk: Path) -> None:
    packed_into(tmp_path / "low", folder, "--split", "val", "--shorter-side", str(SIDE), "--quality", "30")
    low, high = Index.open(tmp_path / "low" / "val.index"), Index.open(shrunk / "val.index")
    assert sum(low.length) < 0.8 * sum(high.length)
    with Image.open(io.BytesIO(high.read_bytes(0).tobytes())) as image, io.BytesIO() as buffer:
        picture(0, 8, 8).save(buffer, "JPEG", quality=85)
        assert image.quantization == Image.open(buffer).quantization  # type: ignore[attr-defined]


def test_a_file_that_cannot_be_decoded_is_packed_as_it_is_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_data_set(tmp_path / "set", 2, 6, 2, (97, 75))
    bad = root / "train" / "class_01" / "00002.jpg"
    bad.write_bytes(bad.read_bytes()[:700])
    rows, names = build_index(root / "train")
    write_index(root / "train.index", rows, names, root="train")
    packed_into(tmp_path / "out", root, *SHRINK)
    after = Index.open(tmp_path / "out" / "train.index")
    assert after.read_bytes(8).tobytes() == bad.read_bytes()
    assert (after.width[8], after.height[8]) == (rows[8].width, rows[8].height)
    said = capsys.readouterr().err
    assert "cannot be decoded" in said
    assert "class_01/00002.jpg" in said


def test_the_same_input_and_options_give_the_same_bytes(
    folder: Path, packed: Path, shrunk: Path, tmp_path: Path
) -> None:
    packed_into(tmp_path / "a", folder, *SMALL_SHARDS, "--workers", "1")
    assert files(tmp_path / "a") == files(packed)
    packed_into(tmp_path / "b", folder, "--shard-mb", "0.03", *SHRINK, "--workers", "5")
    assert files(tmp_path / "b") == files(shrunk)
    assert not any(p.name.startswith(".") for p in packed.iterdir())


def test_shards_can_be_packed_again_from_shards(packed: Path, shrunk: Path, tmp_path: Path) -> None:
    packed_into(tmp_path / "out", packed, "--shard-mb", "0.03", *SHRINK)
    assert {n: h for n, h in files(tmp_path / "out").items() if n != "dataset.json"} == {
        n: h for n, h in files(shrunk).items() if n != "dataset.json"
    }


def test_splits_may_come_one_by_one_and_a_finished_one_is_left_alone(
    folder: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = packed_into(tmp_path / "out", folder, *SMALL_SHARDS, "--split", "val")
    assert not list(out.glob("train*"))
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("val*")}
    packed_into(out, folder, *SMALL_SHARDS)
    assert files(out) == files(packed)
    capsys.readouterr()
    packed_into(out, folder, *SMALL_SHARDS)
    assert capsys.readouterr().out.count("nothing to do") == 2
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("val*")} == times


def test_a_lost_shard_is_made_again(folder: Path, packed: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(packed, tmp_path / "out"))
    (out / "train-000001.tar").unlink()
    packed_into(out, folder, *SMALL_SHARDS)
    assert files(out) == files(packed)


def test_after_a_kill_whole_shards_stay_and_the_rest_is_made(tmp_path: Path) -> None:
    images = make_image_folder(tmp_path / "set" / "train", 4, 40, (300, 220))
    rows, names = build_index(images)
    write_index(tmp_path / "set" / "train.index", rows, names, root="train")
    options = ("--split", "train", "--shard-mb", "0.05", "--shorter-side", "200", "--workers", "2")
    expected = files(packed_into(tmp_path / "whole", tmp_path / "set", *options))
    out = tmp_path / "out"
    kills = 0
    for wanted in (2, 8):
        command = [sys.executable, "-m", "tools.pack_dataset", str(tmp_path / "set"), "--out", str(out), *options]
        program = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while program.poll() is None and len(list((out / ".packing").glob("*.json"))) < wanted:
            time.sleep(0.002)
        program.send_signal(signal.SIGKILL)
        program.communicate()
        kills += program.returncode == -signal.SIGKILL
        assert not (out / "train.index").exists()
    assert kills == 2
    (out / ".train-000099.tar.partial").write_bytes(b"of a killed one")
    noted = [out / path.stem for path in (out / ".packing").glob("*.json")]
    inodes = {path.name: path.stat().st_ino for path in noted}
    assert 8 <= len(inodes) < len(list((tmp_path / "whole").glob("*.tar")))
    again = packed_into(out, tmp_path / "set", *options)
    assert files(again) == expected
    assert {name: (out / name).stat().st_ino for name in inodes} == inodes


def test_a_torn_note_or_shard_is_made_again(folder: Path, packed: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(packed, tmp_path / "out"))
    for path in out.glob("*.index"):
        path.unlink()
    notes = out / ".packing"
    notes.mkdir()
    (notes / "train-000000.tar.json").write_text('{"bytes": 1')
    note = {"bytes": (out / "train-000001.tar").stat().st_size + 1, "places": [], "unreadable": []}
    (notes / "train-000001.tar.json").write_text(json.dumps(note))
    packed_into(out, folder, *SMALL_SHARDS)
    assert files(out) == files(packed)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--shard-mb", "0.07"), "--shard-mb 0.06, not 0.07"),
        ((*SMALL_SHARDS, "--shorter-side", "40"), "--shorter-side 0, not 40"),
    ],
)
def test_other_options_are_refused(folder: Path, packed: Path, options: tuple[str, ...], part: str) -> None:
    with pytest.raises(DataError, match=re.escape(part)):
        packed_into(packed, folder, *options)


def test_other_data_sets_and_folders_are_refused(folder: Path, packed: Path, tmp_path: Path) -> None:
    other = make_data_set(tmp_path / "other", CLASSES, 2, 2, (20, 20))
    with pytest.raises(DataError, match=r"another train\.index"):
        packed_into(packed, other, *SMALL_SHARDS)
    with pytest.raises(DataError, match="the images themselves"):
        packed_into(folder, folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("x")
    with pytest.raises(DataError, match="is not empty"):
        packed_into(tmp_path / "mine", other)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["diary.txt"]
    (tmp_path / "mine" / "dataset.json").write_text('{"name": "digits"}')
    with pytest.raises(DataError, match="another data set"):
        packed_into(tmp_path / "mine", other)
    with pytest.raises(DataError, match="no such index"):
        packed_into(tmp_path / "new", tmp_path / "nowhere")
    assert not (tmp_path / "new").exists()


def test_a_file_that_is_not_what_the_index_says_stops_the_packing(tmp_path: Path) -> None:
    root = make_data_set(tmp_path / "set", 2, 6, 2, (97, 75))
    changed = root / "train" / "class_00" / "00003.jpg"
    content = bytearray(changed.read_bytes())
    content[-10] ^= 1
    changed.write_bytes(content)
    with pytest.raises(DataError, match="sha256 differs") as error:
        packed_into(tmp_path / "out", root)
    assert str(changed) in str(error.value)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".packing", "dataset.json"]


def test_too_little_space_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    row = Row("nowhere.jpg", 0, 8, 8, 1 << 30, bytes(32))
    write_index(tmp_path / "val.index", [row] * (shutil.disk_usage(tmp_path).free // row.length + 1000), ["x"])
    with pytest.raises(DataError, match=r"the shards need about [\d,]+\.\d GB, [\d,]+\.\d GB are free"):
        packed_into(tmp_path / "out", tmp_path, "--split", "val")


def test_two_packings_in_one_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "out").mkdir()
    lock = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another packing is at work"):
        packed_into(tmp_path / "out", folder)
    os.close(lock)


def test_progress_tells_rate_and_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from tools import pack_dataset
    from tools._packing import Tally

    now = [100.0]
    monkeypatch.setattr(pack_dataset.time, "monotonic", lambda: now[0])
    tally = Tally()
    line = pack_dataset.RateLine("train", 1000, 10_000, tally)
    line()
    assert capsys.readouterr().err == ""  # too early
    tally.images, tally.read_bytes = 500, 50_000_000
    now[0] += 10
    line()
    assert capsys.readouterr().err == "train: 1,500 of 10,000 images, 50 images/s, 5.0 MB/s, 2 min 50 s left\n"
    tally.images = 9000
    now[0] += 5
    line()
    assert capsys.readouterr().err == ""
    line(last=True)
    assert "10,000 of 10,000" in (said := capsys.readouterr().err)
    assert "left" not in said


@pytest.mark.parametrize(
    "options",
    [("--quality", "80"), ("--shard-mb", "0"), ("--workers", "0"), ("--shorter-side", "9", "--quality", "99")],
)
def test_senseless_options_are_refused(folder: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=f"^{options[-2]}"):
        packed_into(tmp_path / "out", folder, *options)
