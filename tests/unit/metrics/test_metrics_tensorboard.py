"""Real event files, written by the board and read back by TensorBoard's own reader."""

import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from ii_dist.config import ConfigError, RunConfig, RunFolder
from ii_dist.metrics.boards import Board, make_boards
from ii_dist.metrics.event_file import EventFile, cut_to_step, event_files, next_path
from ii_dist.metrics.hparams import RESULTS, compared_settings
from ii_dist.metrics.layout import GROUPS
from ii_dist.metrics.tags import TAGS
from ii_dist.metrics.tensorboard_board import layout_summary

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

# Tags of the layout that are still to come; a chart appears with the first number that it shows.
TO_COME = {"throughput/mfu_share", "throughput/roofline_share"}

ATTEMPT = """
import os, sys
from pathlib import Path
from ii_dist.config import RunFolder
from ii_dist.metrics.boards import make_boards
folder, resumed, last, scale, end = RunFolder(Path(sys.argv[1])), *map(int, sys.argv[2:5]), sys.argv[5]
board = make_boards(("tensorboard",), folder, rank=0, world_size=1, total_steps=100, resumed_step=resumed)
board.text("config", f"attempt: {scale}\\n  nested: yes")
for step in range(resumed + 1, last + 1):
    board.write(step, {"train/loss": float(scale * step), "eval/top1": 50.0})
if end == "kill":
    os._exit(9)
board.close()
"""


def attempt(root: Path, resumed: int, last: int, scale: int, end: str = "close") -> int:
    """One attempt in a process of its own, as in a chain of jobs."""
    arguments = [str(root), str(resumed), str(last), str(scale), end]
    return subprocess.run([sys.executable, "-c", textwrap.dedent(ATTEMPT), *arguments], check=False).returncode


def board_of(root: Path, resumed_step: int = 0, **more: Any) -> Board:
    options: dict[str, Any] = {"rank": 0, "world_size": 1, "total_steps": 9, "resumed_step": resumed_step} | more
    return make_boards(("tensorboard",), RunFolder(root), **options)


def read_back(root: Path) -> "event_accumulator.EventAccumulator":
    found = event_accumulator.EventAccumulator(str(RunFolder(root).tensorboard), size_guidance={"scalars": 0})
    return found.Reload()


def losses(root: Path) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read_back(root).Scalars("train/loss")]


