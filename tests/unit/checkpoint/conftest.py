"""Steps written by the real store, its ranks as threads: only the gathering of rows is a stand-in (see tests/ranks)."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ii_dist.checkpoint.lease import Lease
from ii_dist.checkpoint.saver import encode_state
from ii_dist.checkpoint.staging import Staging
from ii_dist.checkpoint.store import CheckpointStore, RunFacts, StepContent
from ii_dist.config.run_folder import RunFolder

Commit = Callable[..., list[Exception | None]]


class ThreadRanks:
    """Rows of bytes from every rank to every rank, the ranks being threads of this process."""

    def __init__(self, world_size: int) -> None:
        self._rows: list[bytes] = [b""] * world_size
        self._barrier = threading.Barrier(world_size, timeout=20)

    def gather(self, rank: int, row: bytes) -> list[bytes]:
        self._rows[rank] = row
        self._barrier.wait()
        rows = list(self._rows)
        self._barrier.wait()
        return rows


def some_tensors(seed: int) -> dict[str, Tensor]:
    """Weights, averages and momenta of a little network, with the dtypes and shapes that real ones have."""
    draw = torch.Generator().manual_seed(seed)

    def floats(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    return {
        "model.conv.weight": floats(8, 3, 3, 3).to(memory_format=torch.channels_last),
        "model.bn.weight": floats(8),
        "model.bn.num_batches_tracked": torch.tensor(seed),
        "model.fc.weight": floats(10, 8),
        "model.fc.bias": floats(10),
        "ema.conv.weight": floats(8, 3, 3, 3),
        "ema.bn.weight": floats(8),
        "ema.fc.weight": floats(10, 8),
        "ema.fc.bias": floats(10),
        "optimizer.conv.weight.momentum_buffer": floats(8, 3, 3, 3),
        "optimizer.fc.weight.momentum_buffer": floats(10, 8).bfloat16(),
    }


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.root.mkdir()
    return run


@pytest.fixture
def commit(folder: RunFolder) -> Commit:
    """commit(step, ...) -> what each rank raised (None: it says that the step is committed)."""

    def act(
        step: int,
        tensors: Mapping[str, Tensor] | None = None,
        world_size: int = 2,
        scalars: Mapping[str, Any] | None = None,
        fence: int = 1,
        lease: Lease | None = None,
        at: RunFolder = folder,
        change: Callable[[int, StepContent], StepContent] = lambda rank, content: content,
    ) -> list[Exception | None]:
        tensors = some_tensors(step) if tensors is None else tensors
        ranks = ThreadRanks(world_size)

        def one(rank: int) -> Exception | None:
            facts = RunFacts("ddp", 64, "a" * 64, "b" * 64)
            store = CheckpointStore(at, facts, rank, world_size, fence, lease if rank == 0 else None)
            staged = Staging(rank, world_size)
            staged.begin(tensors)
            staged.fill(tensors)
            state = encode_state(scalars or {"step": step})
            content = StepContent(step, 1, step * 64, staged.layout, staged.images, state)
            try:
                store.save(change(rank, content), lambda row: ranks.gather(rank, row))
            except Exception as error:
                return error
            return None

        with ThreadPoolExecutor(world_size) as pool:
            return list(pool.map(one, range(world_size)))

    return act


@pytest.fixture
def tensors_of() -> Callable[[int], dict[str, Tensor]]:
    return some_tensors
