"""The index file: readable by others, whole or not there, and clear about what is wrong."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ii_dist.config import DataError, read_index_header
from ii_dist.data import Index, Row, build_index, check_files, write_index
from tests.images import make_image_folder, picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_image_folder(tmp_path / "train", classes=2, per_class=3)


@pytest.fixture
def index_path(folder: Path) -> Path:
    rows, classes = build_index(folder)
    path = folder.parent / "train.index"
    write_index(path, rows, classes, root="train")
    return path


def one_line(error: pytest.ExceptionInfo[DataError], *parts: object) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert str(part) in text


def test_index_says_what_the_folder_holds(folder: Path, index_path: Path) -> None:
    index = Index.open(index_path)
    files = sorted(folder.rglob("*.jpg"))
    assert len(index) == 6
    assert index.classes == ("class_00", "class_01")
    assert index.label.tolist() == [0, 0, 0, 1, 1, 1]
    for row, path in enumerate(files):
        content = path.read_bytes()
        assert Path(index.place(row)[0]) == path
        assert index.read_bytes(row).tobytes() == content
        assert index.sha256[row].tobytes() == hashlib.sha256(content).digest()
        assert (index.width[row], index.height[row]) == (60 + row % 5, 44 + row % 3)
    check_files(index)


def test_any_safetensors_reader_opens_it(index_path: Path) -> None:
    columns = load_file(index_path)
    index = Index.open(index_path)
    assert columns["label"].tolist() == index.label.tolist()
    assert columns["sha256"].shape == (6, 32)
    names = columns["path_bytes"].tobytes()
    first, last = columns["path_offsets"][4:6]
    assert names[first:last].decode() == index.name(4) == "class_01/00001.jpg"


def test_columns_are_views_of_the_file(index_path: Path) -> None:
    index = Index.open(index_path)
    assert not index.label.flags.writeable
    assert not index.label.flags.owndata
    assert index.length.ctypes.data % 8 == 0


def test_header_is_read_without_numpy(index_path: Path) -> None:
    header = read_index_header(index_path)
    assert (header.images, header.classes, header.root) == (6, ("class_00", "class_01"), "train")
    code = (
        "import sys; from ii_dist.config.index_header import read_index_header as read\n"
        f"assert read({str(index_path)!r}).images == 6; assert not {{'numpy', 'torch'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_digest_stands_for_the_content_not_for_its_place(folder: Path, tmp_path: Path) -> None:
    rows, classes = build_index(folder)
    digest = write_index(tmp_path / "a.index", rows, classes, root="train")
    assert write_index(tmp_path / "b.index", rows, classes, root=str(folder)) == digest
    assert Index.open(tmp_path / "b.index").digest == digest
    (folder / "class_00" / "00000.jpg").write_bytes((folder / "class_00" / "00001.jpg").read_bytes())
    assert write_index(tmp_path / "c.index", build_index(folder)[0], classes) != digest
    assert write_index(tmp_path / "d.index", rows, classes[::-1]) != digest


def test_images_in_a_shard_are_read_by_offset(tmp_path: Path) -> None:
    (tmp_path / "shard-0.bin").write_bytes(b"head" + b"first!" + b"second")
    rows = [
        Row("a", 0, 1, 1, length=6, sha256=bytes(32), shard=0, offset=4),
        Row("b", 0, 1, 1, length=6, sha256=bytes(32), shard=0, offset=10),
    ]
    write_index(tmp_path / "train.index", rows, ["only"], shards=["shard-0.bin"])
    index = Index.open(tmp_path / "train.index")
    assert [index.read_bytes(i).tobytes() for i in (0, 1)] == [b"first!", b"second"]


def test_a_failed_write_leaves_the_old_index(index_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = index_path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError) as error:
        write_index(index_path, [Row("x", 0, 1, 1, 1, bytes(32))], ["x"])
    one_line(error, index_path, "No space left")
    assert index_path.read_bytes() == before
    assert [p.name for p in index_path.parent.iterdir() if "partial" in p.name] == []


def test_missing_and_garbage_files_are_named(tmp_path: Path) -> None:
    contents = {
        "short": b"abc",
        "empty": b"",
        "text": b"once upon a time there was no index" * 10,
        "not_json": (8).to_bytes(8, "little") + b"notjson!" + bytes(64),
        "list": (8).to_bytes(8, "little") + b"[1,2,3] ",
        "other": (2).to_bytes(8, "little") + b"{}",
        "strange": header_file({"__metadata__": {"format": "ii_dist.index", "version": "1", "images": "many"}}),
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}.index"
        path.write_bytes(content)
        with pytest.raises(DataError) as error:
            Index.open(path)
        one_line(error, path)
    for path, reason in ((tmp_path / "none.index", "no such index"), (tmp_path, "cannot read")):
        with pytest.raises(DataError) as error:
            Index.open(path)
        one_line(error, path, reason)


def header_file(header: dict[str, object]) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def test_another_format_or_version_is_named(index_path: Path) -> None:
    content = index_path.read_bytes()
    for old, new, part in (
        (b'"version": "1"', b'"version": "9"', "version '9'"),
        (b'"format": "ii_dist.index"', b'"format": "ii_dist.onion"', "ii_dist.onion"),
    ):
        index_path.write_bytes(content.replace(old, new))
        with pytest.raises(DataError) as error:
            Index.open(index_path)
        one_line(error, index_path, part)


def test_a_cut_off_index_is_refused_wherever_it_is_cut(index_path: Path) -> None:
    content = index_path.read_bytes()
    for length in range(0, len(content), 37):
        index_path.write_bytes(content[:length])
        with pytest.raises(DataError) as error:
            Index.open(index_path)
        one_line(error, index_path)


def test_columns_that_disagree_with_the_layout_are_refused(index_path: Path) -> None:
    content = index_path.read_bytes()
    for old, new in (
        (b'"label": {"dtype": "I32"', b'"label": {"dtype": "F32"'),
        (b'"label": {', b'"lapel": {'),
        (b'"images": "6"', b'"images": "5"'),
    ):
        index_path.write_bytes(content.replace(old, new))
        with pytest.raises(DataError) as error:
            Index.open(index_path)
        one_line(error, index_path, "damaged")


def test_a_label_out_of_range_names_the_image(tmp_path: Path) -> None:
    for label in (2, -1):
        rows = [Row("a.jpg", 0, 1, 1, 1, bytes(32)), Row("b.jpg", label, 1, 1, 1, bytes(32))]
        write_index(tmp_path / "train.index", rows, ["x", "y"])
        with pytest.raises(DataError) as error:
            Index.open(tmp_path / "train.index")
        one_line(error, "train.index", f"label {label}", "b.jpg", "2 classes")


def test_an_empty_index_is_refused(tmp_path: Path, index_path: Path) -> None:
    with pytest.raises(DataError) as error:
        write_index(tmp_path / "none.index", [], ["x"])
    one_line(error, "none.index", "no images")
    assert not (tmp_path / "none.index").exists()
    index_path.write_bytes(index_path.read_bytes().replace(b'"images": "6"', b'"images": "0"'))
    with pytest.raises(DataError) as error:
        Index.open(index_path)
    one_line(error, index_path, "empty")


def test_missing_changed_and_grown_files_are_named_with_the_index(folder: Path, index_path: Path) -> None:
    index = Index.open(index_path)
    first, second, third = sorted(folder.rglob("*.jpg"))[:3]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    third.write_bytes(third.read_bytes() + b"x")
    for row, path in enumerate((first, second, third)):
        with pytest.raises(DataError) as error:
            index.read_bytes(row)
        one_line(error, path, index_path)
    with pytest.raises(DataError) as error:
        check_files(index)
    one_line(error, first, index_path, "1 of 6")
    check_files(index, part=1, parts=2)  # the other rank's half is whole


def test_a_large_index_is_sampled_over_its_whole_length(tmp_path: Path) -> None:
    rows = [Row(f"{i}.jpg", 0, 1, 1, 1, bytes(32)) for i in range(5000)]
    write_index(tmp_path / "train.index", rows, ["x"])
    index = Index.open(tmp_path / "train.index")
    with pytest.raises(DataError) as error:
        check_files(index)
    one_line(error, "0.jpg", "1667 of 1667")


def test_folders_that_cannot_be_indexed_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts" / "a").mkdir(parents=True)
    (tmp_path / "texts" / "a" / "readme.txt").write_text("hello")
    (tmp_path / "flat").mkdir()
    picture(0, 8, 8).save(tmp_path / "flat" / "a.png")
    for name, reason in (
        ("none", "No such"),
        ("empty", "no class folders"),
        ("texts", "no images"),
        ("flat", "no class"),
    ):
        with pytest.raises(DataError) as error:
            build_index(tmp_path / name)
        one_line(error, tmp_path / name, reason)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", bytes(100)])
def test_a_file_that_is_no_image_is_named(folder: Path, content: bytes) -> None:
    bad = folder / "class_01" / "00001.jpg"
    bad.write_bytes(content)
    with pytest.raises(DataError) as error:
        build_index(folder)
    one_line(error, bad, "not an image")


def test_a_class_without_images_is_named(folder: Path) -> None:
    (folder / "class_02").mkdir()
    with pytest.raises(DataError) as error:
        build_index(folder)
    one_line(error, folder / "class_02", "without images")


def test_validation_labels_are_those_of_training(folder: Path, tmp_path: Path) -> None:
    val = make_image_folder(tmp_path / "val", classes=1, per_class=2)
    (val / "class_00").rename(val / "class_01")
    rows, classes = build_index(val, ("class_00", "class_01"))
    assert ([row.label for row in rows], classes) == ([1, 1], ("class_00", "class_01"))
    with pytest.raises(DataError) as error:
        build_index(val, ("class_00",))
    one_line(error, val / "class_01", "no class")


def test_progress_counts_to_the_end(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    build_index(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]


def test_hidden_and_other_files_are_left_out(folder: Path) -> None:
    (folder / ".cache").mkdir()
    (folder / "class_00" / ".hidden.jpg").write_bytes(b"x")
    (folder / "class_00" / "notes.txt").write_text("x")
    (folder / "class_00" / "deeper").mkdir()
    picture(1, 9, 7).save(folder / "class_00" / "deeper" / "UPPER.PNG")
    rows, _ = build_index(folder)
    assert "class_00/deeper/UPPER.PNG" in [row.path for row in rows]
    assert len(rows) == 7
    assert np.array([row.width for row in rows if "UPPER" in row.path]) == [9]
