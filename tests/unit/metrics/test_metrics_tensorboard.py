"""Real event files, written by the board and read back by TensorBoard's own reader."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ii_dist.config import RunFolder
from ii_dist.metrics.boards import make_boards
from ii_dist.metrics.tags import TAGS

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

ATTEMPT = """
import os, sys, time
from pathlib import Path
from ii_dist.config import RunFolder
from ii_dist.metrics.boards import make_boards
folder, resumed, last, scale, end = RunFolder(Path(sys.argv[1])), *map(int, sys.argv[2:5]), sys.argv[5]
board = make_boards(("tensorboard",), folder, rank=0, world_size=1, total_steps=100, resumed_step=resumed)
board.text("config", f"attempt: {scale}\\n  nested: yes")
for step in range(resumed + 1, last + 1):
    board.write(step, {"train/loss": float(scale * step), "eval/top1": 50.0})
if end == "close":
    board.close()
else:
    time.sleep(0.5)  # the first write goes out at once, the others wait for the writer's next flush
    os._exit(9)
"""


def attempt(root: Path, resumed: int, last: int, scale: int, end: str = "close") -> int:
    """One attempt in a process of its own, as in a chain of jobs."""
    arguments = [str(root), str(resumed), str(last), str(scale), end]
    return subprocess.run([sys.executable, "-c", textwrap.dedent(ATTEMPT), *arguments], check=False).returncode


def read_back(root: Path) -> "event_accumulator.EventAccumulator":
    found = event_accumulator.EventAccumulator(str(RunFolder(root).tensorboard), size_guidance={"scalars": 0})
    return found.Reload()


def losses(root: Path) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read_back(root).Scalars("train/loss")]


def test_a_resumed_run_shows_each_step_once(tmp_path: Path) -> None:
    assert attempt(tmp_path, 0, 8, scale=1) == 0
    wait_for_the_next_second(tmp_path)
    assert attempt(tmp_path, 5, 10, scale=100) == 0
    assert losses(tmp_path) == [(s, float(s)) for s in range(1, 6)] + [(s, 100.0 * s) for s in range(6, 11)]


def test_a_killed_attempt_that_begins_again_shows_each_step_once(tmp_path: Path) -> None:
    assert attempt(tmp_path, 0, 8, scale=1, end="kill") == 9
    (events,) = RunFolder(tmp_path).tensorboard.iterdir()
    with events.open("ab") as file:
        file.write(b"\x18\x00\x00\x00\x00\x00\x00\x00torn")  # a record cut off in its header
    wait_for_the_next_second(tmp_path)
    assert attempt(tmp_path, 0, 10, scale=100) == 0
    assert losses(tmp_path) == [(s, 100.0 * s) for s in range(1, 11)]


def wait_for_the_next_second(root: Path) -> None:
    """Event files are named and ordered by the second of their birth; attempts of a chain are further apart."""
    import time

    born = max(int(path.name.split(".")[3]) for path in RunFolder(root).tensorboard.iterdir())
    while int(time.time()) <= born:
        time.sleep(0.05)


def test_units_meanings_and_texts_are_there(tmp_path: Path) -> None:
    board = make_boards(("tensorboard",), RunFolder(tmp_path), rank=0, world_size=1, total_steps=9, resumed_step=0)
    board.text("config", "name: digits\ntrain:\n  epochs: 3")
    board.write(1, {"time/step_s": 0.25, "train/loss": 1.5})
    board.write(2, {"time/step_s": 0.5})
    board.close()
    found = read_back(tmp_path)
    assert found.Tags()["scalars"] == ["time/step_s", "train/loss"]
    assert [event.value for event in found.Scalars("time/step_s")] == [0.25, 0.5]
    description = found.SummaryMetadata("time/step_s").summary_description
    assert TAGS["time/step_s"].says in description
    assert "Unit: s." in description
    text = found.Tensors("config")[0].tensor_proto.string_val[0].decode()
    assert text == "name: digits\ntrain:\n  epochs: 3"
