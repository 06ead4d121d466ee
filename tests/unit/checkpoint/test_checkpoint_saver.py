"""Background saves on one rank: what was true at the call is what is saved; no failure disappears."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ii_dist.checkpoint import CheckpointStore, RunFacts, Saver, committed_steps, find_newest, load_step, shards
from ii_dist.checkpoint.disk import PAGE_BYTES
from ii_dist.checkpoint.staging import Staging
from ii_dist.config.errors import CheckpointError
from ii_dist.config.run_folder import RunFolder
from ii_dist.config.schema import CheckpointConfig

Tensors = Callable[[int], dict[str, Tensor]]


@pytest.fixture
def store(folder: RunFolder) -> CheckpointStore:
    return CheckpointStore(folder, RunFacts("ddp", 64), rank=0, world_size=1, fence=1)


@pytest.fixture
def saver(store: CheckpointStore) -> Iterator[Saver]:
    saver = Saver(store, CheckpointConfig(keep_last=2))
    yield saver
    saver.close()


def loaded(folder: RunFolder) -> tuple[int, dict[str, Tensor], dict[str, object]]:
    found, left_out = find_newest(folder.checkpoints)
    assert found is not None
    assert left_out == []
    return found.step, *load_step(found.path, found.manifest, verified=True)


def test_later_changes_do_not_reach_the_disk(folder: RunFolder, saver: Saver, tensors_of: Tensors) -> None:
    tensors, scalars = tensors_of(1), {"list": [1]}
    stall_s = saver.save(5, 2, 64, tensors, scalars)
    for tensor in tensors.values():
        tensor.zero_()
    scalars["list"].append(2)
    (result,) = saver.wait()
    assert (result.step, result.ok, result.message) == (5, True, "")
    assert 0 < stall_s <= result.seconds
    step, back, state = loaded(folder)
    assert (step, state) == (5, {"list": [1]})
    for name, tensor in tensors_of(1).items():
        assert torch.equal(back[name], tensor), name
        assert back[name].dtype == tensor.dtype
    found, _ = find_newest(folder.checkpoints)
    assert found is not None
    assert result.bytes == found.manifest.total_bytes


def test_every_save_has_its_own_values(folder: RunFolder, saver: Saver, tensors_of: Tensors) -> None:
    tensors = tensors_of(0)
    for step in range(1, 6):
        for name, tensor in tensors_of(step).items():
            tensors[name].copy_(tensor)
        saver.save(step, 0, step, tensors, {})
    assert [(r.step, r.ok) for r in saver.wait()] == [(s, True) for s in range(1, 6)]
    step, back, _ = loaded(folder)
    assert step == 5
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors_of(5).items())
    assert committed_steps(folder.checkpoints) == [4, 5]


def test_parameters_that_need_gradients(folder: RunFolder, saver: Saver) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 4))
    saver.save(1, 0, 0, {"model.weight": weight, "model.slice": weight[:2, :2]}, {})
    assert saver.wait()[0].ok
    _, back, _ = loaded(folder)
    assert torch.equal(back["model.slice"], weight.detach()[:2, :2])


def test_failed_save_is_reported_and_the_next_one_works(folder: RunFolder, saver: Saver, tensors_of: Tensors) -> None:
    folder.checkpoints.write_text("in the way")
    saver.save(1, 0, 0, tensors_of(1), {})
    (result,) = saver.wait()
    assert not result.ok
    assert result.message.startswith("step 1 not saved: rank 0: ")
    assert str(folder.checkpoints) in result.message
    folder.checkpoints.unlink()
    saver.save(2, 0, 0, tensors_of(2), {})
    assert [r.ok for r in saver.wait()] == [True]
    assert loaded(folder)[0] == 2


def test_poll_does_not_wait_and_lateness_is_reported(
    folder: RunFolder, store: CheckpointStore, saver: Saver, tensors_of: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, real = threading.Event(), store.save
    monkeypatch.setattr(store, "save", lambda content, gather: (go_on.wait(10), real(content, gather))[1])
    saver.save(1, 0, 0, tensors_of(1), {})
    assert saver.poll() == []
    threading.Timer(0.2, go_on.set).start()
    stall_s = saver.save(2, 0, 0, tensors_of(2), {})
    first, second = saver.wait()
    assert (first.step, first.late_s) == (1, pytest.approx(0.0, abs=0.05))
    assert 0.1 < second.late_s <= stall_s
    assert saver.poll() == []


def test_a_bug_in_the_thread_is_raised(
    store: CheckpointStore, tensors_of: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(store, CheckpointConfig())
    monkeypatch.setattr(store, "save", lambda content, gather: 1 // 0)
    saver.save(1, 0, 0, tensors_of(1), {})
    with pytest.raises(ZeroDivisionError):
        saver.close()


def test_failed_deletion_is_told_and_the_step_counts(
    folder: RunFolder, store: CheckpointStore, saver: Saver, tensors_of: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        saver.save(step, 0, 0, tensors_of(step), {})
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if ".trash" in str(target):
            raise OSError(5, "Input/output error")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    saver.save(3, 0, 0, tensors_of(3), {})
    result = saver.wait()[-1]
    assert result.ok
    assert result.message.startswith("old checkpoint not deleted")
    assert committed_steps(folder.checkpoints) == [1, 2, 3]


@pytest.mark.parametrize("scalars", [{"loss": float("nan")}, {"x": object()}, {"x": torch.ones(1)}])
def test_scalars_that_json_cannot_hold(saver: Saver, tensors_of: Tensors, scalars: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"state\.json: scalars must be plain finite JSON values"):
        saver.save(1, 0, 0, tensors_of(1), scalars)


def test_scalars_come_back_exactly(folder: RunFolder, saver: Saver, tensors_of: Tensors) -> None:
    scalars = {"rate": 0.1 + 0.2, "tiny": 5e-324, "count": 2**70, "none": None, "text": "ü\n", "deep": {"a": [True]}}
    saver.save(1, 0, 0, tensors_of(1), scalars)
    saver.wait()
    assert loaded(folder)[2] == scalars


def staged(staging: Staging, tensors: dict[str, Tensor]) -> dict[str, bytes]:
    """The bytes of each image, without its header, by the names of its tensors."""
    staging.begin(tensors)
    staging.fill(tensors)
    for image in staging.images:
        image.ready()
    return {" ".join(s.name for s in i.specs): bytes(i.data[i.header_bytes :]) for i in staging.images}


def test_host_memory_is_used_again(tensors_of: Tensors) -> None:
    staging = Staging(0, 1)
    first = staged(staging, tensors_of(1))
    images = staging.images
    assert len(images) == 1
    second = staged(staging, tensors_of(2))
    assert staging.images is images
    assert first != second
    names = [spec.name for spec in images[0].specs]
    assert b"".join(row_major(tensors_of(2)[name]) for name in names) == second[" ".join(names)]
    staged(staging, {"other": torch.ones(3)})
    assert staging.images is not images
    assert [spec.name for spec, _ in staging.layout] == ["other"]


def row_major(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_parts_of_all_ranks_make_the_whole(tensors_of: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PART_BYTES", 1000)
    tensors = tensors_of(3) | {"empty": torch.empty(0)}
    stagings = [Staging(rank, 2) for rank in range(2)]
    for staging in stagings:
        staged(staging, tensors)
    assert stagings[0].layout == stagings[1].layout
    assert len(stagings[0].images) == len(stagings[1].images) > 1
    images = [image for staging in stagings for image in staging.images]
    assert {spec.name: number for spec, number in stagings[0].layout} == {
        spec.name: number for number, image in enumerate(images) for spec in image.specs
    }
    for image in images:
        expected = b"".join(row_major(tensors[spec.name]) if spec.bytes else b"" for spec in image.specs)
        assert bytes(image.data[image.header_bytes :]) == expected
        begins = torch.frombuffer(image.data, dtype=torch.uint8).data_ptr()
        assert begins % PAGE_BYTES == 0


def test_a_shard_is_ready_before_the_next_one_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PART_BYTES", 1000)
    staging = Staging(0, 1)
    tensors = {f"t{i}": torch.ones(250) for i in range(4)}
    staging.begin(tensors)
    asked = [threading.Thread(target=image.ready, daemon=True) for image in staging.images]
    for thread in asked:
        thread.start()
    alive: list[int] = []
    real = Tensor.copy_

    def copy(self: Tensor, other: Tensor, non_blocking: bool = False) -> Tensor:
        for thread in asked[: len(alive)]:
            thread.join(5)
        alive.append(sum(thread.is_alive() for thread in asked))
        return real(self, other, non_blocking=non_blocking)

    monkeypatch.setattr(Tensor, "copy_", copy)
    staging.fill(tensors)
    assert alive == [4, 3, 2, 1]


def test_a_copy_that_fails_is_no_checkpoint(
    folder: RunFolder, saver: Saver, tensors_of: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(self: Tensor, other: Tensor, non_blocking: bool = False) -> Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(Tensor, "copy_", copy)
        with pytest.raises(RuntimeError, match="out of memory"):
            saver.save(1, 0, 0, tensors_of(1), {})
    (result,) = saver.wait()
    assert result.message == "step 1 not saved: rank 0: the copy of the tensors in host memory was given up"
    saver.save(2, 0, 0, tensors_of(2), {})
    assert saver.wait()[0].ok
    assert loaded(folder)[0] == 2
    assert committed_steps(folder.checkpoints) == [2]


def test_saving_gives_way_to_training(
    store: CheckpointStore, saver: Saver, tensors_of: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before, real, seen = priority(), shards.write_hashed, []
    monkeypatch.setattr(shards, "write_hashed", lambda path, data: (seen.append(priority()), real(path, data))[1])
    saver.save(1, 0, 0, tensors_of(1), {})
    assert saver.wait()[0].ok
    assert seen == [min(19, before + 10)]  # also of the threads that write
    assert priority() == before
