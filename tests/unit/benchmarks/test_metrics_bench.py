"""The benchmark of numbers compares what it says: a trainer that writes all of them, and one that writes none."""

import json

import torch

from benchmarks.metrics import BATCH, CLASSES, RANKS, look_seconds, to_markdown, two_trainers, without_counting
from benchmarks.step import trainer_block
from ii_dist.data import Batch
from ii_dist.metrics.ranks import PLACES


def test_one_side_writes_all_and_the_other_nothing() -> None:
    batch = Batch(torch.randn(BATCH, 3, 4, 4), torch.arange(BATCH) % CLASSES, torch.ones(BATCH), torch.arange(BATCH))
    with two_trainers(batch) as (run, bare):
        lines = run.folder.rank_metrics(0)
        steps = run.plan.log_every_steps
        before = len(lines.read_text().splitlines())
        trainer_block(bare)(2 * steps)
        without_counting(trainer_block(bare))(steps)
        assert len(lines.read_text().splitlines()) == before
        trainer_block(run)(2 * steps)
        rows = [json.loads(line) for line in lines.read_text().splitlines()[before:]]
        assert [row["step"] for row in rows] == [steps, 2 * steps]
        assert rows[1].keys() >= {"train/loss", "time/forward_s", "ranks/forward_median_s", "memory/rss_gib"}
        assert len(run.ranks.row(dict.fromkeys(PLACES, 1.0))) == RANKS * len(PLACES)


def test_the_table_says_what_was_measured() -> None:
    assert 0 < look_seconds(2) < 0.1
    figures = {"numbers_us": 40.0, "noise_us": 1.0, "counting_us": 20.0, "look_us": 100.0, "looks_us": 1.2}
    assert "| 41 us | 1 us | <= 60 us |" in to_markdown(figures)
