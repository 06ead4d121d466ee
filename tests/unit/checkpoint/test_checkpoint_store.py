"""Committed or not there: whatever fails on whichever rank, older steps stay whole and nothing of the new one stays."""

import dataclasses
import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ii_dist.checkpoint import CheckpointStore, RunFacts, committed_steps, find_newest, take_lease, verify_step
from ii_dist.checkpoint.disk import remove_tree, replace_file, write_views
from ii_dist.checkpoint.store import StepContent
from ii_dist.config.errors import CheckpointError
from ii_dist.config.run_folder import RunFolder
from tests.small_disk import mounted

Commit = Callable[..., list[Exception | None]]


def hidden(folder: RunFolder) -> list[str]:
    return sorted(p.name for p in folder.checkpoints.iterdir() if p.name.startswith("."))


def one_line(errors: list[Exception | None]) -> str:
    """The message that every rank got."""
    texts = {str(error) for error in errors}
    assert all(isinstance(error, CheckpointError) for error in errors), errors
    assert len(texts) == 1
    text = texts.pop()
    assert "\n" not in text
    return text


def store_of(folder: RunFolder, fence: int = 1) -> CheckpointStore:
    return CheckpointStore(folder, RunFacts("ddp", 64), 0, 1, fence)


@pytest.mark.parametrize("world_size", [1, 2, 3, 13])
def test_what_a_committed_step_says(folder: RunFolder, commit: Commit, world_size: int) -> None:
    assert commit(20, world_size=world_size, fence=4) == [None] * world_size
    found, left_out = find_newest(folder.checkpoints)
    assert found is not None
    assert left_out == []
    manifest = found.manifest
    assert (manifest.step, manifest.position.epoch, manifest.position.offset) == (20, 1, 1280)
    assert (manifest.world_size, manifest.engine, manifest.global_batch, manifest.fence) == (world_size, "ddp", 64, 4)
    assert (manifest.config_sha256, manifest.index_sha256) == ("a" * 64, "b" * 64)
    assert manifest.versions["torch"] == torch.__version__
    names = {p.name for p in found.path.iterdir()}
    assert len(names) == world_size + 2
    assert hidden(folder) == []


def test_failure_of_one_rank_is_the_failure_of_all(folder: RunFolder, commit: Commit) -> None:
    commit(10)

    def damage(rank: int, content: StepContent) -> StepContent:
        if rank == 1:
            return dataclasses.replace(content, images=[dataclasses.replace(content.images[0], ready=fail)])
        return content

    def fail() -> None:
        raise CheckpointError("no copy")

    assert one_line(commit(20, change=damage)) == "rank 1: no copy"
    assert committed_steps(folder.checkpoints) == [10]
    assert verify_step(folder.step(10)) == []
    assert hidden(folder) == []
    # The next save tries again.
    assert commit(20) == [None, None]


def test_ranks_that_save_different_things(folder: RunFolder, commit: Commit) -> None:
    def differ(rank: int, content: StepContent) -> StepContent:
        return dataclasses.replace(content, step=21) if rank == 1 else content

    errors = commit(20, change=differ)
    assert all("another step or other tensors" in str(error) for error in errors)
    assert committed_steps(folder.checkpoints) == []
    assert hidden(folder) == []


def test_vanished_run_folder_is_not_made_anew(folder: RunFolder, commit: Commit) -> None:
    folder.root.rmdir()
    text = one_line(commit(20))
    assert "No such file" in text
    assert str(folder.checkpoints) in text
    assert not folder.root.exists()


def test_a_file_where_the_checkpoints_should_be(folder: RunFolder, commit: Commit) -> None:
    folder.checkpoints.write_text("")
    assert "File exists" in one_line(commit(20))


def test_same_step_again_keeps_the_whole_one(folder: RunFolder, commit: Commit) -> None:
    commit(20)
    before = (folder.step(20) / "COMMITTED.json").stat().st_ino
    assert commit(20) == [None, None]
    assert (folder.step(20) / "COMMITTED.json").stat().st_ino == before
    assert hidden(folder) == []


def test_same_step_again_replaces_a_damaged_one(folder: RunFolder, commit: Commit) -> None:
    commit(10)
    commit(20)
    os.truncate(folder.step(20) / "state.json", 0)
    assert commit(20, world_size=3) == [None] * 3
    assert verify_step(folder.step(20)) == []
    assert hidden(folder) == []


def test_leftovers_are_swept(folder: RunFolder, commit: Commit) -> None:
    commit(10)
    for name in (".partial_step_000000020_fence_000001", ".trash_step_000000005_fence_000001"):
        (folder.checkpoints / name).mkdir()
        (folder.checkpoints / name / "shard").write_text("x")
    (folder.checkpoints / ".nfs01").write_text("not ours")
    store_of(folder).sweep()
    assert hidden(folder) == [".nfs01"]
    assert committed_steps(folder.checkpoints) == [10]


def test_what_a_save_left_makes_room_for_the_next(folder: RunFolder, commit: Commit) -> None:
    commit(10)
    for name in (".partial_step_000000015_fence_000001", ".trash_step_000000005_fence_000001"):
        (folder.checkpoints / name).mkdir()
    assert commit(20) == [None, None]
    assert hidden(folder) == []


def test_ghost_of_an_earlier_attempt_does_not_disturb(folder: RunFolder, commit: Commit) -> None:
    folder.checkpoints.mkdir()
    ghost = folder.checkpoints / ".partial_step_000000020_fence_000001"
    ghost.mkdir()
    (ghost / "shard_00000-of-00002.safetensors").write_text("half")
    assert commit(20) == [None, None]
    assert verify_step(folder.step(20)) == []


