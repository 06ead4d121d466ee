"""Tar shards: what is written opens everywhere, and what is read by offset is right, whoever reads at the same time."""

import errno
import io
import os
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from ii_dist.config import DataError
from ii_dist.data import Index, Row, check_files, write_index
from ii_dist.data.shard_reader import ShardReader
from ii_dist.data.shards import ShardWriter, image_suffix, sample_bytes, shard_name

SHARDS, PER_SHARD = 6, 5


def content(number: int) -> bytes:
    """Anything, of another length each time; shorter, equal to and longer than a block of tar."""
    rng = np.random.Generator(np.random.PCG64(number))
    return rng.bytes((1, 511, 512, 513, 5000)[number % 5] + 512 * (number % 3))


def write_shard(path: Path, first: int) -> list[int]:
    with ShardWriter(path) as shard:
        return [
            shard.add(f"train_{i:09d}", "jpg", np.frombuffer(content(i), np.uint8), i * 7)
            for i in range(first, first + PER_SHARD)
        ]


@pytest.fixture
def index(tmp_path: Path) -> Index:
    rows = []
    for shard in range(SHARDS):
        offsets = write_shard(tmp_path / shard_name("train", shard), shard * PER_SHARD)
        for i, offset in enumerate(offsets, start=shard * PER_SHARD):
            rows.append(Row(f"a/{i}.jpg", 0, 1, 1, len(content(i)), bytes(32), shard, offset))
    names = [shard_name("train", shard) for shard in range(SHARDS)]
    sizes = [(tmp_path / name).stat().st_size for name in names]
    write_index(tmp_path / "train.index", rows, ["x"], shards=names, shard_bytes=sizes)
    return Index.open(tmp_path / "train.index")


def open_shards(folder: Path) -> list[str]:
    """Shards of `folder` that this process holds open; a replaced one is called "... (deleted)" by the system."""
    links = list(Path("/proc/self/fd").iterdir())
    found = [str(link.readlink()) for link in links if link.is_symlink()]
    return sorted(Path(path).name for path in found if path.startswith(f"{folder}/train-"))


def one_line(error: pytest.ExceptionInfo[DataError], *parts: object) -> None:
    assert "\n" not in str(error.value)
    for part in parts:
        assert str(part) in str(error.value)


