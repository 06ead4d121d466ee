"""Event files that torch's own writer made under the names of other trainers, read back under ours."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

pytest.importorskip("tensorboard")

from torch.utils.tensorboard import SummaryWriter

from ii_dist.config import CheckpointError, ConfigError
from ii_dist.metrics.events import has_events, read_events

Values = Mapping[str, Sequence[float]]


def write(folder: Path, values: Values, steps: Sequence[int] | None = None) -> Path:
    writer = SummaryWriter(str(folder))
    for tag, series in values.items():
        for k, value in enumerate(series):
            writer.add_scalar(tag, value, steps[k] if steps else k + 1)
    writer.close()
    return folder


PEERS: dict[str, tuple[Values, dict[str, float]]] = {
    "composer": (
        {
            "loss/train/total": [3.0, 2.0],
            "metrics/train/MulticlassAccuracy": [0.25, 0.5],
            "metrics/eval/MulticlassAccuracy": [0.25, 0.625],
            "metrics/eval/CrossEntropy": [3.0, 1.5],
            "throughput/samples_per_sec": [900.0, 1024.0],
            "throughput/device/samples_per_sec": [112.5, 128.0],
            "lr-DecoupledSGDW/group0": [0.5, 0.25],
            "time/epoch": [1.0, 2.0],
        },
        {
            "train/loss": 2.0,
            "train/top1": 50.0,
            "eval/top1": 62.5,
            "eval/loss": 1.5,
            "throughput/images_per_s": 1024.0,
            "throughput/images_per_s_rank": 128.0,
            "train/learning_rate": 0.25,
            "train/epoch": 2.0,
        },
    ),
    "torchtitan": (
        {
            "loss_metrics/global_avg_loss": [3.0, 2.0],
            "time_metrics/end_to_end(s)": [0.5, 0.25],
            "time_metrics/data_loading(%)": [50.0, 12.5],
            "memory/max_active(GiB)": [7.0, 8.0],
            "grad_norm": [1.0, 2.0],
        },
        {
            "train/loss": 2.0,
            "time/step_s": 0.25,
            "time/data_wait_share": 0.125,
            "memory/device_gib": 8.0,
            "train/grad_norm": 2.0,
        },
    ),
    "mmengine": (
        {
            "loss": [3.0, 2.0],
            "time": [1.0, 0.5],
            "data_time": [0.5, 0.125],
            "lr": [0.5, 0.25],
            "accuracy/top1": [10.0, 70.5],
            "accuracy/top5": [20.0, 90.0],
            "memory": [1024.0, 2048.0],
        },
        {
            "train/loss": 2.0,
            "time/step_s": 0.5,
            "time/data_wait_share": 0.25,
            "train/learning_rate": 0.25,
            "eval/top1": 70.5,
            "eval/top5": 90.0,
            "memory/device_gib": 2.0,
        },
    ),
    "lightning": (
        {
            "train_loss_step": [3.0, 2.0],
            "val_loss": [3.0, 2.5],
            "val_acc": [0.5, 0.75],
            "lr-SGD": [1.0, 0.5],
            "epoch": [0, 1],
        },
        {"train/loss": 2.0, "eval/loss": 2.5, "eval/top1": 75.0, "train/learning_rate": 0.5, "train/epoch": 1.0},
    ),
    "timm": (
        {
            "train_loss": [3.0, 2.0],
            "eval_loss": [2.0, 1.0],
            "eval_top1": [70.0, 76.5],
            "eval_top5": [90.0, 93.0],
            "lr": [1, 0.5],
        },
        {"train/loss": 2.0, "eval/loss": 1.0, "eval/top1": 76.5, "eval/top5": 93.0, "train/learning_rate": 0.5},
    ),
}


@pytest.mark.parametrize("who", PEERS)
def test_the_names_of_other_trainers_are_known(tmp_path: Path, who: str) -> None:
    written, expected = PEERS[who]
    run = read_events(write(tmp_path / who, written))
    assert {tag: run.metrics.last(tag) for tag in expected} == pytest.approx(expected)
    assert run.unknown == []
    assert set(run.mapped) == set(written)


def test_what_nobody_knows_is_listed_and_can_be_given_by_hand(tmp_path: Path) -> None:
    folder = write(tmp_path, {"speed": [500.0], "my/accuracy_ema": [0.5], "loss": [1.0]})
    assert sorted(read_events(folder).unknown) == ["my/accuracy_ema", "speed"]
    run = read_events(folder, {"speed": "throughput/images_per_s", "my/accuracy_ema": "eval/top1"})
    assert run.unknown == []
    assert run.metrics.rows[0].values == {"throughput/images_per_s": 500.0, "eval/top1": 50.0, "train/loss": 1.0}
    with pytest.raises(ConfigError, match="throughput/imges_per_s"):
        read_events(folder, {"speed": "throughput/imges_per_s"})


def test_a_tag_given_by_hand_goes_before_a_known_one(tmp_path: Path) -> None:
    folder = write(tmp_path, {"val_acc": [0.5], "val_acc_ema": [0.75]})
    assert read_events(folder, {"val_acc_ema": "eval/top1"}).metrics.last("eval/top1") == 75.0


def test_images_per_s_follow_from_the_batch_where_only_step_times_are_told(tmp_path: Path) -> None:
    folder = write(tmp_path, {"time": [0.5, 0.25]})
    assert read_events(folder).metrics.last("throughput/images_per_s") is None
    assert read_events(folder, global_batch=256).metrics.last("throughput/images_per_s") == 1024.0


def test_writers_in_folders_of_their_own(tmp_path: Path) -> None:
    write(tmp_path / "train", {"epoch_loss": [2.0]})
    write(tmp_path / "validation", {"epoch_loss": [3.0], "epoch_accuracy": [0.5]})
    run = read_events(tmp_path, {"validation/epoch_accuracy": "eval/top1"})
    assert run.metrics.rows[0].values == {"train/loss": 2.0, "eval/loss": 3.0, "eval/top1": 50.0}


def test_an_attempt_that_went_back_replaces_what_it_makes_again(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    write(first, {"loss": [1.0, 2.0, 3.0, 4.0]})
    write(second, {"loss": [30.0, 50.0]}, steps=[3, 5])
    (file,) = first.iterdir()
    (later,) = second.iterdir()
    both = tmp_path / "both"
    both.mkdir()
    shutil.copy(file, both / "events.out.tfevents.1000000000.h")
    shutil.copy(later, both / "events.out.tfevents.2000000000.h")
    rows, values = read_events(both).metrics.series("train/loss")
    assert [(row.step, value) for row, value in zip(rows, values, strict=True)] == [(1, 1), (2, 2), (3, 30), (5, 50)]


@pytest.mark.parametrize("damage", ["header", "body", "flip"])
def test_a_file_cut_off_or_damaged_is_read_up_to_there(tmp_path: Path, damage: str) -> None:
    (file,) = write(tmp_path, {"loss": [float(k) for k in range(100)]}).iterdir()
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    if damage == "header":
        content += b"\x18\0\0\0\0\0\0\0torn"
    elif damage == "body":
        del content[middle:]
    else:
        content[middle] ^= 0x10
    file.write_bytes(content)
    _, values = read_events(tmp_path).metrics.series("train/loss")
    assert values == [float(k) for k in range(len(values))]
    assert len(values) == 100 if damage == "header" else 40 <= len(values) <= 60


def test_a_folder_without_event_files_is_one_line(tmp_path: Path) -> None:
    assert not has_events(tmp_path)
    with pytest.raises(CheckpointError, match="neither a run folder") as caught:
        read_events(tmp_path)
    assert "\n" not in str(caught.value)