def test_prune_keeps_what_it_must(folder: RunFolder, commit: Commit) -> None:
    for step in (10, 20, 30, 40, 50):
        commit(step)
    assert store_of(folder).prune(keep_last=2, keep_every_steps=20, newest=50) == [10, 30]
    assert committed_steps(folder.checkpoints) == [20, 40, 50]
    assert hidden(folder) == []


def test_prune_deletes_nothing_when_the_newest_is_damaged(folder: RunFolder, commit: Commit) -> None:
    for step in (10, 20, 30):
        commit(step)
    (folder.step(30) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="older steps are kept"):
        store_of(folder).prune(keep_last=1, keep_every_steps=0, newest=30)
    assert committed_steps(folder.checkpoints) == [10, 20, 30]


def test_prune_neither_counts_nor_touches_steps_above_the_newest(folder: RunFolder, commit: Commit) -> None:
    for step in (10, 20, 30):
        commit(step)
    os.truncate(folder.step(30) / "state.json", 0)
    assert store_of(folder).prune(keep_last=2, keep_every_steps=0, newest=20) == []
    assert committed_steps(folder.checkpoints) == [10, 20, 30]


def test_fence_blocks_a_ghost(folder: RunFolder, commit: Commit) -> None:
    ghost = take_lease(folder, "job-1", attempt=0)
    assert commit(10, lease=ghost, fence=ghost.fence) == [None, None]
    owner = take_lease(folder, "job-1", attempt=1)
    try:
        assert owner.fence == ghost.fence + 1
        text = one_line(commit(20, lease=ghost, fence=ghost.fence))
        assert "taken over by job job-1" in text
        assert committed_steps(folder.checkpoints) == [10]
        assert hidden(folder) == []
        ghostly = CheckpointStore(folder, RunFacts("ddp", 64), 0, 1, ghost.fence, ghost)
        commit(20, lease=owner, fence=owner.fence)
        with pytest.raises(CheckpointError, match="taken over"):
            ghostly.prune(keep_last=1, keep_every_steps=0, newest=20)
        assert committed_steps(folder.checkpoints) == [10, 20]
    finally:
        ghost.release()
        assert owner.is_ours()
        owner.release()


def test_everything_is_flushed_before_it_is_relied_on(
    folder: RunFolder, commit: Commit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut would leave: at the rename all content and names of the step must be on disk already."""
    commit(10, world_size=1)
    unflushed: set[str] = set()
    renames: list[tuple[str, set[str]]] = []

    def path_of(file: int) -> str:
        return str(Path(f"/proc/self/fd/{file}").readlink())

    def watch(name: str, note: Callable[..., object]) -> None:
        real = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            result = real(*args, **kwargs)
            note(*args)
            return result

        monkeypatch.setattr(os, name, call)

    def opened(path: object, flags: int, *rest: object) -> None:
        if flags & os.O_CREAT and ".lease" not in str(path):
            unflushed.update({str(path), str(Path(str(path)).parent)})

    def renamed(source: object, target: object) -> None:
        inside = {path.replace(str(source), str(target)) for path in unflushed if path.startswith(f"{source}")}
        renames.append((str(target), inside))
        unflushed.difference_update({path for path in unflushed if path.startswith(f"{source}")})
        unflushed.add(str(Path(str(target)).parent))

    watch("open", opened)
    watch("writev", lambda file, views: unflushed.add(path_of(file)))
    watch("fsync", lambda file: unflushed.discard(path_of(file)))
    watch("rename", renamed)
    assert commit(20, world_size=1) == [None]
    assert renames == [(str(folder.step(20)), set())]
    assert unflushed == set()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    with mounted(tmp_path / "disk", "1m") as path:
        yield path


def test_full_disk(small_disk: Path, commit: Commit, tensors_of: Callable[[int], dict[str, Tensor]]) -> None:
    folder = RunFolder(small_disk)
    assert commit(10, at=folder) == [None, None]
    large = tensors_of(1) | {"model.large": torch.zeros(300_000)}
    text = one_line(commit(20, large, at=folder))
    assert "No space left on device" in text
    assert str(folder.checkpoints) in text
    assert re.search(r"\d+ bytes free there", text)
    assert hidden(folder) == []
    found, left_out = find_newest(folder.checkpoints)
    assert found is not None
    assert (found.step, left_out) == (10, [])
    assert commit(30, at=folder) == [None, None]


def test_read_only_disk(small_disk: Path, commit: Commit) -> None:
    folder = RunFolder(small_disk)
    assert commit(10, at=folder) == [None, None]
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match=r"run folder .*disk: cannot be written: Read-only file system"):
        take_lease(folder, "job")
    assert "Read-only file system" in one_line(commit(20, at=folder))
    assert verify_step(folder.step(10)) == []


def test_short_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.writev
    monkeypatch.setattr(os, "writev", lambda file, views: whole(file, [views[0][:3]]))
    with (tmp_path / "a").open("wb") as file:
        assert write_views(file.fileno(), [memoryview(b"12345678"), memoryview(b""), memoryview(b"9ab")]) == 11
    assert (tmp_path / "a").read_bytes() == b"123456789ab"


def test_replacing_a_file_never_harms_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("old")

    def fail(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output error"):
            replace_file(tmp_path / "a", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"
    replace_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_text() == "new"


def test_removing_a_link_keeps_its_target(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    remove_tree(tmp_path / "link")
    remove_tree(tmp_path / "nothing")
    assert [p.name for p in tmp_path.iterdir()] == ["real"]