def test_tarfile_reads_a_shard_and_offsets_point_at_the_images(tmp_path: Path) -> None:
    offsets = write_shard(tmp_path / "a.tar", 0)
    raw = (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar", "r:") as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == [f"train_{i:09d}.{s}" for i in range(PER_SHARD) for s in ("jpg", "cls")]
        for i, offset in enumerate(offsets):
            image, label = members[2 * i], members[2 * i + 1]
            assert tar.extractfile(image).read() == content(i) == raw[offset : offset + len(content(i))]  # type: ignore[union-attr]
            assert int(tar.extractfile(label).read()) == i * 7  # type: ignore[union-attr]
            assert (image.mtime, image.uid, image.gid, image.uname, image.mode) == (0, 0, 0, "", 0o644)
    sizes = np.array([len(content(i)) for i in range(PER_SHARD)])
    assert len(raw) == sample_bytes(sizes).sum() + 1024
    assert raw[-1024:] == bytes(1024)


def test_the_same_samples_give_the_same_bytes_as_tarfile_does(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", 3)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(3, 3 + PER_SHARD):
            for name, part in ((f"train_{i:09d}.jpg", content(i)), (f"train_{i:09d}.cls", str(i * 7).encode())):
                about = tarfile.TarInfo(name)
                about.size = len(part)
                tar.addfile(about, io.BytesIO(part))
    ours, theirs = (tmp_path / "a.tar").read_bytes(), buffer.getvalue()
    assert theirs.startswith(ours)
    assert not any(theirs[len(ours) :])  # tarfile fills up with zeros to a record of a tape


def test_a_shard_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fails() -> None:
        with ShardWriter(tmp_path / "a.tar") as shard:
            shard.add("k", "jpg", np.zeros(10, np.uint8), 1)
            assert not (tmp_path / "a.tar").exists()
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fails()
    assert list(tmp_path.iterdir()) == []


def test_suffixes_say_what_the_source_said() -> None:
    names = ("n01/a.JPEG", "a.jpg", "a.b.Png", "a", "a.", "d.x/a", "a.p/g")
    assert [image_suffix(name) for name in names] == ["jpg", "jpg", "png", "jpg", "jpg", "jpg", "jpg"]


def test_images_come_from_their_shards_and_shards_stay_open(index: Index) -> None:
    for _ in range(2):
        for row in range(len(index)):
            assert index.read_bytes(row).tobytes() == content(row)
    assert open_shards(index.folder) == sorted(index.header.shards)
    assert Path(index.place(7)[0]).name == "train-000001.tar"
    assert index.told(7) == f"{index.folder}/train-000001.tar (a/7.jpg)"


def test_few_shards_stay_open_and_the_least_used_goes_first(index: Index) -> None:
    reader = ShardReader(str(index.folder), index.header.shards, index.header.shard_bytes, most_open=2)
    buffer = memoryview(bytearray(1))
    for shard in (0, 1, 0, 2):
        assert reader.read(shard, 0, buffer) == 1
    assert open_shards(index.folder) == ["train-000000.tar", "train-000002.tar"]
    del reader
    assert open_shards(index.folder) == []


def test_threads_that_push_each_others_shards_out_read_what_they_asked_for(index: Index) -> None:
    index.shards = ShardReader(str(index.folder), index.header.shards, index.header.shard_bytes, most_open=1)
    wrong: list[object] = []

    def read(thread: int) -> None:
        rng = np.random.Generator(np.random.PCG64(thread))
        try:
            for row in rng.integers(0, len(index), 1500).tolist():
                if index.read_bytes(row).tobytes() != content(row):
                    wrong.append(row)
        except DataError as error:
            wrong.append(error)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(open_shards(index.folder)) == 1


@pytest.mark.parametrize("change", ["gone", "shorter", "longer"])
def test_a_shard_that_is_gone_or_changed_is_named(index: Index, change: str) -> None:
    shard = index.folder / "train-000002.tar"
    if change == "gone":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size + (1 if change == "longer" else -1))
    index.read_bytes(0)
    with pytest.raises(DataError) as error:
        index.read_bytes(2 * PER_SHARD)
    one_line(error, shard, "pack_dataset", "No such file" if change == "gone" else "bytes")
    with pytest.raises(DataError) as error:
        check_files(index)
    one_line(error, shard)
    for part in (0, 1):  # shards 0, 3 and 1, 4 are looked at by two of three ranks
        check_files(index, part, 3)
    with pytest.raises(DataError):
        check_files(index, 2, 3)


def test_a_shard_cut_off_while_it_is_open_is_named(index: Index) -> None:
    index.read_bytes(0)
    os.truncate(index.folder / "train-000000.tar", 700)
    with pytest.raises(DataError) as error:
        index.read_bytes(PER_SHARD - 1)
    one_line(error, "train-000000.tar", index.path, "ends before")


def test_after_a_failed_read_the_shard_is_opened_anew(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.read_bytes(0)
    shard = index.folder / "train-000000.tar"
    (index.folder / "new").write_bytes(shard.read_bytes())
    (index.folder / "new").replace(shard)
    assert open_shards(index.folder) == ["train-000000.tar (deleted)"]
    real = os.preadv

    def stale(*_: object) -> int:
        monkeypatch.setattr(os, "preadv", real)
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "preadv", stale)
    with pytest.raises(DataError) as error:
        index.read_bytes(1)
    one_line(error, shard, "Stale file handle")
    assert index.read_bytes(1).tobytes() == content(1)
    assert "train-000000.tar" in open_shards(index.folder)


def test_an_index_that_points_into_no_shard_is_refused(tmp_path: Path) -> None:
    write_index(tmp_path / "train.index", [Row("a", 0, 1, 1, 1, bytes(32), shard=1)], ["x"], shards=["only.tar"])
    with pytest.raises(DataError) as error:
        Index.open(tmp_path / "train.index")
    one_line(error, "train.index", "does not name")


def test_sizes_must_be_those_of_all_shards(tmp_path: Path) -> None:
    row = Row("a", 0, 1, 1, 1, bytes(32), shard=0)
    write_index(tmp_path / "train.index", [row], ["x"], shards=["a.tar", "b.tar"], shard_bytes=[5])
    with pytest.raises(DataError) as error:
        Index.open(tmp_path / "train.index")
    one_line(error, "train.index", "2 shards, 1 sizes")
