"""tools.scan_dataset on one file of each kind; the index obeys its list."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ii_dist.config import DataError
from ii_dist.config.errors import EXIT_DATA, EXIT_DONE
from ii_dist.data import Index, build_index, write_index
from tests.bad_images import bad_files, odd_files, with_header
from tests.images import make_data_set, make_image_folder
from tools import _scan_work
from tools.index_dataset import main as index_dataset
from tools.scan_dataset import main as scan_dataset

ROOT = Path(__file__).parents[3]
PLAIN = ("--no-picture", "--workers", "2")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """27 train and 6 val images, both indexed; then one file more of each kind."""
    root = make_data_set(tmp_path / "set", 3, 9, 2, (50, 40))
    for name, content in (bad_files() | odd_files()).items():
        (root / "train" / "class_01" / f"{name.replace(' ', '_')}.jpg").write_bytes(content)
    return root


def scanned(capsys: pytest.CaptureFixture[str], root: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = scan_dataset([str(root), *(arguments or PLAIN), "--json"])
    tree: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, tree


def example(kind: str) -> str:
    return f"train/class_01/{kind.replace(' ', '_')}.jpg"


def test_each_kind_is_found_and_graded(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, tree = scanned(capsys, root)
    assert code == EXIT_DATA
    assert tree["images"] == {"train": 27 + len(bad_files()) + len(odd_files()), "val": 6}
    found = {name: kind["examples"] for name, kind in tree["kinds"].items() if kind["grade"] in ("bad", "harmless")}
    assert found == {name: [example(name)] for name in bad_files() | odd_files()}
    assert all(tree["kinds"][name]["grade"] == "bad" for name in bad_files())
    assert all(tree["kinds"][name]["grade"] == "harmless" for name in odd_files())
    assert tree["kinds"]["not indexed"]["count"] == len(bad_files()) + len(odd_files())
    entries = [json.loads(line) for line in (root / "quarantine.jsonl").read_text().splitlines()]
    assert {f"train/{entry['path']}" for entry in entries} == {example(name) for name in bad_files()}


def test_a_bomb_is_never_decoded(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[int, int]] = []
    real = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda self: loaded.append(self.size) or real(self))
    jpeg = (root / "val/class_00/00000.jpg").read_bytes()
    (root / "train/class_00/other.jpg").write_bytes(with_header(jpeg, 10000, 9500))  # Pillow would only warn of it
    _, tree = scanned(capsys, root)
    assert tree["kinds"]["bomb"]["count"] == 2
    assert loaded
    assert max(width * height for width, height in loaded) < 10_000


def test_the_index_leaves_out_what_is_listed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"cannot be indexed .*tools\.scan_dataset"):
        index_dataset([str(root)])
    scanned(capsys, root)
    assert index_dataset([str(root)]) == EXIT_DONE
    index = Index.open(root / "train.index")
    names = {index.name(row) for row in range(len(index))}
    assert len(names) == 27 + len(odd_files())
    assert not {f"train/{name}" for name in names} & {example(name) for name in bad_files()}
    code, tree = scanned(capsys, root)
    assert (code, tree["bad"], tree["wrong"]) == (EXIT_DATA, len(bad_files()), 0)
    for name in bad_files():  # a good copy takes the place of each
        (root / example(name)).write_bytes((root / "val/class_00/00000.jpg").read_bytes())
    assert index_dataset([str(root)]) == EXIT_DONE
    assert len(Index.open(root / "train.index")) == 27 + len(odd_files()) + len(bad_files())
    code, tree = scanned(capsys, root)
    assert code == EXIT_DONE
    assert not (root / "quarantine.jsonl").exists()


def test_a_list_from_elsewhere_is_obeyed(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = tmp_path / "mine.jsonl"
    scanned(capsys, root, *PLAIN, "--out", str(listed))
    assert not (root / "quarantine.jsonl").exists()
    with listed.open("a") as file:  # as a run lists a file that it could not reach
        file.write(json.dumps({"split": "val", "path": "class_00/00001.jpg", "sha256": None, "reason": "EIO"}) + "\n")
    assert index_dataset([str(root), "--quarantine", str(listed)]) == EXIT_DONE
    assert (len(Index.open(root / "train.index")), len(Index.open(root / "val.index"))) == (27 + len(odd_files()), 5)


def test_what_a_run_listed_stays_listed_while_its_bytes_do(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = "class_00/00002.jpg"
    row = next(row for row in range(27) if Index.open(root / "train.index").name(row) == good)
    digest = Index.open(root / "train.index").sha256[row].tobytes().hex()
    line = json.dumps({"split": "train", "path": good, "sha256": digest, "reason": "DALI refuses it", "row": row})
    (root / "quarantine.jsonl").write_text(line + "\n")
    _, tree = scanned(capsys, root)
    assert tree["kinds"]["listed"]["examples"] == [f"train/{good}"]
    assert any(json.loads(each)["path"] == good for each in (root / "quarantine.jsonl").read_text().splitlines())


def test_twins_classes_and_the_index_are_looked_at(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = root / "train", root / "val"
    content = (train / "class_00/00003.jpg").read_bytes()
    for twin in (train / "class_00/twin.jpg", train / "class_02/twin.jpg", val / "class_00/twin.jpg"):
        twin.write_bytes(content)
    (train / "class_03").mkdir()
    (val / "dogs").mkdir()
    make_image_folder(val, 1, 1).joinpath("class_00/00000.jpg").rename(val / "dogs/1.jpg")
    (train / "class_02/00001.jpg").unlink()
    (train / "class_02/00002.jpg").write_bytes((train / "class_02/00004.jpg").read_bytes() + b"more")
    (train / "class_02/words.txt").write_text("words")
    _, tree = scanned(capsys, root)
    kinds = {name: kind["examples"][0] for name, kind in tree["kinds"].items() if kind["grade"] in ("wrong", "look")}
    assert kinds == {
        "changed": "train/class_02/00002.jpg",
        "missing": "train/class_02/00001.jpg",
        "empty class": "train/class_03",
        "unknown class": "val/dogs",
        "same in two classes": "train/class_02/twin.jpg",
        "same in train and val": "val/class_00/twin.jpg",
        "same in one class": "train/class_00/twin.jpg",
        "not indexed": kinds["not indexed"],
        "other name": "train/class_02/words.txt",
    }


def test_an_index_without_folders_is_scanned_through_it(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for split in ("train", "val"):
        rows, classes = build_index(make_image_folder(tmp_path / "other" / split, 3, 4))
        write_index(elsewhere / f"{split}.index", rows, classes, root=str(tmp_path / "other" / split))
    spoiled = tmp_path / "other/train/class_01/00002.jpg"
    spoiled.write_bytes(b"<html>".ljust(spoiled.stat().st_size))
    (tmp_path / "other/train/class_01/00003.jpg").write_bytes(b"short")
    code, tree = scanned(capsys, elsewhere)
    assert code == EXIT_DATA
    assert tree["images"] == {"train": 12, "val": 12}
    assert tree["kinds"]["text"]["examples"] == ["train/class_01/00002.jpg"]
    assert tree["kinds"]["changed"]["count"] == 2


def test_labels_out_of_range_are_found(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "train.index"
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + header_bytes])
    at = 8 + header_bytes + header["label"]["data_offsets"][0] + 4 * 5
    content = bytearray(path.read_bytes())
    content[at : at + 4] = (77).to_bytes(4, "little")
    path.write_bytes(content)
    code, tree = scanned(capsys, root)
    assert code == EXIT_DATA
    assert tree["kinds"]["bad index"]["examples"] == ["train/train.index"]
    assert scan_dataset([str(root), *PLAIN]) == EXIT_DATA
    assert "label 77" in capsys.readouterr().out


def test_the_table_and_the_picture(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scan_dataset([str(root)]) == EXIT_DATA
    said = capsys.readouterr().out
    assert "train/class_01/exif_turn.jpg (orientation 6)" in said
    assert f"python -m tools.index_dataset {root} --quarantine {root}/quarantine.jsonl" in said
    with Image.open(root / "scan.png") as picture:
        assert picture.size == (1500, 960)
        assert len(picture.convert("RGB").getcolors(10**6) or ()) > 50


def test_a_clean_data_set_ends_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_data_set(tmp_path, 2, 3, 2, (50, 40))
    assert scan_dataset([str(root), *PLAIN]) == EXIT_DONE
    assert capsys.readouterr().out.endswith("nothing bad\n")
    assert sorted(path.name for path in root.iterdir()) == ["train", "train.index", "val", "val.index"]
    with pytest.raises(DataError, match="neither folders nor indexes"):
        scan_dataset([str(tmp_path / "train"), *PLAIN])


def test_a_killed_scan_goes_on_and_looks_at_the_rest_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "set"
    make_image_folder(root / "train", 2, 150, (300, 200))
    (root / "train/class_00/bad.jpg").write_bytes(b"<html>")
    journal = root / ".quarantine.jsonl.scan"
    command = [sys.executable, "-m", "tools.scan_dataset", str(root), "--no-picture", "--workers", "1"]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        deadline_s = time.monotonic() + 60
        while not journal.exists() or journal.read_bytes().count(b"\n") < 40:
            assert time.monotonic() < deadline_s
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    known = journal.read_bytes().count(b"\n")
    assert known < 301
    with journal.open("ab") as file:
        file.write(b'["train", "class_00/00')  # torn
    changed = root / "train" / json.loads(journal.read_bytes().split(b"\n")[0])[1]
    changed.write_bytes(b"GIF89a changed since")
    looked_at: list[int] = []
    real = _scan_work.look_at
    monkeypatch.setattr(_scan_work, "look_at", lambda content, suffix: looked_at.append(1) or real(content, suffix))
    code, tree = scanned(capsys, root)
    assert len(looked_at) == 301 - known + 1
    assert code == EXIT_DATA
    assert tree["images"] == {"train": 301}
    assert {name: kind["count"] for name, kind in tree["kinds"].items()} == {"text": 1, "gif": 1}
    assert not journal.exists()
