"""Copies of shards on the node's disk: made once, whole or not there, used as they appear, never in the way."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from ii_dist.config import ClusterError, ConfigError, DataConfig, RunConfig, recipe_differences
from ii_dist.data import Batch, BatchSource, Index, Row, make_eval_source, make_train_source, staging, write_index
from ii_dist.data import shard_reader as reader_module
from ii_dist.data.staging import start_staging
from ii_dist.runtime import World
from tests.images import make_data_set, plan_of, run_config
from tools.pack_dataset import main as pack

CLASSES, PER_CLASS, VAL_PER_CLASS = 2, 30, 6
BATCH = 12
NODE = [World(rank=r, world_size=2, local_rank=r, local_world_size=2) for r in range(2)]
ROOT = Path(__file__).resolve().parents[3]
# Copies with long pauses, so that it is killed in the middle.
SLOW_COPY = """
import sys, time
from pathlib import Path
from ii_dist.data import Index, staging
from ii_dist.runtime import World
staging._CHUNK_BYTES, staging._WORK_SHARE = 512, 0.2
staging.start_staging(Index.open(sys.argv[1]), sys.argv[2], World())
time.sleep(60)
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    make_data_set(folder / "images", CLASSES, PER_CLASS, VAL_PER_CLASS, (60, 44))
    assert pack([str(folder / "images"), "--out", str(folder / "shards"), "--shard-mb", "0.02", "--workers", "2"]) == 0
    return folder / "shards"


@pytest.fixture
def root(packed: Path, tmp_path: Path) -> Path:
    """Shards that a test may destroy."""
    return Path(shutil.copytree(packed, tmp_path / "shards"))


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "LOOK_EVERY_S", 0.0)


@pytest.fixture
def index(root: Path) -> Index:
    return Index.open(root / "train.index")


def until(true: Callable[[], bool], wait_s: float = 20.0) -> None:
    end_s = time.monotonic() + wait_s
    while not true():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.01)


def copies(index: Index, stage_to: Path) -> list[str]:
    folder = stage_to / index.digest
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.exists() else []


def all_copied(index: Index, stage_to: Path) -> bool:
    return copies(index, stage_to) == sorted(index.header.shards)


def stage(index: Index, stage_to: Path, world: World | None = None) -> None:
    """Copy everything and wait for it."""
    started = start_staging(index, str(stage_to), world or World())
    until(lambda: all_copied(index, stage_to))
    if started:
        started.close()


@pytest.fixture
def slow_copy() -> Iterator[Callable[[Index, Path], "subprocess.Popen[bytes]"]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(index: Index, stage_to: Path) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-c", SLOW_COPY, str(index.path), str(stage_to)]
        started.append(subprocess.Popen(command, cwd=ROOT))
        return started[0]

    yield start
    for program in started:
        program.kill()
        program.wait()


def data_config(root: Path, stage_to: Path | str = "", source: str = "torch") -> DataConfig:
    sizes = {"image_size": 24, "eval_resize": 28, "eval_image_size": 24, "threads_per_rank": 1}
    return DataConfig.model_validate({"source": source, "root": str(root), "stage_to": str(stage_to), **sizes})


def train_source(cfg: DataConfig, world: World) -> BatchSource:
    plan = plan_of(run_config(cfg, BATCH), world.world_size, CLASSES * PER_CLASS, CLASSES * VAL_PER_CLASS, CLASSES)
    return make_train_source(cfg, plan, world, 5, "cpu", False)


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.images_NCHW, y.images_NCHW) and torch.equal(x.index_N, y.index_N)
        for x, y in zip(a, b, strict=True)
    )


@pytest.fixture
def expected(packed: Path) -> Iterator[list[list[Batch]]]:
    """Seven batches of each of two ranks without copies: into the second epoch."""
    found = []
    for world in NODE:
        source = train_source(data_config(packed), world)
        found.append(list(islice(source, 7)))
        source.close()
    return found


@pytest.mark.parametrize("source", ["dali", "torch"])
def test_both_ranks_of_a_node_read_the_copies_that_one_of_them_makes(
    root: Path, index: Index, tmp_path: Path, expected: list[list[Batch]], source: str
) -> None:
    stage_to = tmp_path / "disk"
    if source == "dali":
        without = [train_source(data_config(root, source=source), world) for world in NODE]
        expected = [list(islice(s, 7)) for s in without]
        for s in without:
            s.close()
    sources = [train_source(data_config(root, stage_to, source), world) for world in NODE]
    iterators = [iter(s) for s in sources]
    seen = [[next(iterator)] for iterator in iterators]  # while shards are being copied
    until(lambda: all_copied(index, stage_to))
    for name in index.header.shards:
        (root / name).unlink()  # from here on nobody can read an original that is not open
    for found, iterator in zip(seen, iterators, strict=True):
        found += islice(iterator, 6)
    for s in sources:
        s.close()
        s.close()
    assert all(same(a, b) for a, b in zip(seen, expected, strict=True))


