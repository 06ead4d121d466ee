"""Damage of every kind is found, named in one line, and costs one step, never the run."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ii_dist.checkpoint import committed_steps, find_newest, load_step, read_manifest, step_folders, verify_step
from ii_dist.config.errors import CheckpointError
from ii_dist.config.run_folder import RunFolder, shard_name

A, B = shard_name(0, 2), shard_name(1, 2)
Commit = Callable[..., list[Exception | None]]
Tensors = Callable[[int], dict[str, Tensor]]


@pytest.fixture
def two_steps(folder: RunFolder, commit: Commit) -> RunFolder:
    assert commit(10) == commit(20) == [None, None]
    return folder


def edit(path: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def flip(at: int) -> Callable[[bytearray], object]:
    def change(data: bytearray) -> None:
        data[at] ^= 0x10

    return change


def zero_block(data: bytearray) -> None:
    middle = len(data) // 2
    data[middle : middle + 512] = bytes(512)


def swap(step: Path, older: Path) -> None:
    (step / A).rename(step / "x")
    (step / B).rename(step / A)
    (step / "x").rename(step / B)


def link(step: Path, older: Path) -> None:
    (step / A).rename(step.parent / "elsewhere")
    (step / A).symlink_to(step.parent / "elsewhere")


def pipe(step: Path, older: Path) -> None:
    (step / A).unlink()
    os.mkfifo(step / A)


def whole_link(step: Path, older: Path) -> None:
    step.rename(step.parent / "elsewhere")
    step.symlink_to(step.parent / "elsewhere")


DAMAGE: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "shard missing": (lambda s, o: (s / A).unlink(), f"{A}: missing"),
    "shard truncated": (lambda s, o: os.truncate(s / B, 40), f"{B}: truncated: 40 bytes, the manifest says"),
    "shard empty": (lambda s, o: os.truncate(s / B, 0), f"{B}: truncated: 0 bytes"),
    "shard longer": (lambda s, o: edit(s / B, lambda d: d.extend(b"x")), f"{B}: too long"),
    "flip in the header length": (lambda s, o: edit(s / A, flip(0)), f"{A}: content changed"),
    "flip in the header": (lambda s, o: edit(s / A, flip(60)), f"{A}: content changed"),
    "flip in the last byte": (lambda s, o: edit(s / A, flip(-1)), f"{A}: content changed"),
    "block of zeros": (lambda s, o: edit(s / A, zero_block), f"{A}: content changed"),
    "shards swapped": (swap, f"{A}: "),
    "shard of another step": (lambda s, o: shutil.copy(o / A, s / A), f"{A}: "),
    "shard is a link": (link, f"{A}: is a symbolic link"),
    "shard is a pipe": (pipe, f"{A}: not a plain file"),
    "extra shard": (lambda s, o: shutil.copy(s / A, s / shard_name(2, 3)), "not in the manifest"),
    "extra file": (lambda s, o: (s / "notes.txt").write_text("hi"), "notes.txt: not in the manifest"),
    "manifest missing": (lambda s, o: (s / "COMMITTED.json").unlink(), "COMMITTED.json: missing"),
    "manifest truncated": (lambda s, o: os.truncate(s / "COMMITTED.json", 100), "COMMITTED.json: not JSON"),
    "manifest edited": (
        lambda s, o: edit(s / "COMMITTED.json", lambda d: d.__setitem__(slice(None), d.replace(b": 64", b": 65"))),
        "COMMITTED.json: changed after it was written",
    ),
    "manifest of another step": (
        lambda s, o: shutil.copy(o / "COMMITTED.json", s / "COMMITTED.json"),
        "COMMITTED.json: is of step 10",
    ),
    "state edited": (lambda s, o: edit(s / "state.json", flip(5)), "state.json: content changed"),
    "state missing": (lambda s, o: (s / "state.json").unlink(), "state.json: missing"),
    "empty folder": (lambda s, o: [p.unlink() for p in s.iterdir()], "COMMITTED.json: missing"),
    "a file in the folder's place": (lambda s, o: (shutil.rmtree(s), s.write_text("")), "not a folder"),
    "folder is a link": (whole_link, "is a symbolic link"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_step_before_is_taken(two_steps: RunFolder, tensors_of: Tensors, kind: str) -> None:
    act, expected = DAMAGE[kind]
    act(two_steps.step(20), two_steps.step(10))
    found, left_out = find_newest(two_steps.checkpoints)
    assert [left.step for left in left_out] == [20]
    reason = left_out[0].reason
    assert reason.startswith("step_000000020 left out: ")
    assert expected in reason
    assert "\n" not in reason
    assert found is not None
    assert found.step == 10
    tensors, scalars = load_step(found.path, found.manifest)
    assert scalars == {"step": 10}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in tensors_of(10).items())


def test_equal_sized_swap_says_whose_content_it_is(folder: RunFolder, commit: Commit) -> None:
    same = {f"t{i}": torch.randn(64, generator=torch.Generator().manual_seed(i)) for i in range(2)}
    commit(1, same)
    swap(folder.step(1), folder.step(1))
    assert verify_step(folder.step(1)) == [
        f"{A}: content changed: it holds {B}",
        f"{B}: content changed: it holds {A}",
    ]


def test_nothing_wrong(two_steps: RunFolder) -> None:
    assert verify_step(two_steps.step(20)) == []
    found, left_out = find_newest(two_steps.checkpoints)
    assert found is not None
    assert (found.step, left_out) == (20, [])


def test_foreign_names_are_ignored(two_steps: RunFolder) -> None:
    for name in (
        ".partial_step_000000030_fence_000001",
        "step_30",
        "old-step_000000030.bak",
        "step_0000000300",
        "lost",
    ):
        (two_steps.checkpoints / name).mkdir()
    (two_steps.checkpoints / "latest").write_text("step_000000999")
    assert committed_steps(two_steps.checkpoints) == [10, 20]
    found, left_out = find_newest(two_steps.checkpoints)
    assert found is not None
    assert (found.step, left_out) == (20, [])


def test_hidden_files_of_the_file_system_do_no_harm(two_steps: RunFolder) -> None:
    (two_steps.step(20) / ".nfs0000000012").write_text("")
    assert verify_step(two_steps.step(20)) == []


def test_no_checkpoints_yet(tmp_path: Path) -> None:
    assert find_newest(tmp_path / "checkpoints") == (None, [])


def test_none_is_whole(two_steps: RunFolder) -> None:
    for step in (10, 20):
        (two_steps.step(step) / A).unlink()
    found, left_out = find_newest(two_steps.checkpoints)
    assert found is None
    assert [left.step for left in left_out] == [20, 10]


def test_what_a_path_means(two_steps: RunFolder, tmp_path: Path) -> None:
    both = [two_steps.step(10), two_steps.step(20)]
    assert step_folders(two_steps.root) == step_folders(two_steps.checkpoints) == both
    assert step_folders(two_steps.step(10)) == both[:1]
    with pytest.raises(CheckpointError, match="no committed step there"):
        step_folders(tmp_path)
    with pytest.raises(CheckpointError, match="no such step folder"):
        step_folders(two_steps.step(30))


def test_load_checks_what_it_reads(two_steps: RunFolder) -> None:
    path = two_steps.step(20)
    manifest = read_manifest(path)
    of_a = [name for name, entry in manifest.tensors.items() if entry.shard == A]
    of_b = [name for name, entry in manifest.tensors.items() if entry.shard == B]
    edit(path / B, flip(-1))
    tensors, _ = load_step(path, manifest, of_a)
    assert list(tensors) == of_a
    with pytest.raises(CheckpointError, match=f"{B}: content changed"):
        load_step(path, manifest, of_b[:1])
    with pytest.raises(CheckpointError, match=r"has no tensor 'model\.nope'"):
        load_step(path, manifest, ["model.nope"])


def test_writing_to_a_loaded_tensor_changes_no_file(two_steps: RunFolder) -> None:
    path = two_steps.step(20)
    tensors, _ = load_step(path, read_manifest(path))
    for tensor in tensors.values():
        tensor.zero_()
    assert verify_step(path) == []
