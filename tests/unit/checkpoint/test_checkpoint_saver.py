"""Background saves on one rank: what was true at the call is what is saved; no failure disappears."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ii_dist.checkpoint import CheckpointStore, RunFacts, Saver, committed_steps, find_newest, load_step
from ii_dist.checkpoint.saver import Staging
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


def test_host_memory_is_used_again(tensors_of: Tensors) -> None:
    staging = Staging()
    first, ready = staging.copy(tensors_of(1), dict.fromkeys(tensors_of(1), 0), 0)
    assert ready is None
    where = {name: copy.data_ptr() for name, copy in first.items()}
    second, _ = staging.copy(tensors_of(2), dict.fromkeys(tensors_of(2), 0), 0)
    assert {name: copy.data_ptr() for name, copy in second.items()} == where
    for name, tensor in tensors_of(2).items():
        assert torch.equal(second[name], tensor)
        assert second[name].stride() == tensor.stride()
        assert second[name].data_ptr() % 64 == 0
    third, _ = staging.copy({"other": torch.ones(3)}, {"other": 0}, 0)
    assert torch.equal(third["other"], torch.ones(3))
