"""What every board promises, and how several become one."""

import logging
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ii_dist.config import ClusterError, ConfigError, RunFolder
from ii_dist.metrics import BOARDS, read_rank_metrics
from ii_dist.metrics.boards import Board, CombinedBoard, Where, make_boards
from ii_dist.metrics.pictures import batch_png

VALUES = {"train/loss": 1.0, "train/top1": 50.0, "throughput/images_per_s": 10.0, "time/data_wait_share": 0.5}


def make(name: str, root: Path, resumed_step: int = 0) -> Board:
    return BOARDS[name](Where(RunFolder(root), rank=0, world_size=1, total_steps=100, resumed_step=resumed_step))


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_takes_numbers_words_and_pictures_and_closes(name: str, tmp_path: Path) -> None:
    board = make(name, tmp_path)
    board.text("config", "name: x\n  key: value")
    board.write(1, VALUES)
    board.write(1, {"eval/top1": 10.0, "eval/loss": float("nan")})
    board.write(2, {})
    board.pictures(2, {"images/x": batch_png(np.zeros((1, 8, 8, 3), np.uint8), ["a class"])})
    board.write(3, VALUES)
    board.close()


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_refuses_a_tag_that_is_not_in_the_table(name: str, tmp_path: Path) -> None:
    board = make(name, tmp_path)
    with pytest.raises(AssertionError, match=r"train/los$"):
        board.write(1, {"train/los": 1.0})
    board.close()


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_goes_on_where_an_earlier_one_left(name: str, tmp_path: Path) -> None:
    for resumed_step in (0, 2):
        board = make(name, tmp_path, resumed_step)
        board.write(resumed_step + 1, VALUES)
        board.close()


def test_rank_0_has_all_boards_and_the_others_their_own_file_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("console", "tensorboard", "jsonl", "null", "jsonl")
    for rank in (0, 1):
        board = make_boards(names, RunFolder(tmp_path), rank=rank, world_size=2, total_steps=9, resumed_step=0)
        board.write(1, VALUES)
        board.close()
    assert sorted(path.name for path in RunFolder(tmp_path).metrics.iterdir()) == [
        "rank_00000.jsonl",
        "rank_00001.jsonl",
    ]
    assert len(list(RunFolder(tmp_path).tensorboard.iterdir())) == 1
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_an_unknown_board_names_the_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metrics\.boards: 'wandb' is not one of .*jsonl"):
        make_boards(("jsonl", "wandb"), RunFolder(tmp_path), rank=0, world_size=1, total_steps=9, resumed_step=0)
    assert not RunFolder(tmp_path).metrics.exists()


def test_a_missing_package_is_one_line_with_the_command(tmp_path: Path) -> None:
    """A process in which TensorBoard cannot be imported."""
    code = (
        "import sys; sys.modules['tensorboard'] = None\n"
        "from pathlib import Path; from ii_dist.metrics import make_boards; from ii_dist.config import *\n"
        "try: make_boards(('tensorboard',), RunFolder(Path(sys.argv[1])), rank=0, world_size=1, total_steps=1,"
        " resumed_step=0)\n"
        "except ClusterError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    assert len(out.splitlines()) == 1
    assert "pip install tensorboard==" in out
    assert ClusterError.exit_code == 5


def test_a_full_disk_is_said_once_and_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = RunFolder(tmp_path)
    board = make_boards(("jsonl",), folder, rank=0, world_size=1, total_steps=9, resumed_step=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (folder.rank_metrics(0).stat().st_size, hard))
    try:
        with caplog.at_level(logging.WARNING):
            board.write(1, VALUES)
            board.write(2, VALUES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (record,) = caplog.records
    assert "jsonl board cannot write" in record.getMessage()
    assert "bytes free" in record.getMessage()
    board.write(3, VALUES)  # there is room again
    board.close()
    assert [row.step for row in read_rank_metrics(folder.rank_metrics(0))] == [3]


def test_several_boards_are_one(tmp_path: Path) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[object] = []

        def write(self, step: int, values: object) -> None:
            self.seen.append((step, values))

        def text(self, tag: str, text: str) -> None:
            self.seen.append((tag, text))

        def pictures(self, step: int, pngs: object) -> None:
            self.seen.append((step, pngs))

        def close(self) -> None:
            self.seen.append("closed")

    one, two = Recorder(), Recorder()
    board = CombinedBoard({"one": one, "two": two}, RunFolder(tmp_path))
    board.write(1, VALUES)
    board.text("config", "name: x")
    board.pictures(1, {"x": b"png"})
    board.close()
    assert one.seen == two.seen == [(1, VALUES), ("config", "name: x"), (1, {"x": b"png"}), "closed"]
