"""tools.prove_resume: a proof in one line, and the first image that would spoil it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ii_dist.config import ConfigError, DataError
from ii_dist.data.positions import Rows, TrainSchedule
from tests.images import make_data_set
from tools.prove_resume import main

ROOT = Path(__file__).resolve().parents[3]
CLASSES, PER_CLASS = 3, 20  # 60 images, 5 steps of 12 an epoch


def write_config(folder: Path) -> Path:
    make_data_set(folder / "set", CLASSES, PER_CLASS, 2, (40, 30))
    (folder / "run.yaml").write_text(
        f"name: x\ndata: {{root: {folder}/set, image_size: 16, eval_image_size: 16, eval_resize: 16}}\n"
        "optim: {warmup_epochs: 0}\ntrain: {epochs: 4, global_batch: 12}\nengine: {device: cpu}\n"
    )
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("prove"))


def proof(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize("source", ["dali", "torch", "synthetic"])
def test_one_line_of_proof(config: Path, capsys: pytest.CaptureFixture[str], source: str) -> None:
    more = ["data.synthetic_images=60", "data.synthetic_classes=3"] if source == "synthetic" else []
    line = proof(capsys, config, "--steps", 2, f"data.source={source}", "train.max_images_per_rank=3", *more)
    assert re.fullmatch(
        r"4 steps of 12: 48 images, hashes agree between 2 ranks uninterrupted and 4 ranks resumed at step 2, and from "
        r"the middle of epoch 1 \(image 24\); each sample at most once an epoch; images [0-9a-f]{12}",
        line,
    )


def test_json_and_other_numbers_of_ranks(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (config, "--steps=6", "--json", "data.source=torch")
    found = [json.loads(proof(capsys, *arguments, f"--from-ranks={a}", f"--to-ranks={b}")) for a, b in ((1, 3), (6, 1))]
    for key, value in (("ok", True), ("steps", 12), ("images", 144), ("resumed_after_step", 6), ("global_batch", 12)):
        assert [row[key] for row in found] == [value] * 2
    assert found[0]["resumed_at"] == {"epoch": 1, "offset": 12}
    assert found[0]["sha256"] == found[1]["sha256"]
    assert found[0]["seek_s"] < 1
    other = json.loads(proof(capsys, *arguments, "seed=1"))
    assert other["sha256"] != found[0]["sha256"]


def test_as_a_command_with_progress_on_stderr(config: Path) -> None:
    command = [sys.executable, "-m", "tools.prove_resume", str(config), "data.source=torch", "--from-ranks", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: train.global_batch 12: does not divide over 5 ranks")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("source", ["dali", "torch"])
def test_bad_files_give_way_to_the_same_images(tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str) -> None:
    config = write_config(tmp_path)
    for path in sorted((tmp_path / "set" / "train").rglob("*.jpg"))[::15]:
        path.write_bytes(bytes(path.stat().st_size))
    arguments = (config, "--steps=5", "--json", f"data.source={source}", "data.max_bad_share=0.5")
    found = json.loads(proof(capsys, *arguments))
    assert (found["ok"], found["images"], found["bad_files"]) == (True, 120, 8)  # 4 of 60 in each of two whole epochs


def refusal(config: Path, *arguments: str) -> str:
    with pytest.raises(DataError) as raised:
        main([str(config), "--steps", "2", "data.source=torch", *arguments])
    return str(raised.value)


def test_another_image_after_the_seek_is_named(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = TrainSchedule.rows

    def off_by_one(self: TrainSchedule, number: int) -> Rows:
        return real(self, number + (self.batch == 3 and number > 2))  # on four ranks, from the fourth step on

    monkeypatch.setattr(TrainSchedule, "rows", off_by_one)
    said = refusal(config)
    assert re.match(
        r"image 0 of step 4 \(epoch 0\): is row \d+, class_\d\d/\d{5}\.jpg for 4 ranks resumed at image", said
    )
    assert said.endswith(".jpg for 2 ranks uninterrupted")


def test_other_pixels_of_the_right_image_are_named(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ii_dist.data.source import Request

    real = Request.windows

    def by_rank(self: Request, rows: Rows) -> object:
        windows = real(self, rows)
        if self.schedule.batch == 3:  # four ranks
            windows.flip_N[-1] ^= 1  # type: ignore[union-attr]
        return windows

    monkeypatch.setattr(Request, "windows", by_rank)
    said = refusal(config)
    assert re.match(
        r"image 2 of step 3 \(epoch 0, row \d+, class_.*\.jpg\): values differ between 4 ranks resumed", said
    )
    assert main([str(config), "--steps", "2", "data.source=torch", "--json"]) == 3
    assert json.loads(capsys.readouterr().out) == {"ok": False, "error": said}


def test_an_image_handed_out_twice_is_named(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_replacement(images: int, seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        return positions % 30

    monkeypatch.setattr("ii_dist.data.positions.epoch_indices", with_replacement)
    assert refusal(config) == "row 0, class_00/00000.jpg: handed out twice in epoch 0"


def test_batches_that_do_not_divide_are_refused_before_anything_is_read(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch 12: does not divide over 8 ranks"):
        main([str(config), "--to-ranks", "8", "data.root=/nowhere-else", "data.source=synthetic"])