def steps_in_files(root: Path) -> list[int]:
    """Steps of the losses as they lie in the files, whatever the marks of a restart make of them."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    steps = []
    for path in event_files(RunFolder(root).tensorboard):
        for event in loader.LegacyEventFileLoader(str(path)).Load():
            steps += [event.step for value in event.summary.value if value.tag == "train/loss" and value.simple_value]
    return steps


def test_a_resumed_run_shows_each_step_once(tmp_path: Path) -> None:
    assert attempt(tmp_path, 0, 8, scale=1) == 0
    assert attempt(tmp_path, 5, 10, scale=100) == 0
    assert losses(tmp_path) == [(s, float(s)) for s in range(1, 6)] + [(s, 100.0 * s) for s in range(6, 11)]
    assert steps_in_files(tmp_path) == list(range(1, 11))


def test_a_killed_attempt_loses_nothing_and_begins_again_with_each_step_once(tmp_path: Path) -> None:
    assert attempt(tmp_path, 0, 8, scale=1, end="kill") == 9
    assert losses(tmp_path) == [(s, float(s)) for s in range(1, 9)]
    (events,) = RunFolder(tmp_path).tensorboard.iterdir()
    with events.open("ab") as file:
        file.write(b"\x18\x00\x00\x00\x00\x00\x00\x00torn")  # a record cut off in its header
    assert attempt(tmp_path, 0, 10, scale=100) == 0
    assert losses(tmp_path) == [(s, 100.0 * s) for s in range(1, 11)]
    assert steps_in_files(tmp_path) == list(range(1, 11))


def test_an_attempt_on_a_node_whose_clock_is_behind_is_read_last(tmp_path: Path) -> None:
    board = board_of(tmp_path)
    board.write(1, {"train/loss": 1.0})
    board.write(2, {"train/loss": 2.0})
    board.close()
    (events,) = event_files(RunFolder(tmp_path).tensorboard)
    ahead = events.with_name(events.name.replace(events.name.split(".")[3], "4000000000"))
    events.rename(ahead)
    board = board_of(tmp_path, resumed_step=1)
    board.write(2, {"train/loss": 20.0})
    board.close()
    assert [path.name.split(".")[3] for path in event_files(ahead.parent)] == ["4000000000", "4000000001"]
    assert losses(tmp_path) == [(1, 1.0), (2, 20.0)]


@pytest.mark.parametrize("lost_bytes", [1, 5, 30])
def test_a_record_torn_anywhere_is_cut_off_and_those_before_it_stay(tmp_path: Path, lost_bytes: int) -> None:
    board, whole_bytes = board_of(tmp_path), 0
    (events,) = event_files(RunFolder(tmp_path).tensorboard)
    for step in (1, 2, 3):
        whole_bytes = events.stat().st_size
        board.write(step, {"train/loss": float(step)})
    board.close()
    os.truncate(events, events.stat().st_size - lost_bytes)
    cut_to_step(events, 9)
    assert losses(tmp_path) == [(1, 1.0), (2, 2.0)]
    assert events.stat().st_size == whole_bytes


def test_a_full_disk_leaves_whole_records_and_there_may_be_room_again(tmp_path: Path) -> None:
    summary_pb2 = pytest.importorskip("tensorboard.compat.proto.summary_pb2")

    def loss(value: float) -> object:
        return summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag="train/loss", simple_value=value)])

    path = next_path(RunFolder(tmp_path).tensorboard)
    file = EventFile(path)
    file.add(1, loss(1.0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    whole_bytes = path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole_bytes + 20, hard))
    try:
        with pytest.raises(OSError, match="written"):
            file.add(2, loss(2.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.stat().st_size == whole_bytes
    file.add(3, loss(3.0))
    file.close()
    assert losses(tmp_path) == [(1, 1.0), (3, 3.0)]


def test_units_meanings_and_texts_are_there(tmp_path: Path) -> None:
    board = board_of(tmp_path)
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


def test_every_number_of_the_layout_exists_and_stands_in_one_chart() -> None:
    shown = [tag for charts in GROUPS.values() for chart in charts for tag in chart.tags]
    assert len(shown) == len(set(shown))
    assert set(shown) - set(TAGS) <= TO_COME
    assert list(GROUPS) == ["Throughput", "Where the time goes", "Learning", "Health", "Checkpoints"]
    # What is left out on purpose: the others say it better.
    assert set(TAGS) - set(shown) <= {"train/epoch", "eval/images", "time/startup_s"}


def test_the_layout_leaves_out_charts_that_would_stay_empty() -> None:
    layout_pb2 = pytest.importorskip("tensorboard.plugins.custom_scalar.layout_pb2")
    summary = layout_summary(["train/loss", "ranks/step_median_s"])
    layout = layout_pb2.Layout.FromString(summary.value[0].tensor.string_val[0])
    assert [group.title for group in layout.category] == ["Where the time goes", "Learning"]
    band, lines = (group.chart[0] for group in layout.category)
    assert (band.margin.series[0].lower, band.margin.series[0].upper) == ("ranks/step_min_s", "ranks/step_max_s")
    assert list(lines.multiline.tag) == ["train/loss$", "eval/loss$"]


def test_settings_are_those_of_the_newest_attempt_and_the_end_is_told_once(tmp_path: Path) -> None:
    plugin_data_pb2 = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    for resumed_step, rate in ((0, 0.1), (5, 0.4)):
        settings = {"optim.lr": rate, "model.gate": "se", "engine.compile": False}
        board = board_of(tmp_path / "two", resumed_step, settings=settings)
        board.write(resumed_step + 4, {"train/loss": 1.0})
        if resumed_step:
            board.write(9, {"eval/top1": 50.0})
        board.close()
    found = read_back(tmp_path / "two")

    def content(tag: str) -> Any:
        raw = found.SummaryMetadata(tag).plugin_data.content
        return plugin_data_pb2.HParamsPluginData.FromString(raw)

    start = content("_hparams_/session_start_info").session_start_info
    assert start.group_name == "two"
    assert start.hparams["optim.lr"].number_value == 0.4
    assert start.hparams["model.gate"].string_value == "se"
    assert start.hparams["engine.compile"].bool_value is False
    experiment = content("_hparams_/experiment").experiment
    assert [info.name for info in experiment.hparam_infos] == list(settings)
    assert [info.name.tag for info in experiment.metric_infos] == list(RESULTS)
    assert len(found.Tensors("_hparams_/session_end_info")) == 1


def test_compared_settings_name_keys_of_the_config() -> None:
    settings = compared_settings(RunConfig(name="x"), ranks=4)
    assert settings["model.gate"] == "fold3x3"
    assert settings["ranks"] == 4
    assert set(RESULTS) <= set(TAGS)
    for wrong in ("optim.rate", "optim"):
        cfg = RunConfig.model_validate({"name": "x", "metrics": {"compare": [wrong]}})
        with pytest.raises(ConfigError, match=rf"metrics\.compare: '{wrong}' is"):
            compared_settings(cfg, ranks=1)
