"""Virtual shards in the plan, and the recipe that no number of ranks changes."""

import dataclasses

import pytest
from pydantic import ValidationError

from ii_dist.config import ConfigError, DataFacts, RunConfig, make_plan

FACTS = DataFacts(1_281_167, 50_000, 1000)
OF_THE_RANKS = {"world_size", "images_per_rank", "micro_batch", "accumulate_steps", "eval_steps"}


def config(shards: int = 0, batch: int = 48, **more: object) -> RunConfig:
    tree = {"name": "x", "runtime": {"canonical_shards": shards}, "train": {"global_batch": batch}}
    for key, value in more.items():
        group, _, name = key.partition("__")
        tree[group] = {**tree.get(group, {}), name: value}  # type: ignore[dict-item]
    return RunConfig.model_validate(tree)


@pytest.mark.parametrize("world_size", range(1, 65))
def test_the_recipe_is_the_same_on_any_number_of_ranks(world_size: int) -> None:
    cfg = config(batch=40 * world_size, engine__ema_half_life_epochs=2.0, train__max_images_per_rank=7)
    one, many = (dataclasses.asdict(make_plan(cfg, ranks, FACTS)) for ranks in (1, world_size))
    assert {key for key in one if one[key] != many[key]} <= OF_THE_RANKS
    assert many["micro_batch"] * many["accumulate_steps"] * world_size == many["global_batch"] == 40 * world_size


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_a_shard_is_a_micro_batch_on_any_number_of_ranks(world_size: int) -> None:
    plan = make_plan(config(12), world_size, FACTS)
    assert (plan.canonical_shards, plan.micro_batch, plan.accumulate_steps) == (12, 4, 12 // world_size)
    assert plan.images_per_rank * world_size == 48


@pytest.mark.parametrize(
    ("cfg", "ranks", "said"),
    [
        (
            config(5),
            1,
            r"canonical_shards 5: train\.global_batch 48 gives no equal shards; use one of 1, 2, 3, 4, 6, 8",
        ),
        (config(4), 3, r"does not divide over 3 ranks; use one of 1, 2, 4 ranks, or one of 3, 6, 12, 24, 48 shards"),
        (config(48, data__augment={"mixup_alpha": 0.2}), 1, r"no whole pairs of images; use one of 1, 2, 3, 4, 6, 8"),
        (config(4, train__max_images_per_rank=8), 1, r"a shard is 12 images, more than train\.max_images_per_rank 8"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(cfg: RunConfig, ranks: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        make_plan(cfg, ranks, FACTS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine__kind": "deepspeed"}, "needs engine.kind ddp"),
        ({"engine__compress_gradients": "bf16"}, "not with engine.compress_gradients"),
        ({"engine__static_graph": True}, "static_graph"),
        ({"engine__sync_batchnorm": True}, "sync_batchnorm"),
        ({"train__max_images_per_rank": "auto"}, "needs a number as train.max_images_per_rank"),
    ],
)
def test_what_virtual_shards_exclude(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=rf"runtime\.canonical_shards 4: .*{said}"):
        config(4, **changes)
