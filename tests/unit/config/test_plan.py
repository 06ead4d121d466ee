"""The plan: what follows from a config, a world size and a data set."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ii_dist.config import ConfigError, DataFacts, RunConfig, TrainConfig, gpu_count, make_plan

IMAGENET = DataFacts(train_images=1_281_167, eval_images=50_000, num_classes=1000)
OF_THE_RANKS = {"world_size", "images_per_rank", "micro_batch", "accumulate_steps", "eval_steps"}


def config(**train: object) -> RunConfig:
    return RunConfig(name="x", train=TrainConfig.model_validate({"global_batch": 1024, **train}))


def test_imagenet_numbers() -> None:
    plan = make_plan(config(), 8, IMAGENET)
    assert (plan.images_per_rank, plan.micro_batch, plan.accumulate_steps) == (128, 128, 1)
    assert (plan.steps_per_epoch, plan.dropped_images_per_epoch) == (1251, 1_281_167 - 1251 * 1024)
    assert (plan.total_steps, plan.warmup_steps) == (1251 * 90, 1251 * 5)
    assert plan.peak_lr == pytest.approx(0.4)
    assert plan.eval_steps == 98


@given(world_size=st.sampled_from([1, 2, 4, 8, 16, 128]))
def test_the_recipe_does_not_depend_on_the_ranks(world_size: int) -> None:
    one, many = (dataclasses.asdict(make_plan(config(), n, IMAGENET)) for n in (1, world_size))
    assert {k for k in one if one[k] != many[k]} <= OF_THE_RANKS


@given(world_size=st.sampled_from([1, 2, 4, 8]), limit=st.integers(1, 2000))
def test_micro_batches_are_whole_and_respect_the_limit(world_size: int, limit: int) -> None:
    plan = make_plan(config(max_images_per_rank=limit), world_size, IMAGENET)
    assert plan.micro_batch * plan.accumulate_steps * world_size == 1024
    assert plan.micro_batch <= limit
    fewer = [a for a in range(1, plan.accumulate_steps) if plan.images_per_rank % a == 0]
    assert all(plan.images_per_rank // a > limit for a in fewer)


def test_a_batch_that_does_not_divide_is_refused_with_what_would() -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch 1024: does not divide over 3 ranks.*1, 2, 4 ranks"):
        make_plan(config(), 3, IMAGENET)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="the data set has 10 training images"):
        make_plan(config(), 1, DataFacts(10, 10, 2))


def test_gpus_are_counted_from_device_files(tmp_path) -> None:  # type: ignore[no-untyped-def]
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert gpu_count({}, tmp_path) == 2
    assert gpu_count({"CUDA_VISIBLE_DEVICES": "1"}, tmp_path) == 1
    assert gpu_count({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0
    assert gpu_count({"CUDA_VISIBLE_DEVICES": "-1"}, tmp_path) == 0
