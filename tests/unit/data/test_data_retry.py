"""Reads that fail for a passing reason, through real system calls; the list of bad files."""

import errno
import fcntl
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from ii_dist.config import DataError
from ii_dist.data import Index, build_index, write_index
from ii_dist.data.quarantine import BadFile, Quarantine, append_quarantine, read_quarantine
from tests import failing_disk
from tests.images import make_image_folder

ROOT = Path(__file__).parents[3]
PROGRAM = """
import json, logging, sys, time
from ii_dist.data.index import Index, UnreadableFile
from ii_dist.config import DataError
from ii_dist.data.retry import PatientReader
logging.basicConfig(format="%(levelname)s %(message)s")
index, told, outcome = Index.open(sys.argv[1]), [], []
reader = PatientReader(index, int(sys.argv[2]), lambda: told.append(1))
start_s = time.monotonic()
for row in json.loads(sys.argv[3]) or range(len(index)):
    try:
        outcome.append(int(reader.read(row).sum()))
    except UnreadableFile as error:
        outcome.append(error.number)
    except DataError as error:
        outcome.append(str(error))
        break
print(json.dumps([outcome, len(told), time.monotonic() - start_s]))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not failing_disk.has_compiler():
        pytest.skip("no C compiler")
    return failing_disk.build(tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    root = tmp_path_factory.mktemp("set")
    rows, classes = build_index(make_image_folder(root / "train", 1, 12, (20, 20)))
    write_index(root / "train.index", rows, classes, root="train")
    return Index.open(root / "train.index")


def read_all(
    index: Index, env: dict[str, str], retries: int, rows: tuple[int, ...] = ()
) -> tuple[list[int | str], int, float, str]:
    """What became of each file (of all, without `rows`), further tries, seconds, what was logged."""
    command = [sys.executable, "-c", PROGRAM, str(index.path), str(retries), json.dumps(rows)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    outcome, told, seconds = json.loads(done.stdout)
    return outcome, told, seconds, done.stderr


def sums(index: Index) -> list[int]:
    return [int(index.read_bytes(row).sum()) for row in range(len(index))]


@pytest.mark.parametrize("call", ["open", "read"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN])
def test_a_file_that_comes_back_is_read(library: Path, index: Index, number: int, call: str) -> None:
    env = failing_disk.environment(library, "00003.jpg", 2, number, call)
    outcome, told, seconds, said = read_all(index, env, retries=3)
    assert outcome == sums(index)
    assert told == 2
    assert 0.4 <= seconds < 3  # 0.1 and 0.3 s
    assert said.count("WARNING") == 1
    assert "00003.jpg" in said
    assert "data.read_retries" in said


def test_a_file_that_stays_away_is_given_up_alone(library: Path, index: Index) -> None:
    outcome, told, _, _ = read_all(index, failing_disk.environment(library, "00003.jpg", 99, errno.EIO), retries=2)
    assert outcome == [*sums(index)[:3], errno.EIO, *sums(index)[4:]]
    assert told == 2


def test_a_refusal_that_will_not_pass_is_not_waited_for(library: Path, index: Index) -> None:
    outcome, told, seconds, said = read_all(index, failing_disk.environment(library, "00003.jpg", 99, errno.EACCES), 20)
    assert outcome[3] == errno.EACCES
    assert (told, said) == (0, "")
    assert seconds < 1


def test_a_storage_that_is_gone_ends_the_run_in_one_line(library: Path, index: Index) -> None:
    outcome, told, seconds, _ = read_all(index, failing_disk.environment(library, ".jpg", 999, errno.ESTALE), retries=1)
    assert outcome[:-1] == [errno.ESTALE] * 7
    assert "the storage is not reachable" in str(outcome[-1])
    assert "\n" not in str(outcome[-1])
    assert (told, seconds < 3) == (8, True)


def test_a_few_files_that_stay_away_among_others_are_no_outage(library: Path, index: Index) -> None:
    env = failing_disk.environment(library, "00003.jpg", 99, errno.EIO)
    outcome, _, _, _ = read_all(index, env, 0, rows=(3, 0) * 12)
    assert outcome == [errno.EIO, sums(index)[0]] * 12


def test_too_many_open_files_is_no_fault_of_the_file(library: Path, index: Index) -> None:
    outcome, _, _, _ = read_all(index, failing_disk.environment(library, "00003.jpg", 99, errno.EMFILE), retries=1)
    assert len(outcome) == 4
    assert "ran out of open files" in str(outcome[-1])


def entry(path: str, sha256: str | None = "ab", split: str = "train") -> BadFile:
    return BadFile(split, path, sha256, "cannot be decoded (empty)", 7, 0)


def test_each_bad_file_is_listed_once_however_many_write(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    entries = [entry(f"a/{number}.jpg") for number in range(40)]
    orders = [np.random.default_rng(seed).permutation(40) for seed in range(4)]

    def write(order: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> None:
        for number in order:
            append_quarantine(path, [entries[number]])

    threads = [threading.Thread(target=write, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = read_quarantine(path)
    assert len(found) == 40
    assert set(found) == set(entries)
    assert all(set(json.loads(line)) >= {"split", "path", "sha256", "reason"} for line in path.read_text().splitlines())


def test_a_writer_waits_for_another_to_be_done(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    with path.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        writer = threading.Thread(target=append_quarantine, args=(path, [entry("a/1.jpg")]))
        writer.start()
        writer.join(0.3)
        assert path.stat().st_size == 0
        fcntl.flock(held, fcntl.LOCK_UN)
        writer.join(10)
    assert len(read_quarantine(path)) == 1


def test_half_a_line_is_left_out_and_ended(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    append_quarantine(path, [entry("a/1.jpg"), entry("a/2.jpg")])
    whole = path.read_bytes()
    for cut in range(len(whole) // 2 + 1, len(whole)):
        path.write_bytes(whole[:cut])
        assert [each.path for each in read_quarantine(path)] == ["a/1.jpg", "a/2.jpg"][: 1 + (cut == len(whole) - 1)]
        append_quarantine(path, [entry("a/3.jpg")])
        assert [each.path for each in read_quarantine(path)][-1] == "a/3.jpg"


@pytest.mark.parametrize(
    "text", ["a/1.jpg\n", '{"path": "a/1.jpg"}\n', "[1]\n", '{"split": 1, "path": "a", "reason": ""}\n']
)
def test_another_kind_of_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(DataError, match="line 1 is no entry"):
        read_quarantine(path)
    with pytest.raises(DataError, match="cannot read the list"):
        read_quarantine(tmp_path / "nothing")


def test_a_good_copy_is_no_longer_bad() -> None:
    listed = Quarantine("train", [entry("a/1.jpg", "ab"), entry("a/2.jpg", None), entry("a/3.jpg", "cd", "val")])
    assert [listed.holds("a/1.jpg", sha) for sha in ("ab", "ff")] == [True, False]
    assert listed.holds("a/2.jpg", "whatever")
    assert not listed.holds("a/3.jpg", "cd")
