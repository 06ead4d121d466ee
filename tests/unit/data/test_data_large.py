"""A data set as large as ImageNet: opened, sought and looked at in the time and memory of a small one."""

import io
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.scale import IMAGENET, plan_for, write_large_index
from ii_dist.config import DataConfig
from ii_dist.data import Index, Position, make_train_source
from ii_dist.data.digests import Outlook, batches_to_look_at
from ii_dist.data.order import epoch_indices
from ii_dist.runtime import World
from ii_dist.train.sharding_check import judge, tell
from tests.images import picture

RANKS, PER_RANK = 8, 8


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,281,167 times the same JPEG, by one index."""
    folder, content = tmp_path_factory.mktemp("large"), io.BytesIO()
    picture(1, 500, 375).save(content, "JPEG")
    write_large_index(folder, IMAGENET, image=content.getvalue())
    return folder


@pytest.mark.parametrize("source_name", ["dali", "torch"])
def test_seek_to_the_middle_of_a_large_epoch_is_quick_and_reads_nothing(
    root: Path, source_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real = Index.read_bytes
    monkeypatch.setattr(Index, "read_bytes", lambda index, row: (read.append(row), real(index, row))[1])
    _cfg, plan = plan_for(IMAGENET, RANKS, PER_RANK)
    data = DataConfig.model_validate(
        {"source": source_name, "root": str(root), "image_size": 32, "threads_per_rank": 1, "prefetch_batches": 1}
    )
    started_s = time.process_time()
    source = make_train_source(data, plan, World(rank=5, world_size=RANKS), 3, "cpu", False)
    middle = plan.steps_per_epoch // 2 * plan.global_batch
    source.seek(Position(44, middle))
    for _ in range(100):
        source.seek(Position(45, middle))
    assert time.process_time() - started_s < 1.0
    assert source.position() == Position(45, middle)
    time.sleep(0.05)  # nothing is read behind our back either
    assert not read
    batch = next(iter(source))
    source.close()
    first = middle + 5 * PER_RANK
    expected = epoch_indices(IMAGENET, 3, 45, np.arange(first, first + PER_RANK))
    assert batch.index_N.tolist() == expected.tolist()
    # What comes before the place was not read: only this batch and the few that are prepared after it.
    assert set(expected.tolist()) <= set(read)
    assert len(read) <= 6 * PER_RANK


def test_the_check_of_eight_ranks_is_cheap_however_large_the_epoch(root: Path) -> None:
    cfg, plan = plan_for(IMAGENET, RANKS, 256)
    data = cfg.data.model_copy(update={"root": str(root)})
    outlooks: list[Outlook] = []
    for rank in range(RANKS):
        source = make_train_source(data, plan, World(rank=rank, world_size=RANKS), 0, "cpu", False)
        source.seek(Position(7, 100 * plan.global_batch))
        outlooks.append(source.outlook())
        source.close()
    numbers = batches_to_look_at(outlooks[0].request.schedule, RANKS, outlooks[0].number)
    assert (len(numbers), numbers[0], numbers[-1]) == (35, 7 * 625 + 100, 8 * 625)
    started_s = time.process_time()
    told = [tell(outlook, numbers) for outlook in outlooks]
    tell_s = (time.process_time() - started_s) / RANKS
    assert judge(plan, 0, outlooks[0], numbers, told) == str(35 * RANKS * 256)
    judge_s = time.process_time() - started_s - tell_s * RANKS
    assert tell_s + judge_s < 0.2  # measured 0.03 (benchmarks/scale.py); the goal is 0.1
