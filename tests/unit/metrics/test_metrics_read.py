"""JSON lines read back: torn, repeated and foreign lines; ranks combined as the table says."""

import json
import math
from pathlib import Path

import pytest

from ii_dist.config import CheckpointError, RunFolder
from ii_dist.metrics import columns, make_boards, read_rank_metrics, read_run
from ii_dist.metrics.boards import Board


def open_board(folder: RunFolder, rank: int, world_size: int, resumed_step: int = 0) -> Board:
    return make_boards(("jsonl",), folder, rank=rank, world_size=world_size, total_steps=100, resumed_step=resumed_step)


def write_lines(path: Path, *rows: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def losses(path: Path) -> list[tuple[int, float]]:
    return [(row.step, row.values["train/loss"]) for row in read_rank_metrics(path)]


def test_what_was_written_last_wins(tmp_path: Path) -> None:
    """An attempt that went back to step 20 made 30 again; 40 was never reached again."""
    path = tmp_path / "rank_00000.jsonl"
    steps = [(10, 1.0), (20, 2.0), (30, 3.0), (40, 4.0), (30, 3.5)]
    write_lines(path, *({"step": s, "time": float(s), "train/loss": v} for s, v in steps))
    assert losses(path) == [(10, 1.0), (20, 2.0), (30, 3.5)]


def test_lines_of_one_step_become_one_row(tmp_path: Path) -> None:
    path = tmp_path / "rank_00000.jsonl"
    write_lines(
        path,
        {"step": 5, "time": 1.0, "train/loss": 1.0},
        {"step": 5, "time": 2.0, "eval/loss": 2.0, "train/grad_norm": None},
        {"step": 5, "time": 3.0, "eval/loss": 2.5},
    )
    (row,) = read_rank_metrics(path)
    assert (row.step, row.time_s) == (5, 1.0)
    assert row.values.pop("train/grad_norm") != row.values.get("train/loss")
    assert row.values == {"train/loss": 1.0, "eval/loss": 2.5}


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 18])
@pytest.mark.parametrize("tail", [b"", b'{"step": 4, "train/loss": 4', b"\0\0\0\0", b"junk\n\n", b'{"step": "x"}\n'])
def test_blocks_and_tails_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, tail: bytes
) -> None:
    path = tmp_path / "rank_00000.jsonl"
    write_lines(path, *({"step": s, "time": 0.0, "train/loss": s / 3} for s in range(1, 30)))
    path.write_bytes(path.read_bytes() + tail)
    monkeypatch.setattr(columns, "_BLOCK_BYTES", block)
    assert losses(path) == [(s, s / 3) for s in range(1, 30)]


@pytest.mark.parametrize("content", [b"", b"\n", b'{"step": 1', b"\0" * 100])
def test_a_file_without_a_line_is_no_rows(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rank_00000.jsonl"
    path.write_bytes(content)
    assert read_rank_metrics(path) == []


def test_ranks_combine_as_the_table_says(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for rank in range(3):
        board = open_board(folder, rank, 3)
        board.write(
            10,
            {
                "train/loss": float(rank),
                "throughput/images_per_s": 600.0,
                "throughput/images_per_s_rank": 100.0 * (rank + 1),
                "time/step_p99_s": 0.1 * rank,
                "memory/rss_gib": 3.0 - rank,
            },
        )
        board.close()
    run = read_run(folder)
    (row,) = run.rows
    assert row.values == {
        "train/loss": 1.0,  # mean
        "throughput/images_per_s": 600.0,  # first
        "throughput/images_per_s_rank": 600.0,  # sum
        "time/step_p99_s": 0.2,  # max
        "memory/rss_gib": 3.0,
    }


def test_a_rank_s_rate_is_images_over_time(tmp_path: Path) -> None:
    """100 images in 1 s, then 100 in 4 s: 40 images/s, not the 62.5 that a mean of rates would say."""
    folder = RunFolder(tmp_path)
    board = open_board(folder, 0, 1)
    for step, rate, seconds, share in ((1, 100.0, 1.0, 0.5), (2, 25.0, 4.0, 0.0)):
        tags = {"throughput/images_per_s_rank": rate, "time/step_s": seconds, "time/data_wait_share": share}
        board.write(step, tags | {"memory/rss_gib": seconds})
    board.close()
    (rank,) = read_run(folder).ranks
    assert rank.images_per_s == 40
    assert rank.data_wait_share == pytest.approx(0.1)
    assert (rank.last_step, rank.rss_gib) == (2, 4.0)
    assert math.isnan(rank.device_gib)
    assert rank.host != "?"


def test_a_smaller_attempt_leaves_no_ghosts_of_the_ranks_that_left(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    boards = [open_board(folder, rank, 3) for rank in range(3)]
    for board in boards:
        board.write(10, {"throughput/images_per_s_rank": 1.0})
        board.write(20, {"throughput/images_per_s_rank": 1.0})
        board.close()
    again = open_board(folder, 0, 1, resumed_step=10)
    again.write(20, {"throughput/images_per_s_rank": 2.5})
    again.close()
    # Rank 1 is cut by rank 0, which knows that the attempt has one rank only.
    run = read_run(folder)
    assert [(row.step, row.values["throughput/images_per_s_rank"]) for row in run.rows] == [(10, 3.0), (20, 2.5)]
    assert [(start.step, start.world_size) for start in run.starts] == [(0, 3), (10, 1)]


def test_tags_of_another_version_are_left_out_of_the_table(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_lines(folder.rank_metrics(0), {"step": 1, "time": 0.0, "train/loss": 1.0, "train/vibes": 2.0})
    (row,) = read_run(folder).rows
    assert row.values == {"train/loss": 1.0}


def test_series_leave_out_what_is_not_finite(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_lines(folder.rank_metrics(0), *({"step": s, "time": 0.0, "eval/top1": v} for s, v in ((1, 5.0), (2, None))))
    run = read_run(folder)
    assert run.series("eval/top1")[1] == [5.0]
    assert run.last("eval/top1") == 5.0
    assert run.last("eval/top5") is None


@pytest.mark.parametrize("make_folder", [False, True])
def test_no_run_there_is_one_line(tmp_path: Path, make_folder: bool) -> None:
    root = tmp_path / "run"
    if make_folder:
        root.mkdir()
    with pytest.raises(CheckpointError, match="jsonl" if make_folder else "no such run folder") as caught:
        read_run(RunFolder(root))
    assert "\n" not in str(caught.value)
