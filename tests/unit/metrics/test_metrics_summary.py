"""The end of a run: written, read back, said."""

import dataclasses
from pathlib import Path

import pytest

from ii_dist.config import CheckpointError, RunFolder
from ii_dist.metrics import Summary, format_summary, read_summary, write_summary

SUMMARY = Summary(
    steps=1320,
    total_steps=1320,
    epochs=60.0,
    top1=97.5,
    top5=99.72,
    best_top1=97.78,
    images_per_s=1234.5,
    cold_images_per_s=432.1,
    data_wait_share=0.042,
    seconds=95.0,
    world_size=2,
    device="cpu",
    newest_checkpoint="step_000001320",
)


def test_what_was_written_reads_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert read_summary(folder) is None
    write_summary(folder, SUMMARY)
    write_summary(folder, SUMMARY)  # a later attempt replaces it
    assert read_summary(folder) == SUMMARY
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"steps": 1}'])
def test_a_file_that_is_no_summary_is_one_line(tmp_path: Path, text: str) -> None:
    folder = RunFolder(tmp_path)
    folder.summary.write_text(text)
    with pytest.raises(CheckpointError, match=r"summary\.json") as caught:
        read_summary(folder)
    assert "\n" not in str(caught.value)


def test_the_last_lines_name_what_a_person_looks_for(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "digits")
    assert format_summary(folder, SUMMARY).splitlines() == [
        "digits: finished after 1 min 35 s",
        "  top-1      97.50 %, top-5 99.72 %, best top-1 97.78 %",
        "  images/s   1,234 images/s on 2 ranks (cpu), steady",
        "  data wait  4.2 % of the training time",
        "  trained    1,320 of 1,320 steps, 60 epochs",
        f"  checkpoint {folder.checkpoints}/step_000001320",
        f"  curves     tensorboard --logdir {folder.tensorboard}",
    ]


def test_a_stopped_run_says_so(tmp_path: Path) -> None:
    stopped = dataclasses.replace(
        SUMMARY, steps=7, top1=None, top5=None, best_top1=None, newest_checkpoint=None, world_size=1
    )
    text = format_summary(RunFolder(tmp_path), stopped)
    for words in ("stopped after", "not evaluated", "checkpoint none", "on 1 rank ("):
        assert words in text


def test_the_phases_of_a_step_that_matter_are_named_longest_first(tmp_path: Path) -> None:
    seconds = {"data_wait": 0.02, "copy": 0.001, "forward": 0.03, "backward": 0.04, "allreduce": 0.009}
    lines = format_summary(RunFolder(tmp_path), dataclasses.replace(SUMMARY, phases_s=seconds)).splitlines()
    assert lines[4] == (
        "  a step     100 ms: backward 40 %, forward 30 %, waiting for data 20 %, waiting for other ranks 9.0 %"
    )
    write_summary(RunFolder(tmp_path), dataclasses.replace(SUMMARY, phases_s=seconds))
    found = read_summary(RunFolder(tmp_path))
    assert found is not None
    assert found.phases_s == seconds
