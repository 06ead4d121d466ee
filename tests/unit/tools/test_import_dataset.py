"""The importers: the right files and indexes, going on after a kill, one line for what is wrong."""

import gzip
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ii_dist.config import ClusterError, ConfigError, DataError
from ii_dist.data import Index, check_files, scan
from tests.images import make_image_folder
from tools import _small_sets, import_dataset, index_dataset

REPOSITORY = Path(__file__).parents[3]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tools.import_dataset", *map(str, arguments)]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "set"
    assert import_dataset.main(["digits", "--out", str(out)]) == 0
    return out


def test_digits_are_all_there_once_and_split_by_class(digits: Path) -> None:
    train, val = Index.open(digits / "train.index"), Index.open(digits / "val.index")
    assert (len(train), len(val)) == (1442, 355)
    assert train.classes == val.classes == tuple("0123456789")
    shares = np.bincount(val.label) / (np.bincount(val.label) + np.bincount(train.label))
    assert (abs(shares - 0.2) < 0.005).all()
    numbers = [Path(index.name(i)).stem for index in (train, val) for i in range(len(index))]
    assert sorted(numbers) == [f"{i:04d}" for i in range(1797)]
    for index in (train, val):
        check_files(index)
        assert set(index.width.tolist()) == set(index.height.tolist()) == {32}


def test_digits_are_scikit_learns(digits: Path) -> None:
    from sklearn.datasets import load_digits

    original = load_digits()
    index = Index.open(digits / "val.index")
    for row in (0, 100, 354):
        number = int(Path(index.name(row)).stem)
        with Image.open(index.place(row)[0]) as image:
            small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float) * 16 / 255
        assert original.target[number] == index.label[row]
        assert np.corrcoef(small.ravel(), original.images[number].ravel())[0, 1] > 0.97


def test_a_second_import_does_nothing(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in digits.rglob("*")}
    assert import_dataset.main(["digits", "--out", str(digits)]) == 0
    assert "complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in digits.rglob("*")} == before


