"""With every augmentation on, a global step has the same bits on any number of ranks, threads and batches ahead."""

from pathlib import Path

import pytest
import torch

from ii_dist.config import DataConfig
from ii_dist.config.augment import AugmentConfig
from ii_dist.data import Batch, Position
from tests.images import make_data_set, plan_of, run_config
from tests.simulated_ranks import SimulatedRanks, same

CLASSES, PER_CLASS = 3, 33
IMAGES = CLASSES * PER_CLASS
GLOBAL_BATCH = 48  # whole pairs on 1, 2, 3, 4 and 8 ranks; 99 images: 2 steps an epoch, 3 images dropped
STEPS = 5  # into the third epoch
SEED = 11
EVERYTHING = {
    "crop_scale": (0.3, 1.0),
    "colour_jitter": (0.4, 0.4, 0.4, 0.1),
    "policy": "randaugment",
    "erase_probability": 0.5,
    "erase_fill": "noise",
    "mixup_alpha": 0.4,
    "cutmix_alpha": 1.0,
    "mix_probability": 0.8,
}
SIZES = {"size_schedule": ((0, 24), (1, 32)), "size_multiple": 8}


def everything(**changes: object) -> AugmentConfig:
    return AugmentConfig.model_validate(EVERYTHING | changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_set(tmp_path_factory.mktemp("set"), CLASSES, PER_CLASS, 2, (60, 44))


@pytest.fixture(scope="module", params=["dali", "torch"])
def cfg(request: pytest.FixtureRequest, root: Path) -> DataConfig:
    values = {"source": request.param, "root": str(root), "image_size": 24, "threads_per_rank": 1, **SIZES}
    return DataConfig.model_validate(values | {"augment": everything()})


@pytest.fixture(scope="module")
def expected(cfg: DataConfig) -> list[Batch]:
    """One rank that nobody disturbs."""
    with ranks_of(cfg, 1) as ranks:
        return [ranks.step() for _ in range(STEPS)]


def ranks_of(cfg: DataConfig, world_size: int, max_images_per_rank: int = 0) -> SimulatedRanks:
    run = run_config(cfg, GLOBAL_BATCH, max_images_per_rank)
    return SimulatedRanks(cfg, plan_of(run, world_size, IMAGES, CLASSES * 2, CLASSES), SEED)


def test_every_augmentation_really_changes_the_images(cfg: DataConfig, expected: list[Batch]) -> None:
    off = {"colour_jitter": (0.0,) * 4, "policy": "none", "erase_probability": 0.0}
    off |= {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}
    for name, value in off.items():
        with ranks_of(cfg.model_copy(update={"augment": everything(**{name: value})}), 1) as ranks:
            assert not torch.equal(ranks.step().images_NCHW, expected[0].images_NCHW), name


@pytest.mark.parametrize(("world_size", "limit"), [(2, 0), (3, 4), (4, 0), (8, 0), (8, 2)])
def test_any_number_of_ranks(cfg: DataConfig, expected: list[Batch], world_size: int, limit: int) -> None:
    with ranks_of(cfg, world_size, limit) as ranks:
        assert ranks.plan.accumulate_steps == (GLOBAL_BATCH // world_size // limit if limit else 1)
        assert [same(ranks.step(), step) for step in expected] == [True] * STEPS


@pytest.mark.parametrize(("threads", "prefetch"), [(2, 1), (3, 2), (3, 4)])
def test_any_threads_and_prefetch(cfg: DataConfig, expected: list[Batch], threads: int, prefetch: int) -> None:
    changed = cfg.model_copy(update={"threads_per_rank": threads, "prefetch_batches": prefetch})
    with ranks_of(changed, 2) as ranks:
        assert [same(ranks.step(), step) for step in expected] == [True] * STEPS


@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 3), (4, 2), (3, 1)])
def test_seek_out_of_a_running_pipeline_and_into_a_fresh_one(
    cfg: DataConfig, expected: list[Batch], before: int, after: int
) -> None:
    with ranks_of(cfg, before) as ranks:
        for _ in range(3):
            ranks.step()
        (position,) = ranks.positions()
        ranks.seek(Position(0, GLOBAL_BATCH))
        assert same(ranks.step(), expected[1])
    assert position == Position(1, GLOBAL_BATCH)
    with ranks_of(cfg, after) as ranks:
        ranks.seek(position)
        assert [same(ranks.step(), step) for step in expected[3:]] == [True] * (STEPS - 3)


@pytest.mark.parametrize("policy", ["trivialaugment", "autoaugment"])
def test_other_policies(cfg: DataConfig, policy: str) -> None:
    changed = cfg.model_copy(update={"augment": everything(policy=policy)})
    with ranks_of(changed, 1) as one, ranks_of(changed, 4) as four:
        four.seek(Position(0, GLOBAL_BATCH))
        one.step()
        assert same(one.step(), four.step())
