"""What ranks tell of what they are about to read, and the faults that are seen in it. No group: ranks are simulated."""

import dataclasses

import numpy as np
import pytest

from ii_dist.config import DataConfig, Plan
from ii_dist.data import Position, make_eval_source, make_train_source
from ii_dist.data.augment import TrainWindows
from ii_dist.data.digests import (
    I64,
    PADDING,
    Outlook,
    batches_to_look_at,
    describe_difference,
    describe_equal_parameters,
    expected_rows,
)
from ii_dist.data.positions import TrainSchedule
from ii_dist.runtime import World
from tests.images import make_data_set, plan_of, run_config

IMAGES, GLOBAL_BATCH, SEED = 120, 12, 4
CFG = DataConfig(source="synthetic", synthetic_images=IMAGES, synthetic_classes=4)
EPOCH_0 = np.zeros(1, dtype=np.int64)


def plan_for(world_size: int, limit: int = 0, cfg: DataConfig = CFG, batch: int = GLOBAL_BATCH) -> Plan:
    return plan_of(run_config(cfg, batch, limit), world_size, IMAGES, 26, 4)


def outlook_of(rank: int, plan: Plan, cfg: DataConfig = CFG, at: Position | None = None) -> Outlook:
    source = make_train_source(cfg, plan, World(rank=rank, world_size=plan.world_size), SEED, "cpu", False)
    if at:
        source.seek(at)
    outlook = source.outlook()
    source.close()
    return outlook


def told(plan: Plan, ranks: list[int], numbers: list[int]) -> tuple[I64, I64]:
    """What a world says whose n-th process reads as rank `ranks[n]`; the epoch of each batch."""
    rows = np.stack([outlook_of(rank, plan).rows(numbers) for rank in ranks])
    return rows, np.array(numbers) // (plan.steps_per_epoch * plan.accumulate_steps)


@pytest.mark.parametrize(("world_size", "limit"), [(1, 0), (2, 3), (3, 0), (4, 1)])
def test_a_right_world_reads_what_the_plan_says(world_size: int, limit: int) -> None:
    plan = plan_for(world_size, limit)
    numbers = batches_to_look_at(outlook_of(0, plan).request.schedule, world_size, 0)
    per_epoch = plan.steps_per_epoch * plan.accumulate_steps
    assert numbers == list(range(per_epoch + 1))
    rows, epochs = told(plan, list(range(world_size)), numbers)
    assert np.array_equal(rows, expected_rows(plan, SEED, numbers))
    assert np.array_equal(np.sort(rows[:, :-1].ravel()), np.arange(IMAGES))  # 10 steps of 12: the whole epoch
    assert describe_difference(rows, expected_rows(plan, SEED, numbers), epochs) == ""


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([0, 1, 0, 1], "ranks 0 and 2 read the same images (60 read more than once); rank 2 reads the share of rank 0; "
                       "rank 3 reads the share of rank 1"),
        ([0, 1, 1, 3], "ranks 1 and 2 read the same images (30 read more than once); rank 2 reads the share of rank 1"),
        ([1, 0, 2, 3], "rank 0 reads the share of rank 1; rank 1 reads the share of rank 0"),
        ([0, 0, 0, 0], "ranks 0 and 1 read the same images (30 read more than once); rank 1 reads the share of rank 0; "
                       "rank 2 reads the share of rank 0; rank 3 reads the share of rank 0"),
    ],
)  # fmt: skip
def test_wrong_rank_numbers_are_named(ranks: list[int], said: str) -> None:
    plan = plan_for(4)
    numbers = list(range(10))
    rows, epochs = told(plan, ranks, numbers)
    assert describe_difference(rows, expected_rows(plan, SEED, numbers), epochs) == said


def test_one_wrong_image_in_one_late_step_is_seen() -> None:
    plan = plan_for(4)
    numbers = list(range(11))
    rows, epochs = told(plan, [0, 1, 2, 3], numbers)
    expected = rows.copy()
    rows[2, 7, 1] = rows[3, 5, 0]
    said = describe_difference(rows, expected, epochs)
    assert said.startswith("ranks 2 and 3 read the same images (1 read more than once); 1 of 33 images of rank 2 are")
    rows[2, 7, 1] = rows[2, 6, 1]
    assert describe_difference(rows, expected, epochs).startswith("rank 2 reads an image twice in one epoch (1 read")
    rows[2, 7, 1] = rows[2, 10, 1]  # batch 10 belongs to the next epoch: the same image may come again there
    again_in_epoch = rows[2, 7, 1] in np.delete(expected[:, :10].ravel(), (2 * 10 + 7) * 3 + 1)
    assert ("more than once" in describe_difference(rows, expected, epochs)) == again_in_epoch