def test_only_one_process_of_a_node_copies_and_every_node_begins_elsewhere(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[int] = []
    monkeypatch.setattr(staging.Staging, "_copy", lambda _, shard: order.append(shard) or True)
    assert start_staging(index, str(tmp_path / "disk"), NODE[1]) is None
    assert not (tmp_path / "disk").exists()
    shards = len(index.header.shards)
    assert shards >= 4
    for node in range(2):
        started = start_staging(index, str(tmp_path / "disk"), World(node_rank=node, num_nodes=2))
        assert started is not None
        started.close()
    assert order == [*range(shards), *range(shards // 2, shards), *range(shards // 2)]


def test_copies_are_the_originals_and_are_used_again_by_the_next_run(index: Index, tmp_path: Path) -> None:
    stage(index, tmp_path / "disk")
    folder = tmp_path / "disk" / index.digest
    for name in index.header.shards:
        assert (folder / name).read_bytes() == (index.folder / name).read_bytes()
    before = {name: (folder / name).stat().st_ino for name in index.header.shards}
    assert start_staging(Index.open(index.path), str(tmp_path / "disk"), World()) is None
    assert {name: (folder / name).stat().st_ino for name in index.header.shards} == before
    assert folder.stat().st_mode & 0o077 == 0


def test_originals_are_let_go_of_when_their_copies_come(index: Index, tmp_path: Path) -> None:
    def opened(folder: Path) -> set[str]:
        paths = [Path(os.path.realpath(link)) for link in Path("/proc/self/fd").iterdir()]
        return {path.name for path in paths if path.parent == folder and path.suffix == ".tar"}

    every = set(index.header.shards)
    start_staging(index, str(tmp_path / "disk"), NODE[1])
    for row in range(len(index)):
        index.read_bytes(row)
    assert opened(index.folder) == every
    stage(Index.open(index.path), tmp_path / "disk")
    for row in range(len(index)):
        index.read_bytes(row)
    assert opened(index.folder) == set()
    assert opened(tmp_path / "disk" / index.digest) == every


def test_a_copy_of_another_size_is_made_again_and_another_index_has_its_own_folder(
    index: Index, tmp_path: Path
) -> None:
    stage(index, tmp_path / "disk")
    copy = tmp_path / "disk" / index.digest / "train-000001.tar"
    os.truncate(copy, 100)
    again = Index.open(index.path)
    started = start_staging(again, str(tmp_path / "disk"), World())
    assert started is not None
    until(lambda: copy.read_bytes() == (index.folder / "train-000001.tar").read_bytes())
    started.close()
    other = Index.open(index.folder / "val.index")
    stage(other, tmp_path / "disk")
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == sorted([index.digest, other.digest])


def test_a_copy_killed_in_the_middle_is_no_copy_and_the_next_run_finishes(
    index: Index, tmp_path: Path, slow_copy: Callable[[Index, Path], "subprocess.Popen[bytes]"]
) -> None:
    stage_to = tmp_path / "disk"
    program = slow_copy(index, stage_to)
    folder = stage_to / index.digest
    until(lambda: len(copies(index, stage_to)) >= 1)
    until(lambda: any(folder.glob(".*.partial")))
    program.send_signal(signal.SIGKILL)
    program.wait()
    whole = copies(index, stage_to)
    (folder / ".train-000999.tar.partial").write_bytes(b"of an earlier one")
    assert 0 < len(whole) < len(index.header.shards)
    inodes = {name: (folder / name).stat().st_ino for name in whole}
    stage(index, stage_to)
    assert not list(folder.glob(".*.partial"))
    assert {name: (folder / name).stat().st_ino for name in whole} == inodes
    for name in index.header.shards:
        assert (folder / name).read_bytes() == (index.folder / name).read_bytes()


def test_a_second_run_on_the_node_waits_for_the_first_and_takes_over_when_that_dies(
    index: Index,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    slow_copy: Callable[[Index, Path], "subprocess.Popen[bytes]"],
) -> None:
    monkeypatch.setattr(staging, "_LOCK_EVERY_S", 0.05)
    stage_to = tmp_path / "disk"
    program = slow_copy(index, stage_to)
    until(lambda: any((stage_to / index.digest).glob(".*.partial")))
    second = start_staging(index, str(stage_to), World())
    assert second is not None
    time.sleep(0.3)
    assert len(list((stage_to / index.digest).glob(".*.partial"))) == 1
    assert not all_copied(index, stage_to)
    program.kill()
    program.wait()
    until(lambda: all_copied(index, stage_to))
    second.close()


def test_too_little_space_is_refused_with_the_numbers(tmp_path: Path) -> None:
    huge = shutil.disk_usage(tmp_path).free + (1 << 40)
    with (tmp_path / "a.tar").open("wb") as file:
        file.truncate(huge)  # a hole: takes no space
    write_index(tmp_path / "train.index", [Row("a", 0, 1, 1, 1, bytes(32), shard=0)], ["x"], shards=["a.tar"])
    with pytest.raises(ClusterError, match=r"data\.stage_to .*needs 1?,?\d+\.\d GB more .* GB are free") as error:
        start_staging(Index.open(tmp_path / "train.index"), str(tmp_path / "disk"), World())
    assert "\n" not in str(error.value)
    assert f"{huge / 1e9:,.1f} GB" in str(error.value)


def test_single_files_and_folders_of_others_are_refused(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_data_set(tmp_path / "files", 1, 1, 1, (8, 8))
    with pytest.raises(ConfigError, match=r"tools\.pack_dataset"):
        start_staging(Index.open(tmp_path / "files" / "train.index"), str(tmp_path / "disk"), World())
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match="cannot be made"):
        start_staging(index, str(tmp_path / "file"), World())
    (tmp_path / "open" / index.digest).mkdir(parents=True)
    (tmp_path / "open" / index.digest).chmod(0o777)
    with pytest.raises(ClusterError, match="others may write"):
        start_staging(index, str(tmp_path / "open"), World())
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ClusterError, match="others may write"):
        start_staging(index, str(tmp_path / "disk"), World())


def test_a_copy_that_fails_is_said_once_and_reading_goes_on(
    index: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "sendfile", full)
    started = start_staging(index, str(tmp_path / "disk"), World())
    assert started is not None
    started._thread.join(10)
    for row in range(len(index)):
        index.read_bytes(row)
    started.close()
    said = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == 1
    assert "No space left" in said[0].getMessage()
    assert copies(index, tmp_path / "disk") == []
    assert not list((tmp_path / "disk" / index.digest).glob(".*.partial"))


@pytest.mark.parametrize("harm", ["removed", "shorter", "longer", "cut off while open"])
def test_a_copy_that_goes_bad_is_left_for_the_original_with_one_warning(
    index: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    stage(index, tmp_path / "disk")
    reading = Index.open(index.path)
    start_staging(reading, str(tmp_path / "disk"), World())
    folder = tmp_path / "disk" / index.digest
    if harm == "cut off while open":
        for row in range(len(reading)):
            reading.read_bytes(row)
    for name in index.header.shards:
        size = (folder / name).stat().st_size
        (folder / name).unlink() if harm == "removed" else os.truncate(
            folder / name, size + 1 if harm == "longer" else 10
        )
    for _ in range(2):
        for row in range(len(reading)):
            assert reading.read_bytes(row).tobytes() == index.read_bytes(row).tobytes()
    said = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == 1
    assert "reading the original" in said[0].getMessage()


def test_closing_stops_the_copying_soon_and_leaves_no_half_copy(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_CHUNK_BYTES", 512)
    monkeypatch.setattr(staging, "_WORK_SHARE", 1e-6)  # a pause of minutes after the first chunk
    source = train_source(data_config(index.folder, tmp_path / "disk"), World())
    folder = tmp_path / "disk" / index.digest
    until(lambda: any(folder.glob(".*.partial")))
    start_s = time.monotonic()
    source.close()
    assert time.monotonic() - start_s < 2
    assert [p.name for p in folder.iterdir()] == [".lock"]


def test_the_copying_thread_alone_runs_at_the_lowest_priority(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(staging.Staging, "_copy_all", lambda _: seen.append(os.getpriority(os.PRIO_PROCESS, 0)))
    here = os.getpriority(os.PRIO_PROCESS, 0)
    started = start_staging(index, str(tmp_path / "disk"), World())
    assert started is not None
    started.close()
    assert seen == [19]
    assert os.getpriority(os.PRIO_PROCESS, 0) == here < 19


def test_folders_are_listed_now_and_then_not_for_each_image(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "LOOK_EVERY_S", 3600.0)
    listed: list[object] = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or real(path))
    start_staging(index, str(tmp_path / "disk"), NODE[1])
    before = len(listed)
    for row in range(len(index)):
        index.read_bytes(row)
    assert len(listed) == before


def test_evaluation_is_staged_too_and_the_key_may_change_on_resume(root: Path, tmp_path: Path) -> None:
    cfg = data_config(root, tmp_path / "disk")
    run = run_config(cfg, BATCH)
    plan = plan_of(run, 1, CLASSES * PER_CLASS, CLASSES * VAL_PER_CLASS, CLASSES)
    source = make_eval_source(cfg, plan, World(), 5, "cpu", False, 4)
    assert len(list(source)) == plan.eval_steps
    val = Index.open(root / "val.index")
    until(lambda: all_copied(val, tmp_path / "disk"))
    source.close()
    other = RunConfig.model_validate({**run.model_dump(), "data": data_config(root, "").model_dump()})
    assert recipe_differences(run, other) == []