def test_an_import_that_was_killed_goes_on(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    with subprocess.Popen(command("digits", "--out", out), cwd=REPOSITORY, stderr=subprocess.DEVNULL) as killed:
        while not list(out.glob("train/*/*.png")) and killed.poll() is None:
            time.sleep(0.001)
        killed.send_signal(signal.SIGKILL)
    assert not (out / "val.index").exists()
    subprocess.run(command("digits", "--out", out), cwd=REPOSITORY, check=True, capture_output=True)
    for split in ("train", "val"):
        assert Index.open(out / f"{split}.index").digest == Index.open(digits / f"{split}.index").digest


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    code = "import sys; from tools._datasets import Path, write_whole; write_whole(Path(sys.argv[1]), bytes(1 << 29))"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a.jpg")], cwd=REPOSITORY) as killed:
        while not any(path.stat().st_size for path in tmp_path.iterdir()):
            assert killed.poll() is None
        killed.send_signal(signal.SIGKILL)
    assert not (tmp_path / "a.jpg").exists()
    for path in tmp_path.iterdir():
        path.unlink()


def idx(magic: int, values: NDArray[np.uint8]) -> bytes:
    return gzip.compress(np.array([magic, *values.shape], dtype=">u4").tobytes() + values.tobytes())


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two official-looking splits of 30 and 20 images."""
    monkeypatch.setattr(_small_sets, "FASHION_IMAGES", {"train": 30, "val": 20})
    source = tmp_path / "source"
    source.mkdir()
    rng = np.random.Generator(np.random.PCG64(0))
    for prefix, count in (("train", 30), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (source / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx(0x803, images))
        (source / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(0x801, np.arange(count, dtype=np.uint8) % 10))
    return source


def import_fashion(source: Path, out: Path) -> int:
    return import_dataset.main(["fashion-mnist", str(source), "--out", str(out)])


def test_fashion_images_keep_their_pixels_and_labels(fashion: Path, tmp_path: Path) -> None:
    assert import_fashion(fashion, tmp_path / "out") == 0
    index = Index.open(tmp_path / "out" / "train.index")
    assert len(index) == 30
    assert index.classes[9] == "9_ankle_boot"
    pixels = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    for row in range(30):
        number = int(Path(index.name(row)).stem)
        assert index.label[row] == number % 10
        with Image.open(index.place(row)[0]) as image:
            assert np.array_equal(np.asarray(image), pixels[number])


def test_fashion_files_that_are_wrong_are_named(fashion: Path, tmp_path: Path) -> None:
    images, labels = fashion / "train-images-idx3-ubyte.gz", fashion / "train-labels-idx1-ubyte.gz"
    good = {path: path.read_bytes() for path in (images, labels)}
    wrong = {
        "of another data set": (images, idx(0x803, np.zeros((29, 28, 28), np.uint8))),
        "expected [2049, 30]": (labels, idx(0x803, np.zeros(30, np.uint8))),
        "cut off": (images, gzip.compress(gzip.decompress(good[images])[:-1])),
        "cannot be unpacked": (images, good[images][:-100]),
        "Not a gzipped file": (images, b"hello"),
        "label above 9": (labels, idx(0x801, np.full(30, 10, np.uint8))),
    }
    for number, (reason, (path, content)) in enumerate(wrong.items()):
        path.write_bytes(content)
        with pytest.raises(DataError) as error:
            import_fashion(fashion, tmp_path / f"out{number}")
        assert reason in str(error.value)
        assert path.name in str(error.value)
        assert "\n" not in str(error.value)
        assert not (tmp_path / f"out{number}" / "train.index").exists()
        path.write_bytes(good[path])
    images.unlink()
    with pytest.raises(DataError, match="dataset-fashion-mnist"):
        import_fashion(fashion, tmp_path / "out")


def test_a_folder_is_indexed_where_it_lies(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    make_image_folder(source / "train", 2, 3, seed=1)
    make_image_folder(source / "val", 2, 2, seed=2)
    assert import_dataset.main(["folder", str(source), "--out", str(out)]) == 0
    there = Index.open(out / "train.index")
    check_files(there)
    assert Path(there.place(0)[0]).is_relative_to(source)
    assert index_dataset.main([str(source)]) == 0
    here = Index.open(source / "train.index")
    check_files(here)
    assert here.digest == there.digest
    moved = source.rename(tmp_path / "moved")
    check_files(Index.open(moved / "train.index"))  # an index inside its data set moves with it
    with pytest.raises(DataError, match="does not exist"):
        check_files(Index.open(out / "train.index"))


def test_a_second_index_reads_only_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_image_folder(tmp_path / "train", 2, 3, seed=1)
    make_image_folder(tmp_path / "val", 2, 2, seed=2)
    read: list[str] = []
    examine = scan.examine_file
    monkeypatch.setattr(scan, "examine_file", lambda path: (read.append(path.name), examine(path))[1])
    index_dataset.main([str(tmp_path)])
    first = (tmp_path / "train.index").read_bytes()
    assert len(read) == 10
    (tmp_path / "train" / "class_01" / "00001.jpg").rename(tmp_path / "train" / "class_01" / "renamed.jpg")
    index_dataset.main([str(tmp_path)])
    assert read[10:] == ["renamed.jpg"]
    (tmp_path / "train" / "class_01" / "renamed.jpg").rename(tmp_path / "train" / "class_01" / "00001.jpg")
    index_dataset.main([str(tmp_path), "--fresh", "--workers", "1"])
    assert len(read) == 21
    assert (tmp_path / "train.index").read_bytes() == first


def test_a_folder_of_anything_else_is_left_alone(tmp_path: Path, digits: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="not empty"):
        import_dataset.main(["digits", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(DataError, match="already holds digits"):
        import_dataset.main(["fashion-mnist", "--out", str(digits)])


def test_wrong_arguments_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="SOURCE"):
        import_dataset.main(["folder", "--out", str(tmp_path)])
    with pytest.raises(ConfigError, match="takes no source"):
        import_dataset.main(["digits", "somewhere", "--out", str(tmp_path)])
    with pytest.raises(DataError, match="no such folder"):
        index_dataset.main([str(tmp_path)])
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ClusterError, match="pip install scikit-learn"):
        import_dataset.main(["digits", "--out", str(tmp_path / "new")])


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["folder", "/nowhere/at/all", "--out", "{out}"], 3),
        (["folder", "--out", "{out}"], 2),
        (["cats", "--out", "{out}"], 2),
        (["--help"], 0),
    ],
)
def test_the_command_line_ends_with_its_exit_code(arguments: list[str], code: int, tmp_path: Path) -> None:
    ended = subprocess.run(
        command(*(word.format(out=tmp_path / "out") for word in arguments)),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == code
    assert "Traceback" not in ended.stderr
    if code == 3:
        assert ended.stderr.startswith("error: ")
        assert ended.stderr.count("\n") == 1


def test_a_target_that_cannot_be_written_is_one_line() -> None:
    with pytest.raises(DataError, match="/proc"):
        import_dataset.main(["digits", "--out", "/proc/nowhere"])
