"""What every row of SOURCES promises: the same images on any number of ranks, from any position, each exactly once."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from ii_dist.config import ConfigError, DataConfig
from ii_dist.data import SOURCES, Batch, Position, make_eval_source
from ii_dist.runtime import World
from tests.images import make_data_set, plan_of, run_config
from tests.simulated_ranks import SimulatedRanks, joined, same

CLASSES, PER_CLASS, VAL_PER_CLASS = 3, 19, 7
TRAIN_IMAGES, EVAL_IMAGES = CLASSES * PER_CLASS, CLASSES * VAL_PER_CLASS
GLOBAL_BATCH = 24  # 57 images: 2 steps an epoch, 9 images dropped
SEED = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_set(tmp_path_factory.mktemp("set"), CLASSES, PER_CLASS, VAL_PER_CLASS, (60, 44))


@pytest.fixture(params=sorted(SOURCES))
def cfg(request: pytest.FixtureRequest, root: Path) -> DataConfig:
    return DataConfig(
        source=request.param,
        root=str(root),
        image_size=24,
        eval_resize=28,
        eval_image_size=24,
        threads_per_rank=1,
        synthetic_images=TRAIN_IMAGES,
        synthetic_classes=CLASSES,
    )


def ranks_of(
    cfg: DataConfig, world_size: int, max_images_per_rank: int = 0, channels_last: bool = False
) -> SimulatedRanks:
    plan = plan_of(run_config(cfg, GLOBAL_BATCH, max_images_per_rank), world_size, TRAIN_IMAGES, EVAL_IMAGES, CLASSES)
    return SimulatedRanks(cfg, plan, SEED, channels_last)


@pytest.fixture
def expected(cfg: DataConfig) -> Iterator[list[Batch]]:
    """Five steps on one rank: into the third epoch."""
    with ranks_of(cfg, 1) as ranks:
        yield [ranks.step() for _ in range(5)]


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_global_steps_are_the_same_images_on_any_number_of_ranks(
    cfg: DataConfig, expected: list[Batch], world_size: int
) -> None:
    with ranks_of(cfg, world_size) as ranks:
        assert all(same(ranks.step(), step) for step in expected)


@pytest.mark.parametrize(("world_size", "limit"), [(1, 6), (2, 4), (4, 1)])
def test_accumulation_changes_no_image(cfg: DataConfig, expected: list[Batch], world_size: int, limit: int) -> None:
    with ranks_of(cfg, world_size, limit) as ranks:
        assert ranks.plan.accumulate_steps > 1
        assert all(same(ranks.step(), step) for step in expected)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 3), (4, 2), (1, 4)])
def test_seek_in_mid_epoch_on_another_world_goes_on_with_the_right_images(
    cfg: DataConfig, expected: list[Batch], before: int, after: int
) -> None:
    with ranks_of(cfg, before) as ranks:
        for _ in range(3):
            ranks.step()
        (position,) = ranks.positions()
    assert position == Position(1, GLOBAL_BATCH)
    with ranks_of(cfg, after) as ranks:
        ranks.seek(position)
        assert ranks.positions() == {position}
        assert same(ranks.step(), expected[3])
        assert same(ranks.step(), expected[4])
        ranks.seek(Position(0, GLOBAL_BATCH))  # and back again, out of a running pipeline
        assert same(ranks.step(), expected[1])


def test_position_counts_what_was_handed_out_not_what_was_prefetched(cfg: DataConfig) -> None:
    with ranks_of(cfg, 2, 6) as ranks:
        seen = [ranks.positions()]
        for _ in range(5):
            ranks.micro()
            seen.append(ranks.positions())
    assert seen == [{Position(e, o)} for e, o in [(0, 0), (0, 12), (0, 24), (0, 36), (1, 0), (1, 12)]]


def test_each_training_image_at_most_once_an_epoch_and_the_tail_is_counted(
    cfg: DataConfig, expected: list[Batch]
) -> None:
    with ranks_of(cfg, 1) as ranks:
        plan = ranks.plan
    for first in (0, 2):
        epoch = torch.cat([expected[first].index_N, expected[first + 1].index_N])
        assert len(epoch.unique()) == len(epoch) == TRAIN_IMAGES - plan.dropped_images_per_epoch
    assert not torch.equal(expected[0].index_N, expected[2].index_N)


def test_images_of_an_epoch_differ_from_those_of_the_next_but_labels_stay(
    cfg: DataConfig, expected: list[Batch]
) -> None:
    a, b = joined(expected[:2]), joined(expected[2:4])
    both = sorted(set(a.index_N.tolist()) & set(b.index_N.tolist()))
    rows = [(a.index_N.tolist().index(i), b.index_N.tolist().index(i)) for i in both]
    assert all(a.labels_N[i] == b.labels_N[j] for i, j in rows)
    if cfg.source != "synthetic":  # which has no augmentation
        assert not any(torch.equal(a.images_NCHW[i], b.images_NCHW[j]) for i, j in rows)


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (2, 1), (3, 1), (2, 2), (1, 4), (3, 4)])
def test_threads_and_prefetch_change_nothing(
    cfg: DataConfig, expected: list[Batch], threads: int, prefetch: int
) -> None:
    with ranks_of(cfg.model_copy(update={"threads_per_rank": threads, "prefetch_batches": prefetch}), 2) as ranks:
        assert all(same(ranks.step(), step) for step in expected)


def test_channels_last_is_a_matter_of_strides(cfg: DataConfig, expected: list[Batch]) -> None:
    with ranks_of(cfg, 1, channels_last=True) as ranks:
        batch = ranks.step()
    assert batch.images_NCHW.is_contiguous(memory_format=torch.channels_last)
    assert expected[0].images_NCHW.is_contiguous()
    assert same(batch, expected[0])


def test_batches_are_normalized_float32_with_int64_labels_and_stay_valid(cfg: DataConfig) -> None:
    with ranks_of(cfg, 1) as ranks:
        batches = [ranks.step() for _ in range(10)]
        copies = [batch.images_NCHW.clone() for batch in batches]
    batch = batches[0]
    assert batch.images_NCHW.shape == (GLOBAL_BATCH, 3, 24, 24)
    assert (batch.images_NCHW.dtype, batch.labels_N.dtype) == (torch.float32, torch.int64)
    assert (batch.weight_N.dtype, batch.index_N.dtype) == (torch.float32, torch.int64)
    assert float(batch.images_NCHW.abs().max()) < 4
    assert float(batch.images_NCHW.std()) > 0.3
    assert all(torch.equal(b.images_NCHW, copy) for b, copy in zip(batches, copies, strict=True))


def test_seek_refuses_a_position_of_another_global_batch(cfg: DataConfig) -> None:
    with ranks_of(cfg, 1) as ranks, pytest.raises(ConfigError, match=r"train\.global_batch"):
        ranks.seek(Position(0, 7))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_sees_each_image_once_and_padding_weighs_nothing(cfg: DataConfig, world_size: int) -> None:
    passes = [evaluation(cfg, world_size, number_of_passes=2), evaluation(cfg, 1, number_of_passes=1)]
    for batch in (*passes[0], passes[1][0]):
        counted = batch.weight_N == 1
        assert sorted(batch.index_N[counted].tolist()) == list(range(EVAL_IMAGES))
        assert float(batch.weight_N.sum()) == EVAL_IMAGES
        assert (batch.index_N[~counted] == EVAL_IMAGES - 1).all()
    by_index = [images_by_index(batch) for batch in (*passes[0], passes[1][0])]
    assert torch.equal(by_index[0], by_index[1])
    assert torch.equal(by_index[0], by_index[2])


def test_evaluation_can_be_left_and_taken_up(cfg: DataConfig) -> None:
    plan = plan_of(run_config(cfg, GLOBAL_BATCH), 1, TRAIN_IMAGES, EVAL_IMAGES, CLASSES)
    source = make_eval_source(cfg, plan, World(), SEED, "cpu", False, 4)
    first = list(islice(source, 2))
    assert source.position() == Position(0, 8)
    rest = list(source)
    assert source.position() == Position(0, 0)
    assert len(first) + len(rest) == plan.eval_steps
    source.seek(Position(0, 8))
    assert same(next(iter(source)), rest[0])
    source.close()
    source.close()


def evaluation(cfg: DataConfig, world_size: int, number_of_passes: int) -> list[Batch]:
    """All ranks' batches of each pass, joined."""
    plan = plan_of(run_config(cfg, GLOBAL_BATCH), world_size, TRAIN_IMAGES, EVAL_IMAGES, CLASSES)
    batches: list[list[Batch]] = [[] for _ in range(number_of_passes)]
    for rank in range(world_size):
        world = World(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size)
        source = make_eval_source(cfg, plan, world, SEED, "cpu", False, 4)
        for found in batches:
            own = list(source)
            assert len(own) == plan.eval_steps
            found += own
        source.close()
    return [joined(found) for found in batches]


def images_by_index(batch: Batch) -> torch.Tensor:
    counted = batch.weight_N == 1
    return batch.images_NCHW[counted][np.argsort(batch.index_N[counted].numpy())]
