"""Files that were hashed once are not read again, and a journal is never believed too much."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from ii_dist.config import DataError
from ii_dist.data import FileFacts, Journal, build_index, examine_bytes, examine_file, in_parallel, scan
from tests.images import make_image_folder, picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_image_folder(tmp_path / "train", classes=2, per_class=4)


@pytest.fixture
def read_again(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose bytes were read."""
    names: list[str] = []

    def noted(path: Path) -> FileFacts:
        names.append(path.name)
        return examine_file(path)

    monkeypatch.setattr(scan, "examine_file", noted)
    return names


def index_with(journal: Path, folder: Path) -> list[object]:
    opened = Journal(journal)
    try:
        return list(build_index(folder, journal=opened)[0])
    finally:
        opened.close()


def test_known_files_are_not_read_and_the_rows_are_the_same(
    folder: Path, tmp_path: Path, read_again: list[str]
) -> None:
    first = index_with(tmp_path / "journal", folder)
    assert len(read_again) == 8
    read_again.clear()
    assert index_with(tmp_path / "journal", folder) == first == list(build_index(folder)[0])
    assert len(read_again) == 8  # by the last call, which has no journal


def test_a_file_that_changed_is_read_again_even_under_its_old_size_and_time(
    folder: Path, tmp_path: Path, read_again: list[str]
) -> None:
    index_with(tmp_path / "journal", folder)
    path = folder / "class_01" / "00002.jpg"
    old, content = path.stat(), bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (old.st_size, old.st_mtime_ns)
    read_again.clear()
    rows = index_with(tmp_path / "journal", folder)
    assert read_again == ["00002.jpg"]
    assert rows == list(build_index(folder)[0])


def test_a_journal_cut_off_anywhere_gives_the_right_rows(folder: Path, tmp_path: Path, read_again: list[str]) -> None:
    journal = tmp_path / "journal"
    rows = index_with(journal, folder)
    content = journal.read_bytes()
    for length in range(0, len(content), 29):
        journal.write_bytes(content[:length])
        assert index_with(journal, folder) == rows
        assert journal.read_bytes().startswith(content[:length])
        read_again.clear()
        assert index_with(journal, folder) == rows
        assert not read_again  # what was cut off did not spoil the lines that were added behind it


def test_rubbish_in_a_journal_is_left_out(folder: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    rows = index_with(journal, folder)
    journal.write_bytes(
        bytes(4096) + b"\nhello\n" + b"0" * 64 + b" 1 2 3\n" + journal.read_bytes().replace(b"a", b"\xff")
    )
    assert index_with(journal, folder) == rows


PROGRAM = """
import sys, time
from ii_dist.data import Journal, build_index
from ii_dist.data import scan
examine = scan.examine_file
def slow(path):
    time.sleep(0.02)
    return examine(path)
scan.examine_file = slow
build_index(__import__("pathlib").Path(sys.argv[1]), workers=2, journal=Journal(sys.argv[2]))
"""


def test_a_kill_in_the_middle_loses_only_what_was_not_noted(
    folder: Path, tmp_path: Path, read_again: list[str]
) -> None:
    journal = tmp_path / "journal"
    make_image_folder(folder, classes=2, per_class=40)
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder), str(journal)]) as killed:
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= 10):
            assert killed.poll() is None
            time.sleep(0.002)
        killed.send_signal(signal.SIGKILL)
    noted = journal.read_bytes().count(b"\n")
    assert 10 <= noted < 80
    rows = index_with(journal, folder)
    assert len(read_again) == 80 - noted
    assert rows == list(build_index(folder)[0])


def test_names_that_cannot_stand_in_an_index_are_refused_in_one_line(folder: Path) -> None:
    for name in (b"caf\xe9.jpg", b"line\nbreak.jpg", b"colour\x1b[31m.jpg"):
        path = folder / "class_00" / os.fsdecode(name)
        path.write_bytes((folder / "class_00" / "00000.jpg").read_bytes())
        with pytest.raises(DataError, match="rename") as error:
            build_index(folder)
        assert str(error.value).isprintable()
        path.unlink()


def test_facts_of_pictures_and_of_others(tmp_path: Path) -> None:
    for suffix, kind, mode in ((".jpg", "JPEG", "RGB"), (".png", "PNG", "RGB"), (".gif", "GIF", "P")):
        path = tmp_path / f"picture{suffix}"
        picture(0, 30, 20).save(path)
        facts = examine_file(path)
        assert (facts.format, facts.mode, facts.width, facts.height, facts.problem) == (kind, mode, 30, 20, "")
        assert facts.length == path.stat().st_size
    assert examine_file(tmp_path / "none.jpg").problem == "cannot be read: No such file or directory"
    assert examine_file(tmp_path / "none.jpg").length == -1
    assert examine_bytes(b"").problem == "empty file, not an image"
    assert examine_bytes(b"<html>").problem == "not an image"
    picture(0, 30, 20).save(tmp_path / "picture.bmp")
    bomb = (tmp_path / "picture.bmp").read_bytes().replace(b"\x1e\0\0\0\x14\0\0\0", b"\x20\x4e\0\0" * 2)
    assert "400000000" in examine_bytes(bomb).problem


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged TIFF tags
def test_damaged_headers_of_every_format_are_problems_never_crashes(tmp_path: Path) -> None:
    """Bits flipped and bytes cut in the first 300 bytes of real files of all formats that are indexed."""
    import random

    draw = random.Random(0)
    for suffix in (".jpg", ".png", ".bmp", ".webp", ".ppm", ".tif"):
        path = tmp_path / f"picture{suffix}"
        picture(0, 30, 20).save(path)
        good = path.read_bytes()
        for _ in range(150):
            bad = bytearray(good[: draw.randrange(1, len(good))] if draw.random() < 0.2 else good)
            for _ in range(draw.randrange(1, 6)):
                bad[draw.randrange(min(300, len(bad)))] = draw.randrange(256)
            facts = examine_bytes(bytes(bad))
            assert facts.problem or facts.width > 0
            assert "\n" not in facts.problem


def test_parallel_results_come_in_order_and_an_error_ends_the_work() -> None:
    def work(item: int) -> int:
        time.sleep(0.0005 * (item % 3))
        if item == 500:
            raise DataError("item 500")
        done.append(item)
        return item * item

    done: list[int] = []
    assert list(in_parallel(work, range(200), workers=4)) == [i * i for i in range(200)]
    with pytest.raises(DataError, match="item 500"):
        list(in_parallel(work, range(100_000), workers=4))
    assert len(done) < 200 + 500 + 4 * 16 * 4  # what was in flight, not the rest


def test_an_unused_generator_leaves_no_thread() -> None:
    import threading

    before = threading.active_count()
    results = in_parallel(lambda item: item, range(1000), workers=3)
    assert next(results) == 0
    results.close()
    assert threading.active_count() == before


def test_image_opened_by_pillow_is_what_facts_say(folder: Path) -> None:
    for path in sorted(folder.rglob("*.jpg")):
        with Image.open(path) as image:
            facts = examine_file(path)
            assert (facts.width, facts.height) == image.size
