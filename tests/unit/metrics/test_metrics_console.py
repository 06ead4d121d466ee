"""What stands on the screen, in a file and in a terminal."""

import io
import re

from ii_dist.metrics.console import ConsoleBoard
from ii_dist.metrics.words import in_words_bytes, in_words_rate, in_words_s, in_words_share

TRAIN = {
    "train/loss": 0.41234,
    "train/top1": 93.06,
    "train/epoch": 6.82,
    "throughput/images_per_s": 1234.4,
    "time/data_wait_share": 0.021,
}
EVAL = {"eval/top1": 97.22, "eval/top5": 99.9, "eval/loss": 0.1, "eval/images": 360.0, "eval/seconds": 0.4}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class HandClock:
    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


def test_a_file_gets_one_plain_line_an_event() -> None:
    out, now = io.StringIO(), HandClock()
    board = ConsoleBoard(total_steps=1320, resumed_step=50, out=out, now=now)
    now.s = 10.0
    board.write(150, TRAIN)
    board.write(154, EVAL)
    board.write(154, {"checkpoint/bytes": 3.0 * 2**20, "checkpoint/seconds": 0.5})
    board.write(154, {"memory/rss_gib": 1.0})
    board.close()
    assert out.getvalue().splitlines() == [
        "step   150/1,320  epoch 6.82  loss 0.412  top-1  93.1 %  1,234 images/s  data wait 2.1 %  1 min 57 s left",
        "step   154/1,320  evaluation: top-1 97.22 %  top-5 99.90 %  loss 0.100  360 images in 400 ms",
        "step   154/1,320  checkpoint: 3 MiB committed  after 500 ms in the background",
    ]


def test_a_terminal_keeps_the_training_line_in_place() -> None:
    out = Terminal()
    board = ConsoleBoard(total_steps=100, resumed_step=0, out=out)
    for step in (10, 20, 30):
        board.write(step, TRAIN)
    board.write(30, EVAL)
    board.write(40, TRAIN)
    board.close()
    text = out.getvalue()
    assert text.count("\n") == 2  # the evaluation, and the end
    shown = [re.split(r"\r\x1b\[K", line)[-1] for line in text.split("\n")[:2]]
    assert [line[:12] for line in shown] == ["step  30/100", "step  40/100"]
    assert "evaluation" in shown[0]


def test_skipped_updates_are_said() -> None:
    out = io.StringIO()
    ConsoleBoard(total_steps=100, resumed_step=0, out=out).write(100, TRAIN | {"train/skipped_updates": 2.0})
    assert "2 updates skipped (not finite)" in out.getvalue()
    assert "left" not in out.getvalue()  # at the last step nothing is


def test_numbers_in_words() -> None:
    assert [in_words_s(s) for s in (0.12, 9.94, 45, 200, 3599.7, 4320, 86400 * 2 + 4 * 3600)] == [
        "120 ms",
        "9.9 s",
        "45 s",
        "3 min 20 s",
        "1 h 0 min",
        "1 h 12 min",
        "2 d 4 h",
    ]
    assert [in_words_bytes(b) for b in (12, 2048, 12.34 * 2**20, 5 * 2**40)] == [
        "12 bytes",
        "2 KiB",
        "12.3 MiB",
        "5 TiB",
    ]
    assert [in_words_rate(r) for r in (4.567, 12345.6)] == ["4.57 images/s", "12,346 images/s"]
    assert [in_words_share(s) for s in (0.004, 0.38)] == ["0.4 %", "38 %"]
