"""The console on a real terminal: a pseudo-terminal, read as a screen would show it."""

import fcntl
import io
import logging
import os
import pty
import re
import struct
import termios
from collections.abc import Iterator
from typing import TextIO

import pytest

from ii_dist.metrics.console import ConsoleBoard, Manner, fit

TRAIN = {
    "train/loss": 0.41234,
    "train/top1": 93.06,
    "train/epoch": 6.82,
    "throughput/images_per_s": 1234.4,
    "time/data_wait_share": 0.021,
}
EVAL = {"eval/top1": 97.22, "eval/top5": 99.9, "eval/loss": 0.1, "eval/images": 360.0, "eval/seconds": 0.4}


class Terminal:
    """Both ends of a pseudo-terminal."""

    def __init__(self, columns: int) -> None:
        self._screen_end, program_end = pty.openpty()
        self.out: TextIO = os.fdopen(program_end, "w")
        self.resize(columns)
        self._shown = ""

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.out.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def screen(self) -> list[str]:
        """The lines as they stand, from all that was written so far: \\r goes back, ESC[K erases to the right."""
        self.out.write("\0")  # read up to here
        self.out.flush()
        text = ""
        while not text.endswith("\0"):
            text += os.read(self._screen_end, 65536).decode()
        self._shown += text[:-1]
        lines, place = [""], 0
        for piece in re.findall(r"\r\n|\r|\x1b\[K|[^\r\n\x1b]+", self._shown):
            if piece == "\r\n":
                lines.append("")
                place = 0
            elif piece == "\r":
                place = 0
            elif piece == "\x1b[K":
                lines[-1] = lines[-1][:place]
            else:
                lines[-1] = lines[-1][:place] + piece + lines[-1][place + len(piece) :]
                place += len(piece)
        return lines

    def close(self) -> None:
        self.out.close()
        os.close(self._screen_end)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal(100)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    before = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = before


@pytest.fixture
def _log_to_terminal(terminal: Terminal) -> Iterator[None]:
    """The log goes to the terminal, as stderr does."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers[:] = [logging.StreamHandler(terminal.out)]
    root.setLevel(logging.INFO)
    yield
    root.handlers[:] = before
    root.setLevel(level)


def board_on(terminal: Terminal, manner: Manner = "auto") -> ConsoleBoard:
    return ConsoleBoard(total_steps=1320, resumed_step=0, manner=manner, out=terminal.out, now=iter(range(99)).__next__)


def test_one_line_stays_in_place_and_shows_the_newest_step(terminal: Terminal) -> None:
    board = board_on(terminal)
    for step in (10, 20, 30):
        board.write(step, TRAIN)
    (line,) = terminal.screen()
    assert line.startswith("step    30/1,320  epoch 6.82  loss 0.412")
    assert line.endswith("left")
    board.write(30, EVAL)
    board.write(40, TRAIN)
    board.close()
    above, live, end = terminal.screen()
    assert above.startswith("step    30/1,320  evaluation: top-1 97.22 %")
    assert live.startswith("step    40/1,320")
    assert end == ""


@pytest.mark.usefixtures("_log_to_terminal")
def test_log_records_go_above_the_line_and_leave_it_whole(terminal: Terminal) -> None:
    before = logging.getLogger().handlers[:]
    board = board_on(terminal)
    board.write(10, TRAIN)
    logging.getLogger("ii_dist.somewhere").warning("rank 1 on alpha is slow")
    record, line = terminal.screen()
    assert record == "rank 1 on alpha is slow"
    assert line.startswith("step    10/1,320")
    board.write(20, TRAIN)
    logging.getLogger("ii_dist.somewhere").debug("nobody sees this")
    board.close()
    logging.getLogger("ii_dist.somewhere").warning("after the end")
    assert [each[:24] for each in terminal.screen()] == [
        "rank 1 on alpha is slow",
        "step    20/1,320  epoch ",
        "after the end",
        "",
    ]
    assert logging.getLogger().handlers == before  # what the board added is gone


def test_a_terminal_that_has_gone_does_not_end_who_logs() -> None:
    gone = Terminal(80)
    board = board_on(gone)
    board.write(10, TRAIN)
    gone.close()
    logging.getLogger("ii_dist.somewhere").warning("still here")


def test_a_narrow_terminal_shows_what_matters_most(terminal: Terminal) -> None:
    board = board_on(terminal)
    for columns in (120, 80, 60, 40, 20, 10):
        terminal.resize(columns)
        board.write(10, TRAIN)
        (line,) = terminal.screen()
        assert len(line) < columns
        assert line.startswith("step    10/1,320"[: columns - 1])
        assert ("left" in line) == (columns >= 40)
        assert ("loss" in line) == (columns >= 60)
        assert ("data wait" in line) == (columns >= 120)


def test_plain_lines_on_a_terminal_that_asked_for_them(terminal: Terminal) -> None:
    board = board_on(terminal, "lines")
    board.write(10, TRAIN)
    board.write(20, TRAIN)
    board.close()
    assert [line[:16] for line in terminal.screen()] == ["step    10/1,320", "step    20/1,320", ""]


@pytest.mark.parametrize("live", [True, False])
def test_quiet_shows_evaluations_only(terminal: Terminal, live: bool) -> None:
    out = terminal.out if live else io.StringIO()
    board = ConsoleBoard(total_steps=1320, resumed_step=0, manner="quiet", out=out)
    board.write(10, TRAIN)
    board.write(10, {"checkpoint/bytes": 1.0})
    board.write(10, EVAL)
    board.close()
    lines = terminal.screen() if live else out.getvalue().split("\n")  # type: ignore[attr-defined]
    assert [line[:29] for line in lines] == ["step    10/1,320  evaluation:", ""]


def test_fitting_leaves_out_the_least_first() -> None:
    words = [(0, "step 1"), (2, "loss"), (1, "left")]
    assert [fit(words, columns) for columns in (99, 18, 17, 12, 11, 3)] == [
        *("step 1  loss  left", "step 1  loss  left", "step 1  left", "step 1  left", "step 1", "ste")
    ]


def test_nothing_is_added_to_the_log_of_a_file() -> None:
    before = logging.getLogger().handlers[:]
    ConsoleBoard(total_steps=10, resumed_step=0, out=io.StringIO()).write(1, TRAIN)
    assert logging.getLogger().handlers == before
