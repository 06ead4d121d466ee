"""One rank's file: exact numbers, cut back on resume, whole after kills and full disks."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ii_dist.config import CheckpointError
from ii_dist.metrics.jsonl import JsonlBoard, cut_to_step


def board(path: Path, resumed_step: int = 0) -> JsonlBoard:
    return JsonlBoard(path, rank=0, world_size=1, resumed_step=resumed_step)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_numbers_read_back_to_the_same_bits(tmp_path: Path) -> None:
    path = tmp_path / "metrics" / "rank_00000.jsonl"
    writer = board(path)
    writer.write(7, {"train/loss": 0.1 + 0.2, "train/grad_norm": float("nan"), "eval/loss": float("inf")})
    writer.close()
    start, row = lines(path)
    assert (start["event"], start["step"], start["world_size"]) == ("start", 0, 1)
    assert row["step"] == 7
    assert row["train/loss"] == 0.1 + 0.2
    assert row["train/grad_norm"] is None  # plain JSON has no NaN
    assert row["eval/loss"] is None
    assert abs(float(str(row["time"])) - time.time()) < 60


def test_a_line_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    path = tmp_path / "rank_00000.jsonl"
    writer = board(path)
    writer.write(1, {"train/loss": 1.0})
    assert lines(path)[-1]["step"] == 1
    writer.close()


def test_resuming_cuts_later_steps_and_torn_tails(tmp_path: Path) -> None:
    path = tmp_path / "rank_00000.jsonl"
    writer = board(path)
    for step in (10, 20, 30):
        writer.write(step, {"train/loss": float(step)})
    writer.close()
    with path.open("ab") as file:
        file.write(b'{"step": 40, "train/lo')
    again = board(path, resumed_step=20)
    again.write(30, {"train/loss": 31.0})
    again.close()
    assert [(row["step"], row.get("train/loss")) for row in lines(path)] == [
        (0, None),
        (10, 10.0),
        (20, 20.0),
        (20, None),
        (30, 31.0),
    ]


@pytest.mark.parametrize("tail", [b"", b'{"step": 3', b"\0" * 40, b"\0" * 40 + b"\n", b"\n", b"no json\n", b"[1]\n"])
def test_any_tail_is_cut_and_whole_lines_stay(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "rank_00000.jsonl"
    path.write_bytes(b'{"step": 1}\nbroken in the middle\n{"step": 2}\n' + tail)
    cut_to_step(path, 2)
    assert path.read_bytes() == b'{"step": 1}\nbroken in the middle\n{"step": 2}\n'


def test_a_start_from_scratch_keeps_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rank_00000.jsonl"
    path.write_bytes(b'{"step": 5}\n{"step": 6}\n')
    cut_to_step(path, 0)
    assert path.read_bytes() == b""


WRITER = """
import sys
from pathlib import Path
from ii_dist.metrics.jsonl import JsonlBoard
board = JsonlBoard(Path(sys.argv[1]), rank=0, world_size=1, resumed_step=0)
step = 0
while True:
    step += 1
    board.write(step, {"train/loss": 1.0 / step})
"""


def test_a_kill_at_any_moment_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "rank_00000.jsonl"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)]) as process:
        until_s = time.monotonic() + 60
        while (not path.exists() or path.stat().st_size < 20_000) and time.monotonic() < until_s:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    found = lines(path)
    assert [row["step"] for row in found] == list(range(len(found)))
    assert len(found) > 100


def test_a_full_disk_tears_one_line_and_the_next_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "rank_00000.jsonl"
    writer = board(path)
    size = path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
    try:
        with pytest.raises(OSError, match="of"):
            writer.write(1, {"train/loss": 1.0})
        with pytest.raises(OSError, match="large"):
            writer.write(2, {"train/loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.write(3, {"train/loss": 3.0})
    writer.close()
    found = path.read_text().splitlines()
    assert json.loads(found[-1])["step"] == 3
    assert len(found) == 3  # start, the torn one, the last


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics").write_text("a file is in the way")
    with pytest.raises(CheckpointError, match="metrics cannot be written") as caught:
        board(tmp_path / "metrics" / "rank_00000.jsonl")
    assert "\n" not in str(caught.value)
