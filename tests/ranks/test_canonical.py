"""Virtual shards: losses and weights have the same bits on any number of ranks, and across a chain of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks.canonical_program import BAD_STEP, STEPS
from tests.ranks.start import run_ranks
from tests.ranks.test_train import curve, prepare, train, weights

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(300)]
CANONICAL = (
    "runtime.canonical_shards=4",
    "optim.clip_norm=1.0",
    "data.augment.mixup_alpha=0.2",
    "train.global_batch=16",
    "data.synthetic_images=64",
    "train.epochs=3",
)
LAST = 12


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    folder = tmp_path_factory.mktemp("canonical")
    assert run_ranks(["-m", "tests.ranks.canonical_program", str(folder / "seen.json")], 4, folder) == [0] * 4
    return {int(ranks): rows for ranks, rows in json.loads((folder / "seen.json").read_text()).items()}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_losses_and_state_have_the_same_bits(seen: dict[int, Any], ranks: int) -> None:
    """12 shards: branches of the tree on 1, 2 and 4 ranks, single shards on 3. 3 ranks round the logged norm's mean."""
    one, here = seen[1]["whole"], seen[ranks]["whole"]
    assert here["curve"] == one["curve"]
    assert here["state"] == one["state"]
    assert len({step[0] for step in one["curve"]}) == STEPS  # it did train
    assert any(name.startswith("optimizer.") for name in one["state"])
    assert any(name.startswith("ema.") for name in one["state"])
    assert {"model.1.running_var", "model.1.num_batches_tracked"} <= set(one["state"])
    assert seen[ranks]["small_buckets"] == one


def test_a_step_with_a_bad_number_is_left_out_alike(seen: dict[int, Any]) -> None:
    for ranks in (1, 2, 3, 4):
        skipped = [float.fromhex(step[4]) for step in seen[ranks]["whole"]["curve"]]
        assert skipped == [float(step == BAD_STEP) for step in range(STEPS)]


def test_a_run_that_moves_between_ranks_is_the_run_that_did_not(seen: dict[int, Any]) -> None:
    """Four steps each on 4 ranks, 2 ranks and 1 rank."""
    chain = [step for ranks in (4, 2, 1) for step in seen[ranks]["moved"]["curve"]]
    assert chain == seen[1]["whole"]["curve"]
    assert seen[1]["moved"]["state"] == seen[1]["whole"]["state"]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_sum_in_the_order_of_ranks_would_be_seen(seen: dict[int, Any], ranks: int) -> None:
    mutant, one = seen[ranks]["mutant"], seen[1]["mutant"]
    assert mutant["curve"] != one["curve"]
    assert mutant["state"] != one["state"]


def numbers(row: dict[str, Any]) -> list[list[float]]:
    """(loss, top1, images, norm, skipped) of each step."""
    return [[float.fromhex(value) for value in step] for step in row["curve"]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_plain_engine_trains_alike(seen: dict[int, Any], ranks: int) -> None:
    """With the same micro-batches and no dropout, whose draws go by rank there."""
    for one, other in zip(numbers(seen[ranks]["undropped"]), numbers(seen[ranks]["plain"]), strict=True):
        assert one == pytest.approx(other, rel=1e-5, nan_ok=True)
        assert one[2] == 24.0


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_static_graph_trains_alike(seen: dict[int, Any], ranks: int) -> None:
    """With accumulation, which leaves exchanges out; and resumed in the middle."""
    for one, other in zip(numbers(seen[ranks]["static"]), numbers(seen[ranks]["plain"]), strict=True):
        assert one == pytest.approx(other, rel=1e-5, nan_ok=True)
    assert seen[ranks]["static_resumed"]["curve"] == seen[ranks]["static"]["curve"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_compressed_gradients_are_close(seen: dict[int, Any], ranks: int) -> None:
    compressed, plain = numbers(seen[ranks]["compressed"]), numbers(seen[ranks]["plain"])
    assert compressed[0][0] == plain[0][0]  # the first loss is of the same weights
    for one, other in zip(compressed, plain, strict=True):
        assert [one[0], one[3]] == pytest.approx([other[0], other[3]], rel=0.02, nan_ok=True)
        assert one[4] == other[4]
    assert all(one[3] != other[3] for one, other in zip(compressed, plain, strict=True))
    assert seen[1]["compressed"] == seen[1]["plain"]  # there is nobody to send them to


def test_whole_runs_on_1_then_4_then_2_ranks(tmp_path: Path) -> None:
    """With stochastic depth, Mixup, clipping and the average; from real checkpoints."""
    config = prepare(tmp_path)
    assert train(config, *CANONICAL, ranks=1, name="whole") == [0]
    assert train(config, *CANONICAL, "train.stop_after_steps=5", ranks=1) == [75]
    assert train(config, *CANONICAL, "train.stop_after_steps=9", ranks=4) == [75] * 4
    assert train(config, *CANONICAL, ranks=2) == [0] * 2
    assert sorted(curve(config, "whole")) == list(range(1, LAST + 1))
    assert curve(config) == curve(config, "whole")
    assert weights(config, step=LAST) == weights(config, "whole", step=LAST)
    assert evaluations(config) == evaluations(config, "whole")


def evaluations(config: Path, name: str = "run") -> list[tuple[float, float, float]]:
    lines = (config.parent / "runs" / name / "metrics" / "rank_00000.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "eval/images" in row]
    assert rows
    return [(row["step"], row["eval/loss"], row["eval/top1"]) for row in rows]
