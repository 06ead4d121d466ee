"""`ii-dist show CONFIG --plot FILE`."""

from pathlib import Path

import pytest

from ii_dist.cli.main import main
from ii_dist.config import DataFacts, load_config, make_plan
from ii_dist.train.schedule_plot import rates_over_epochs

RECIPE = Path(__file__).parents[3] / "configs/imagenet/ini_resnet50.yaml"


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_a_picture_without_data(tmp_path: Path, suffix: str, start: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / f"plan{suffix}"
    assert main(["show", str(RECIPE), "optim.schedule=linear", "--plot", str(out)]) == 0
    assert out.read_bytes().startswith(start)
    assert "schedule: linear" in capsys.readouterr().out


def test_sizes_that_change_are_drawn_as_well(tmp_path: Path) -> None:
    fast = RECIPE.with_name("fast_16ep.yaml")
    pages = []
    for overrides in ([], ["data.size_schedule=[]"]):
        assert main(["show", str(fast), *overrides, "--plot", str(tmp_path / "plan.svg")]) == 0
        pages.append((tmp_path / "plan.svg").read_text())
    assert "side of training images" in pages[0]
    assert "side of training images" not in pages[1]


def test_what_is_drawn_is_what_is_trained() -> None:
    cfg = load_config(RECIPE, ["train.epochs=10", "optim.warmup_epochs=2"])
    plan = make_plan(cfg, 1, DataFacts(500 * 1024, 1, 2))
    epochs, rates = rates_over_epochs(cfg, plan)
    assert (epochs[0], epochs[-1]) == (0.0, pytest.approx(10, abs=0.01))
    assert epochs[rates.index(max(rates))] == pytest.approx(2, abs=0.01)
    assert max(rates) == pytest.approx(0.4)
    assert rates[-1] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("name", "words"), [("plan.txt", "ends in .png, .svg or .pdf"), ("no/plan.png", "cannot be")])
def test_wrong_files_are_one_line(tmp_path: Path, name: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(RECIPE), "--plot", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