def test_equal_rows_are_no_proof_without_each_image_once() -> None:
    twice = np.array([[[1, 2]], [[3, 1]]])
    assert describe_difference(twice, twice, EPOCH_0) == "ranks 0 and 1 read the same images (1 read more than once)"


def test_the_same_image_in_the_next_epoch_is_no_repeat() -> None:
    rows = np.array([[[5], [5]]])
    assert describe_difference(rows, rows, np.array([0, 1])) == ""
    assert describe_difference(rows, rows, np.array([1, 1])).startswith("rank 0 reads an image twice")


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_evaluation_padding_counts_for_nobody(world_size: int) -> None:
    plan = plan_for(world_size)
    worlds = [World(rank=rank, world_size=world_size) for rank in range(world_size)]
    outlooks = [make_eval_source(CFG, plan, world, SEED, "cpu", False, 4).outlook() for world in worlds]
    numbers = batches_to_look_at(outlooks[0].request.schedule, world_size, 0)
    rows = np.stack([outlook.rows(numbers) for outlook in outlooks])
    assert numbers == list(range(plan.eval_steps))
    assert sorted(rows[rows != PADDING].tolist()) == list(range(26))
    assert describe_difference(rows, expected_rows(plan, SEED, numbers, eval_batch=4), np.zeros_like(numbers)) == ""


def test_a_large_epoch_is_looked_at_at_its_borders() -> None:
    plan = dataclasses.replace(plan_for(4), steps_per_epoch=5004, train_images=5004 * GLOBAL_BATCH)
    schedule = TrainSchedule(plan, 0, SEED)
    assert batches_to_look_at(schedule, 4, 0, limit=36) == [0, 1, 2, 2503, 5003, 5004]
    assert batches_to_look_at(schedule, 4, 5002, limit=360) == [5002, 5003, 5004]
    assert batches_to_look_at(schedule, 4, 5004 + 1000, limit=1) == [6004, 8006, 10007, 10008]


def test_outlook_stands_where_the_source_stands() -> None:
    plan = plan_for(2)
    outlook = outlook_of(1, plan, at=Position(3, 24))
    assert (outlook.number, outlook.position) == (32, Position(3, 24))
    assert outlook.index_sha256 == ""
    assert not outlook.parameter_hashes(0, np.arange(5)).any()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    root = make_data_set(tmp_path_factory.mktemp("set"), 4, IMAGES // 4, 2, (60, 44))
    return DataConfig(source="torch", root=str(root))


def test_parameters_are_those_of_the_image_on_every_rank(files: DataConfig) -> None:
    plan = dataclasses.replace(plan_for(2, cfg=files), eval_images=8)
    first, second = (outlook_of(rank, plan, files) for rank in (0, 1))
    rows = np.arange(40)
    hashes = first.parameter_hashes(2, rows)
    assert len(np.unique(hashes)) == 40
    assert np.array_equal(second.parameter_hashes(2, rows[::-1]), hashes[::-1])
    assert not (first.parameter_hashes(3, rows) == hashes).any()
    assert first.index_sha256 == second.index_sha256 != ""


def test_augmentation_by_place_instead_of_by_image_is_seen(files: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = dataclasses.replace(plan_for(2, cfg=files, batch=40), eval_images=8)
    outlooks = [outlook_of(rank, plan, files) for rank in (0, 1)]
    hashes = np.stack([o.parameter_hashes(0, o.rows([0]).ravel()) for o in outlooks])
    assert describe_equal_parameters(hashes) == ""
    by_place = TrainWindows(*(np.arange(20, dtype=np.int32) for _ in dataclasses.fields(TrainWindows)))
    monkeypatch.setattr("ii_dist.data.source.train_windows", lambda *_: by_place)
    hashes = np.stack([o.parameter_hashes(0, o.rows([0]).ravel()) for o in outlooks])
    assert describe_equal_parameters(hashes) == "ranks 0 and 1 augment their images with the same random numbers"
    assert describe_equal_parameters(np.zeros_like(hashes)) == ""  # no augmentation: nothing varies
