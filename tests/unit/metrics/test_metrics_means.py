"""Sums on the device against numpy, skipped updates, and what a read gives back."""

import math

import numpy as np
import pytest
import torch

from ii_dist.metrics.means import (
    EVAL_SUMS,
    TRAIN_MAXIMA,
    TRAIN_SUMS,
    RunningMeans,
    _OnDevice,
    _OnHost,
    eval_tags,
    train_tags,
)
from ii_dist.metrics.tags import TAGS


def step(
    loss: float, images: float = 4.0, top1: float = 0.0, norm: float = 1.0, skipped: float = 0.0, row: float = 0.0
) -> dict[str, torch.Tensor]:
    values = {"loss": loss, "images": images, "top1": top1, "top5": images, "grad_norm": norm}
    return {n: torch.tensor(v) for n, v in (values | {"skipped": skipped, "skipped_in_row": row}).items()}


def test_means_equal_numpy() -> None:
    rng = np.random.default_rng(0)
    losses = rng.random(300).astype(np.float32) * 100
    images = rng.integers(1, 65, 300).astype(np.float32)
    right = np.floor(images * rng.random(300)).astype(np.float32)
    norms = rng.random(300).astype(np.float32)
    means = RunningMeans("cpu")
    for loss, n, top1, norm in zip(losses, images, right, norms, strict=True):
        means.add(step(float(loss), float(n), float(top1), float(norm)))
    read = means.read()
    total = images.astype(np.float64).sum()
    assert read["loss"] == pytest.approx(losses.astype(np.float64).sum() / total, rel=1e-14)
    assert read["top1"] == pytest.approx(100 * right.astype(np.float64).sum() / total, rel=1e-14)
    assert read["top5"] == 100.0
    assert read["grad_norm"] == pytest.approx(norms.astype(np.float64).mean(), rel=1e-14)
    assert read["images"] == total
    assert read["steps"] == 300


def test_many_images_are_counted_exactly() -> None:
    """float32 loses single images above 2**24; the sums must not."""
    means = RunningMeans("cpu", EVAL_SUMS, ())
    for images in (2.0**24, 1.0, 1.0, 1.0):
        means.add(step(0.0, images))
    assert means.read()["images"] == 2**24 + 3


def test_whole_numbers_and_flags_may_stand_among_the_values() -> None:
    means = RunningMeans("cpu")
    means.add(step(8.0) | {"top1": torch.tensor(3), "skipped": torch.tensor(False)})
    assert means.read()["top1"] == 75.0


def test_a_skipped_update_is_counted_and_leaves_the_means_alone() -> None:
    means = RunningMeans("cpu")
    means.add(step(8.0, norm=2.0))
    means.add(step(math.nan, norm=math.inf, skipped=1.0, row=1.0))
    means.add(step(math.inf, norm=math.nan, skipped=1.0, row=2.0))
    means.add(step(4.0, norm=4.0))
    read = means.read()
    assert (read["loss"], read["grad_norm"], read["images"]) == (1.5, 3.0, 8.0)
    assert (read["skipped"], read["skipped_in_row"], read["steps"]) == (2.0, 2.0, 4.0)


def test_reading_starts_again() -> None:
    means = RunningMeans("cpu")
    means.add(step(8.0, skipped=1.0, row=1.0))
    means.read()
    means.add(step(4.0))
    read = means.read()
    assert (read["loss"], read["skipped"], read["skipped_in_row"], read["steps"]) == (1.0, 0.0, 0.0, 1.0)


def test_means_over_nothing_are_not_a_number() -> None:
    read = RunningMeans("cpu").read()
    assert math.isnan(read["loss"])
    assert read["images"] == 0


def test_many_steps_between_two_reads_are_all_counted() -> None:
    means = RunningMeans("cpu")
    for number in range(1200):
        means.add(step(float(number)))
    read = means.read()
    assert read["steps"] == 1200
    assert read["images"] == 1200 * 4
    assert read["loss"] == pytest.approx(sum(range(1200)) / (1200 * 4))


def test_tags_of_means_are_in_the_table() -> None:
    means = RunningMeans("cpu")
    means.add(step(8.0))
    tags = train_tags(means.read()) | eval_tags({"loss": 1.0, "top1": 2.0, "top5": 3.0, "images": 4.0}, seconds=0.5)
    assert tags.keys() <= TAGS.keys()
    assert tags["train/loss"] == 2.0
    assert tags["eval/seconds"] == 0.5


def test_numbers_on_the_host_are_the_sums_of_the_device_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    sums = _OnHost(TRAIN_SUMS, TRAIN_MAXIMA), _OnDevice(TRAIN_SUMS, TRAIN_MAXIMA, torch.device("cpu"))
    for step in range(700):  # more than a device keeps at once
        numbers = torch.rand(len(TRAIN_SUMS) + 1, generator=generator) * 100
        values = dict(zip((*TRAIN_SUMS, *TRAIN_MAXIMA), numbers.unbind(), strict=True))
        values["skipped"] = torch.tensor(float(step % 50 == 7))
        if step % 50 == 7:
            values["loss"] = torch.tensor(math.nan)
        for each in sums:
            each.add(values)
    host, device = (each.take(reduce=False) for each in sums)
    assert host == device
    assert host[len(TRAIN_SUMS)] == 700
    assert sums[0].take(reduce=False) == [0.0] * 8
