"""Whole runs of `ii-dist train` over a data set with bad files: to the end; stopped by too many, and gone on."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from ii_dist.data import build_index, write_index
from tests import failing_disk
from tests.images import make_image_folder
from tests.ranks.start import output, run_ranks

pytestmark = pytest.mark.ranks

CLASSES, PER_CLASS, VAL_PER_CLASS, EPOCHS = 3, 16, 6, 3
BAD_ROWS, BAD_VAL_ROWS = (3, 17, 18, 40), (2, 11)
STEPS = 4 * EPOCHS
CONFIG = """
name: run
data: {source: dali, image_size: 16, eval_image_size: 16, eval_resize: 18, prefetch_batches: 3, threads_per_rank: 1,
       max_bad_share: 0.25, read_retries: 2}
model: {network: ini_resnet20, gate: none}
optim: {lr: 0.05, lr_reference_batch: 0, warmup_epochs: 0}
engine: {device: cpu}
train: {epochs: 3, global_batch: 12, eval_every_epochs: 3, eval_batch_per_rank: 4}
checkpoint: {every_steps: 1, every_epochs: 0, keep_last: 9}
metrics: {log_every_steps: 1, boards: [jsonl]}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bad")
    for split, count, bad in (("train", PER_CLASS, BAD_ROWS), ("val", VAL_PER_CLASS, BAD_VAL_ROWS)):
        images = make_image_folder(root / "set" / split, CLASSES, count, (28, 22), seed=count)
        rows, classes = build_index(images)
        write_index(root / "set" / f"{split}.index", rows, classes, root=split)
        for row in bad:
            path = images / rows[row].path
            path.write_bytes(b"<html>try again later".ljust(path.stat().st_size, b" "))
    (root / "run.yaml").write_text(CONFIG + f"runs_folder: {root}/runs\n")
    return root


def train(folder: Path, name: str, *overrides: str, ranks: int = 2, **env: str) -> list[int]:
    command = ["-m", "ii_dist", "train", str(folder / "run.yaml"), f"name={name}", f"data.root={folder}/set"]
    return run_ranks([*command, *overrides], ranks, folder / "out" / name, **env)


def lines(folder: Path, name: str, rank: int = 0) -> list[dict[str, Any]]:
    text = (folder / "runs" / name / "metrics" / f"rank_{rank:05d}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def curve(folder: Path, name: str) -> dict[int, tuple[float, float]]:
    found = [row for row in lines(folder, name) if "train/loss" in row]
    return {row["step"]: (row["train/grad_norm"], row["data/substituted_images"]) for row in found}


def listed(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / name / "quarantine.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(folder: Path) -> str:
    assert train(folder, "whole") == [0, 0]
    return "whole"


def test_a_run_over_bad_files_ends_well_and_says_what_it_met(folder: Path, whole: str) -> None:
    assert sorted(curve(folder, whole)) == list(range(1, STEPS + 1))
    # Every epoch asks for each image once, so each bad one is replaced once an epoch, whatever takes its place.
    assert sum(bad for _, bad in curve(folder, whole).values()) == EPOCHS * len(BAD_ROWS)
    assert [row["data/substituted_images"] for row in lines(folder, whole, 1) if "train/loss" in row] == [
        bad for _, bad in curve(folder, whole).values()
    ]
    (evaluated,) = [row for row in lines(folder, whole) if "eval/images" in row]
    assert evaluated["eval/images"] == CLASSES * VAL_PER_CLASS - len(BAD_VAL_ROWS)
    assert evaluated["eval/left_out_images"] == len(BAD_VAL_ROWS)
    entries = listed(folder, whole)
    assert sorted((entry["split"], entry["row"]) for entry in entries) == sorted(
        [("train", row) for row in BAD_ROWS] + [("val", row) for row in BAD_VAL_ROWS]
    )
    assert all(entry["reason"] == "cannot be decoded (text or HTML)" for entry in entries)
    said = output(folder / "out" / whole)
    assert all(1 <= said.count(f"{entry['path']}: cannot be decoded") <= 2 for entry in entries)  # once a process


def test_too_many_bad_files_stop_all_ranks_and_a_larger_share_lets_them_go_on(
    folder: Path, whole: str, tmp_path: Path
) -> None:
    if not failing_disk.has_compiler():
        pytest.skip("no C compiler")
    # 5 % of 48 images are 2, three are always allowed: the fourth of the first epoch is one too many.
    assert train(folder, "again", "data.max_bad_share=0.05") == [3, 3]
    said = output(folder / "out" / "again")
    error = next(line for line in said.splitlines() if line.startswith("error: "))
    assert "epoch 0: 4 images could not be read or decoded, 8.33% of 48" in error
    assert "the first ones: train/class_0" in error
    assert f"python -m tools.scan_dataset {folder}/set" in error
    before = curve(folder, "again")  # the numbers of the last step are written
    assert sum(bad for _, bad in before.values()) == 4

    library = failing_disk.build(tmp_path)
    env = failing_disk.environment(library, "class_01/00010.jpg", 2, errno.ESTALE)
    env = {name: value for name, value in env.items() if name.startswith(("LD_", "DISK_"))}
    assert train(folder, "again", **env) == [0, 0]
    starts = [row["step"] for row in lines(folder, "again") if row.get("event") == "start"]
    assert starts[-1] % 4 > 0  # in the middle of an epoch
    assert curve(folder, "again") == curve(folder, whole)
    assert sum(row.get("data/read_retries", 0) for row in lines(folder, "again")) >= 2
    assert len(listed(folder, "again")) == len(BAD_ROWS) + len(BAD_VAL_ROWS)  # none twice after the second start
