"""The command line: help, show, and errors of one line with the right exit code."""

import re
from pathlib import Path

import pytest

from ii_dist.cli import main

CONFIG = (
    "name: x\ndata: {source: synthetic, synthetic_images: 640}\ntrain: {global_batch: 64, max_images_per_rank: 8}\n"
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    return path


COMMANDS = ("train", "show", "eval", "models", "export")


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert "usage: ii-dist" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert re.fullmatch(r"ii-dist \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_show_prints_config_and_plan(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(config), "--ranks", "2", "optim.lr=0.4"]) == 0
    out = capsys.readouterr().out
    assert "\n  lr: 0.4\n" in out
    for line in ("steps_per_epoch: 10", "images_per_rank: 32", "micro_batch: 8", "accumulate_steps: 4", "peak_lr: 0.1"):
        assert f"\n  {line}\n" in out


def test_show_without_data_says_so(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(config), "data.source=dali", "data.root=/nowhere"]) == 0
    assert (
        "plan: not known before the data set is there (/nowhere/train.index: no such index" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["train", "{c}", "model.gate=folded"], 2, "not one of none, se, double_fc, pair1x1, pair2x1, fold3x3"),
        (["train", "/nowhere.yaml"], 2, "/nowhere.yaml: no such config file"),
        (["train", "{c}", "data.source=dali", "data.root=/nowhere"], 3, "/nowhere/train.index: no such index"),
        (["train", "{c}", "train.global_batch=1000"], 2, "the data set has 640 training images"),
        (["eval", "/nowhere"], 2, "give a run folder"),
        (["show", "{c}", "--ranks", "7"], 2, "does not divide over 7 ranks"),
    ],
)
def test_errors_are_one_line_with_their_code(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, part: str
) -> None:
    assert main([a.replace("{c}", str(config)) for a in arguments]) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert part in err


def test_models_lists_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert next(r for r in rows if r[:2] == ["ini_resnet50", "fold3x3"])[2] == "28,991,244"


def test_unknown_argument_is_a_usage_error(config: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", str(config), "--unknown"])
    assert caught.value.code == 2
