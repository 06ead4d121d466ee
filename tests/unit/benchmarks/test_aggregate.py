"""The benchmark of reading metrics back, small: both sides read everything."""

from pathlib import Path

from benchmarks.aggregate import DIFFERENT, measure, write_many


def test_both_sides_read_every_line(tmp_path: Path) -> None:
    write_many(tmp_path / "run", ranks=DIFFERENT + 2, lines=50)
    ours, loop = measure("ours", tmp_path / "run"), measure("loop", tmp_path / "run")
    assert ours["lines"] == (DIFFERENT + 2) * 50
    assert loop["lines"] == (DIFFERENT + 2) * (1 + 50 + 2)  # the start, and two evaluations
    assert 0 < ours["peak_mb"] < 200
