"""The loader's benchmark: what its numbers are ratios of, and that each of its parts runs."""

import itertools
from pathlib import Path

import pytest

from benchmarks import loader, loader_gpu, loader_python, loader_variants, run_all
from benchmarks.loader_variants import VARIANTS, expected_shape, iterator
from tests.images import make_data_set, make_image_folder


def test_a_ratio_above_one_means_that_the_loader_is_faster(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {name: [1.0, 2.0] for name in VARIANTS} | {
        "ours": [0.5, 1.0],  # twice as fast as the hand-written pipeline
        "ours_channels_last": [0.25, 0.5],
        "libjpeg_turbo": [0.1, 0.2],
        "pil_decode": [0.2, 0.4],
    }
    seeks = {"cold first batch": [2.0], "after a seek": [1.0], "seek while running": [3.0]}
    figures = loader.report(seconds, seeks, {"training thread": 0.5, "preparing": 3.0, "producing": 20.0})
    ratios = figures["ratios"]
    assert ratios["C3 loader / hand-written DALI"] == 2
    assert ratios["C4 loader / PIL DataLoader (2 workers)"] == 4
    assert ratios["C5 loader / libjpeg-turbo, full decode"] == pytest.approx(0.4)
    assert ratios["loader / PIL, full decode"] == pytest.approx(0.8)
    assert ratios["C10 first batch after a seek / cold"] == 0.5
    assert ratios["C10 the same, out of a running source"] == 1.5
    printed = capsys.readouterr().out
    assert "| C5 loader / libjpeg-turbo, full decode | 0.400 | >= 0.40 |" in printed
    assert "| training thread | 0.50 ms | <= 10 ms |" in printed


@pytest.fixture
def few_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (loader_variants, loader_python, loader_gpu):
        for name, value in (("IMAGES", 12), ("CLASSES", 2), ("BATCH", 4)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(loader_python, "BATCHES", 2)
    return make_data_set(tmp_path, 2, 6, 6, (60, 44))


@pytest.mark.parametrize("variant", ["libjpeg_turbo", "pil_decode"])
def test_a_bare_decoder_decodes_whole_images(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if variant == "libjpeg_turbo":
        pytest.importorskip("simplejpeg")
    monkeypatch.setattr(loader_variants, "IMAGES", 6)
    monkeypatch.setattr(loader_variants, "BATCH", 1)
    make_image_folder(tmp_path / "train", 2, 3, (60, 44))
    shapes = [batch.shape for batch in itertools.islice(iterator(variant, tmp_path), 7)]
    assert shapes[0] == (1, 44, 60, 3)
    assert len(set(shapes[:6])) == 6  # six images of six sizes, one after the other
    assert shapes[6] == shapes[0]
    assert len(expected_shape(variant)) == len(shapes[0])


def test_pythons_share_is_measured_for_each_kind_of_thread(few_images: Path) -> None:
    found = loader_python.measure_python(few_images, turns=1)
    assert list(found) == list(loader.PYTHON_GOALS)
    assert 0 < found["training thread"] < found["producing"]
    assert found["preparing"] > 0


def test_the_gpu_benchmark_runs_on_a_cpu(few_images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = loader_gpu.measure_end_to_end(few_images, 1, "cpu", 32, "ini_resnet20", 4)
    assert min(found["whole"], found["synthetic"], found["ratio"], found["noise"]) > 0
    loader.report_end_to_end(found)
    assert "| G6 ini_resnet20, batch 4 |" in capsys.readouterr().out


def test_results_are_named_by_their_device(tmp_path: Path) -> None:
    assert run_all.gpu_name(tmp_path) == ""
    assert run_all.results_name("") == "cpu"
    for number, model in enumerate(("NVIDIA H100 80GB HBM3", "NVIDIA L4")):
        (tmp_path / f"0000:{number}").mkdir()
        (tmp_path / f"0000:{number}" / "information").write_text(f"Model: \t\t {model}\nIRQ: 17\n")
    assert run_all.gpu_name(tmp_path) == "NVIDIA H100 80GB HBM3"
    assert run_all.results_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
