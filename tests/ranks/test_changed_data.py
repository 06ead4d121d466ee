"""A run on images goes on with the same images only, and says in words what is different in others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ii_dist.data import build_index, write_index
from tests.images import make_data_set

pytestmark = pytest.mark.ranks

CONFIG = """
name: run
data: {source: torch, image_size: 16, eval_image_size: 16, eval_resize: 16, prefetch_batches: 1}
model: {network: ini_resnet20, gate: se}
optim: {warmup_epochs: 1}
engine: {device: cpu}
train: {epochs: 4, global_batch: 4, eval_every_epochs: 1, eval_batch_per_rank: 4, stop_after_steps: 2}
checkpoint: {every_steps: 1, every_epochs: 0}
"""


def train(folder: Path, *words: str) -> tuple[int, str]:
    ended = subprocess.run(
        [sys.executable, "-m", "ii_dist", "train", str(folder / "run.yaml"), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return ended.returncode, ended.stderr


def index_again(folder: Path) -> None:
    for split in ("train", "val"):
        rows, names = build_index(folder / split)
        write_index(folder / f"{split}.index", rows, names, root=split)


def test_resume_on_other_images_is_refused_in_words(tmp_path: Path) -> None:
    data = make_data_set(tmp_path / "data", classes=2, train_per_class=6, val_per_class=2, size=(20, 20))
    (tmp_path / "run.yaml").write_text(CONFIG + f"runs_folder: {tmp_path}/runs\n")
    root = f"data.root={data}"
    code, said = train(tmp_path, root)
    assert code == 75, said
    remembered = json.loads((tmp_path / "runs" / "run" / "index.json").read_text())
    assert (remembered["images"], remembered["classes"]) == (12, ["class_00", "class_01"])

    plan = (tmp_path / "runs" / "run" / "plan.json").read_bytes()
    gone = data / "train" / "class_01" / "00003.jpg"
    gone.unlink()
    index_again(data)
    code, said = train(tmp_path, root)
    assert code == 4
    line = said.splitlines()[-1]
    assert "12 images then, 11 now (1 removed); another number of images in class class_01 (6 then, 5 now)" in line
    assert "restore data.root or give the run another name" in line
    assert (tmp_path / "runs" / "run" / "plan.json").read_bytes() == plan
