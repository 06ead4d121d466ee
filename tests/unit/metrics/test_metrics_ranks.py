"""Ranks beside each other: hand-made tables, and who is named how often."""

import logging

import pytest

from ii_dist.config import EngineConfig
from ii_dist.metrics.ranks import QUIET_S, RankTable, own_phases
from ii_dist.metrics.tags import TAGS

HOSTS = ["alpha", "alpha", "beta", "beta"]
PLAIN = {
    "data_wait": 0.01,
    "copy": 0.002,
    "forward": 0.03,
    "backward": 0.06,
    "allreduce": 0.02,
    "optimizer": 0.005,
    "metrics": 0.001,
    "other": 0.002,
    "step": 0.11,
}
WAITS_FOR_DATA = PLAIN | {"data_wait": 0.03, "allreduce": 0.0, "backward": 0.04}  # the others wait for it: same step


class HandClock:
    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


def own(**engine: object) -> tuple[str, ...]:
    return own_phases(EngineConfig.model_validate({"device": "cpu", **engine}))


def line(tables: list[RankTable], seconds: list[dict[str, float]]) -> dict[str, float]:
    """One line of numbers: rows are added up as an all-reduce would; the tags of rank 0."""
    rows = [table.row(mine) for table, mine in zip(tables, seconds, strict=True)]
    sums = [sum(column) for column in zip(*rows, strict=True)]
    assert not any(table.tags(sums) for table in tables[1:])  # rank 0 writes for all
    return tables[0].tags(sums)


def tables_of(own_parts: tuple[str, ...] | None = None, clock: HandClock | None = None) -> list[RankTable]:
    parts = own() if own_parts is None else own_parts
    return [RankTable(rank, HOSTS, parts, clock or HandClock()) for rank in range(len(HOSTS))]


def test_fastest_middle_and_slowest() -> None:
    seconds = [PLAIN | {"forward": 0.03 + 0.01 * rank} for rank in (3, 0, 2, 1)]
    tags = line(tables_of(), seconds)
    assert tags.keys() <= TAGS.keys()
    assert len(tags) == 17
    assert [tags[f"ranks/forward_{kind}_s"] for kind in ("min", "median", "max")] == pytest.approx([0.03, 0.045, 0.06])
    assert tags["ranks/backward_max_s"] == 0.06
    assert tags["ranks/slowest_rank"] == 0
    assert tags["ranks/slowest_excess_share"] == pytest.approx((0.06 - 0.04) / 0.11)


def test_the_slow_one_is_who_has_more_of_its_own_and_not_who_waits() -> None:
    """All steps last equally long, and backward is longest on the ranks that wait."""
    tags = line(tables_of(), [PLAIN, PLAIN, PLAIN, WAITS_FOR_DATA])
    assert tags["ranks/slowest_rank"] == 3
    assert tags["ranks/slowest_excess_share"] == pytest.approx(0.02 / 0.11)


def test_a_straggler_is_named_after_some_lines_and_then_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    clock = HandClock()
    tables = tables_of(clock=clock)
    said = []
    for number in range(12):
        caplog.clear()
        line(tables, [PLAIN, PLAIN, WAITS_FOR_DATA if number != 5 else PLAIN, PLAIN])
        said += [number] * len(caplog.records)
        clock.s += QUIET_S / 4
    assert said == [2, 8]  # the third line in a row; again after QUIET_S, and after three new ones in a row
    caplog.clear()
    for _ in range(3):
        line(tables, [PLAIN, WAITS_FOR_DATA, PLAIN, PLAIN])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "rank 1 on alpha is slow: the others wait for it 18 % of a step; its data wait takes 30.0 ms, theirs 10.0 ms"
    )


def test_small_differences_and_changing_ones_are_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    tables = tables_of()
    for number in range(12):
        line(tables, [PLAIN | {"forward": 0.04} if rank == 1 else PLAIN for rank in range(4)])  # 9 % of a step
        line(tables, [WAITS_FOR_DATA if rank == number % 2 else PLAIN for rank in range(4)])
    tiny = {phase: seconds / 1000 for phase, seconds in PLAIN.items()}
    for _ in range(6):  # steps of 0.1 ms are not worth a word
        line(tables, [tiny, tiny, tiny, tiny | {"forward": 2 * tiny["forward"]}])
    assert not caplog.records


def test_two_ranks_are_compared_with_each_other() -> None:
    tables = [RankTable(rank, ["a", "b"], own()) for rank in range(2)]
    tags = line(tables, [PLAIN, WAITS_FOR_DATA])
    assert tags["ranks/slowest_rank"] == 1
    assert tags["ranks/slowest_excess_share"] == pytest.approx(0.02 / 0.11)


def test_a_line_in_which_a_rank_measured_nothing_compares_nobody() -> None:
    assert line(tables_of(), [PLAIN, {}, PLAIN, PLAIN]) == {}
    alone = RankTable(0, ["a"], own())
    assert alone.row(PLAIN) == []
    assert alone.tags([]) == {}


@pytest.mark.parametrize(
    ("engine", "left_out"),
    [
        ({}, set()),
        ({"kind": "deepspeed", "zero_stage": 0}, set()),
        ({"kind": "deepspeed", "zero_stage": 2}, {"backward", "optimizer"}),
        ({"kind": "deepspeed", "zero_stage": 3}, {"forward", "backward", "optimizer"}),
        ({"sync_batchnorm": True, "device": "cuda"}, {"forward", "backward", "optimizer"}),
    ],
)
def test_phases_with_other_ranks_in_them_are_nobodys_own(engine: dict[str, object], left_out: set[str]) -> None:
    assert set(own()) - set(own(**engine)) == left_out
    hidden = PLAIN | dict.fromkeys(left_out, 9.0)
    if "backward" in left_out:
        tags = line(tables_of(own(**engine)), [PLAIN, PLAIN, hidden, WAITS_FOR_DATA])
        assert tags["ranks/slowest_rank"] == 3
