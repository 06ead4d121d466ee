"""Config keys of mixed images, sizes by epoch and types: what follows from them, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ii_dist.config import (
    ConfigError,
    DataConfig,
    DataFacts,
    EngineConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    load_config,
    make_plan,
    recipe_differences,
)

FACTS = DataFacts(1000, 100, 10)
MIXED = {"augment": {"mixup_alpha": 0.2}}


def run(data: dict[str, object], **train: object) -> RunConfig:
    return RunConfig(
        name="x",
        data=DataConfig.model_validate({"source": "synthetic", **data}),
        train=TrainConfig.model_validate(train),
        optim=OptimConfig(warmup_epochs=0),
    )


def straight_line(points: list[list[int]], multiple: int, epoch: int) -> float:
    epochs, sides = zip(*points, strict=True)
    return float(np.interp(epoch, epochs, sides)) / multiple


@given(
    steps=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    multiple=st.sampled_from([1, 8, 32]),
    epoch=st.integers(0, 40),
)
def test_sides_lie_on_the_line_between_points(steps: list[tuple[int, int]], multiple: int, epoch: int) -> None:
    points = [[sum(gap for gap, _ in steps[: i + 1]), side * multiple] for i, (_, side) in enumerate(steps)]
    cfg = DataConfig.model_validate({"size_schedule": points, "size_multiple": multiple})
    side = cfg.side_of_epoch(epoch)
    assert side % multiple == 0
    assert abs(side / multiple - straight_line(points, multiple, epoch)) <= 0.5 + 1e-9


def test_the_recipes_that_the_keys_say() -> None:
    ramp = DataConfig.model_validate({"size_schedule": [[0, 160], [65, 160], [76, 192]]})
    # FFCV's ResNet-50: np.interp, rounded to the nearest multiple of 32.
    theirs = [round(np.interp(epoch, [65, 76], [160, 192]) / 32) * 32 for epoch in range(88)]
    assert [ramp.side_of_epoch(epoch) for epoch in range(88)] == theirs
    step = DataConfig.model_validate({"size_schedule": [[0, 128], [17, 128], [18, 224]]})
    assert {e: step.side_of_epoch(e) for e in (0, 17, 18, 90)} == {0: 128, 17: 128, 18: 224, 90: 224}
    down = DataConfig.model_validate({"size_schedule": [[2, 64], [4, 32]], "size_multiple": 8})
    assert [down.side_of_epoch(epoch) for epoch in range(6)] == [64, 64, 64, 48, 32, 32]
    assert {DataConfig(image_size=100).side_of_epoch(epoch) for epoch in (0, 7)} == {100}


def test_the_plan_lists_every_change_of_size() -> None:
    data = {"size_schedule": [[1, 32], [3, 64]], "size_multiple": 16}
    assert make_plan(run(data, epochs=5.0), 1, FACTS).image_sizes == ((0, 32), (2, 48), (3, 64))
    assert make_plan(run(data, epochs=2.0), 1, FACTS).image_sizes == ((0, 32),)
    assert make_plan(run({}, epochs=2.5), 1, FACTS).image_sizes == ((0, 224),)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"size_schedule": [[0, 160], [0, 192]]}, "each after the one before it"),
        ({"size_schedule": [[-1, 160]]}, "epochs of 0 and more"),
        ({"size_schedule": [[0, 150]]}, r"multiples of size_multiple \(32\)"),
        ({"size_schedule": [[0, 0]]}, "sides that are multiples"),
    ],
)
def test_wrong_schedules_are_refused(data: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        DataConfig.model_validate(data)


def test_wrong_schedules_are_refused_in_one_line_from_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "run.yaml"
    path.write_text("name: x\ndata: {size_schedule: [[0, 160], [16, 190]]}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: data\.size_schedule \[\[0, 160\], \[16, 190\]\]: needs sides"):
        load_config(path)
    path.write_text("name: x\n")
    loaded = load_config(path, ["data.size_schedule=[[0, 64], [2, 96]]", "data.augment.cutmix_alpha=1"])
    assert loaded.data.size_schedule == ((0, 64), (2, 96))
    with pytest.raises(ConfigError, match=r"data\.size_schedule.*needs a whole number"):
        load_config(path, ["data.size_schedule=[[0, 64.5]]"])
    assert recipe_differences(load_config(path), loaded) == [
        "data.size_schedule: [] -> [[0, 64], [2, 96]]",
        "data.augment.cutmix_alpha: 0.0 -> 1.0",
    ]


def test_micro_batches_of_mixed_images_hold_whole_pairs() -> None:
    plain = make_plan(run({}, global_batch=24, max_images_per_rank=3), 2, FACTS)
    assert (plain.accumulate_steps, plain.micro_batch) == (4, 3)
    mixed = make_plan(run(MIXED, global_batch=24, max_images_per_rank=3), 2, FACTS)
    assert (mixed.accumulate_steps, mixed.micro_batch) == (6, 2)
    assert make_plan(run(MIXED, global_batch=24), 4, FACTS).micro_batch == 6
    assert make_plan(run({"augment": {"mixup_alpha": 1.0, "mix_probability": 0.0}}, global_batch=24), 8, FACTS)
    with pytest.raises(
        ConfigError, match=r"global_batch 24: 3 images a rank are no whole pairs.*multiple of 16.*1, 2,"
    ) as e:
        make_plan(run(MIXED, global_batch=24), 8, FACTS)
    assert "\n" not in str(e.value)
    assert str(e.value).endswith("or one of 1, 2, 3, 4, 6, 12 ranks")
    with pytest.raises(ConfigError, match=r"global_batch 9: 3 images a rank.*use a multiple of 6$"):
        make_plan(run(MIXED, global_batch=9), 3, FACTS)
    with pytest.raises(ConfigError, match=r"max_images_per_rank 1: .*use 2 or more"):
        make_plan(run(MIXED, global_batch=24, max_images_per_rank=1), 2, FACTS)


@given(world_size=st.sampled_from([1, 2, 3, 4, 6, 12]), limit=st.integers(2, 60))
def test_pairs_respect_the_limit_with_the_fewest_micro_batches(world_size: int, limit: int) -> None:
    plan = make_plan(run(MIXED, global_batch=48, max_images_per_rank=limit), world_size, FACTS)
    assert plan.micro_batch % 2 == 0
    assert plan.micro_batch <= limit
    assert plan.micro_batch * plan.accumulate_steps * world_size == 48
    larger = [m for m in range(plan.micro_batch + 2, limit + 1, 2) if plan.images_per_rank % m == 0]
    assert not larger


def test_types_of_images_follow_the_precision() -> None:
    def kinds(precision: str, dtype: str = "auto") -> tuple[str, str]:
        engine, data = EngineConfig.model_validate({"precision": precision}), {"image_dtype": dtype}
        cfg = RunConfig(name="x", engine=engine, data=DataConfig.model_validate(data))
        return cfg.data_on("cpu").image_dtype, cfg.data_on("cuda").image_dtype

    assert kinds("fp32") == ("float32", "float32")
    assert kinds("bf16") == ("float32", "bfloat16")
    assert kinds("fp16") == ("float32", "float16")
    assert kinds("bf16", "bfloat16") == ("bfloat16", "bfloat16")
    assert kinds("bf16", "float32") == ("float32", "float32")
    with pytest.raises(ValidationError, match=r"data.image_dtype float16: engine.precision fp32 needs auto or float32"):
        kinds("fp32", "float16")
    with pytest.raises(ValidationError, match=r"engine.precision bf16 needs auto, bfloat16 or float32"):
        kinds("bf16", "float16")


def test_a_threshold_is_for_bce() -> None:
    assert OptimConfig(loss="bce", bce_target_threshold=0.2).bce_target_threshold == 0.2
    with pytest.raises(ValidationError, match=r"bce_target_threshold 0.2: needs optim.loss bce"):
        OptimConfig(bce_target_threshold=0.2)
