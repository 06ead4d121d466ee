"""Windows: pure, inside the image, and distributed as torchvision's."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from ii_dist.config import AugmentConfig
from ii_dist.data.augment import crop_windows, eval_windows, flips, train_windows

CFG = AugmentConfig()
GOLDEN_WINDOWS = [[230, 8, 252, 238, 0], [51, 189, 183, 142, 0], [1, 6, 378, 365, 1], [1, 137, 224, 185, 1]]


def sizes(width: int, height: int, count: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    return np.full(count, width, np.int32), np.full(count, height, np.int32)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (1, 1), (1, 900), (900, 1), (32, 32), (3000, 40), (2, 3)])
@pytest.mark.parametrize("cfg", [CFG, AugmentConfig(crop_scale=(1.0, 1.0)), AugmentConfig(crop_ratio=(0.2, 8.0))])
def test_windows_lie_inside_the_image(size: tuple[int, int], cfg: AugmentConfig) -> None:
    x, y, w, h = crop_windows(1, 2, np.arange(500), *sizes(*size, 500), cfg)
    assert all(column.dtype == np.int32 for column in (x, y, w, h))
    assert min(x.min(), y.min()) >= 0
    assert min(w.min(), h.min()) >= 1
    assert (x + w <= size[0]).all()
    assert (y + h <= size[1]).all()


def test_a_window_depends_only_on_seed_epoch_and_index() -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    index = rng.permutation(1000)[:64]
    width, height = rng.integers(20, 600, 1000, dtype=np.int32), rng.integers(20, 600, 1000, dtype=np.int32)
    batch = train_windows(3, 7, index, width[index], height[index], CFG)
    for place in (0, 13, 63):
        row = index[place : place + 1]
        alone = train_windows(3, 7, row, width[row], height[row], CFG)
        for name in ("x_N", "y_N", "width_N", "height_N", "flip_N"):
            assert getattr(alone, name)[0] == getattr(batch, name)[place]
    other = [train_windows(s, e, index, width[index], height[index], CFG) for s, e in ((4, 7), (3, 8))]
    assert all(((batch.x_N != o.x_N) | (batch.width_N != o.width_N)).mean() > 0.9 for o in other)
    assert all(0.2 < (batch.flip_N != o.flip_N).mean() < 0.8 for o in other)


def reference_window(rng: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    """RandomResizedCrop as torchvision documents it, one image, drawn from numpy's own generator."""
    for _ in range(10):
        area = width * height * rng.uniform(*CFG.crop_scale)
        ratio = math.exp(rng.uniform(math.log(CFG.crop_ratio[0]), math.log(CFG.crop_ratio[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h
    ratio = width / height
    if ratio < CFG.crop_ratio[0]:
        w, h = width, round(width / CFG.crop_ratio[0])
    elif ratio > CFG.crop_ratio[1]:
        w, h = round(height * CFG.crop_ratio[1]), height
    else:
        w, h = width, height
    return (width - w) // 2, (height - h) // 2, w, h


@pytest.mark.parametrize("size", [(500, 375), (64, 64), (900, 120)])
def test_windows_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    count = 20_000
    ours = np.stack(crop_windows(0, 0, np.arange(count), *sizes(*size, count), CFG)).astype(float)
    rng = np.random.Generator(np.random.PCG64(9))
    theirs = np.array([reference_window(rng, *size) for _ in range(count)]).T.astype(float)
    for mine, reference in zip(ours, theirs, strict=True):
        at_most = 1.63 * math.sqrt(2 / count) * 1.3  # Kolmogorov-Smirnov, 1 %, with room for ties
        values = np.unique(np.concatenate([mine, reference]))
        gap = np.searchsorted(np.sort(mine), values, "right") - np.searchsorted(np.sort(reference), values, "right")
        assert np.abs(gap).max() / count < at_most


def test_an_extreme_image_gets_the_centre_window() -> None:
    x, y, w, h = crop_windows(0, 0, np.arange(50), *sizes(5000, 10, 50), AugmentConfig(crop_scale=(1.0, 1.0)))
    assert set(zip(x.tolist(), y.tolist(), w.tolist(), h.tolist(), strict=True)) == {((5000 - 13) // 2, 0, 13, 10)}


def test_flips_follow_their_probability() -> None:
    index = np.arange(10_000)
    assert flips(0, 0, index, AugmentConfig(flip=0.0)).sum() == 0
    assert flips(0, 0, index, AugmentConfig(flip=1.0)).sum() == 10_000
    assert abs(flips(0, 0, index, CFG).mean() - 0.5) < 0.02
    both = flips(0, 0, index, CFG) & flips(0, 1, index, CFG)
    assert abs(both.mean() - 0.25) < 0.02


def test_the_windows_never_change_by_accident() -> None:
    found = train_windows(7, 3, np.arange(4), *sizes(500, 375, 4), CFG)
    assert np.stack([found.x_N, found.y_N, found.width_N, found.height_N, found.flip_N]).T.tolist() == GOLDEN_WINDOWS


def torchvision_centre(width: int, height: int, resize: int, crop: int) -> tuple[int, int, int, int]:
    """Resize(resize) + CenterCrop(crop): sizes and corner, as their code computes them, one image."""
    short, long = min(width, height), max(width, height)
    new_long = int(resize * long / short)
    w, h = (resize, new_long) if width <= height else (new_long, resize)
    return w, h, round((w - crop) / 2.0), round((h - crop) / 2.0)


def test_evaluation_windows_equal_torchvisions() -> None:
    rng = np.random.Generator(np.random.PCG64(1))
    width = np.concatenate([rng.integers(1, 3000, 5000), [500, 375, 1, 256, 257]]).astype(np.int32)
    height = np.concatenate([rng.integers(1, 3000, 5000), [375, 500, 1, 257, 256]]).astype(np.int32)
    for resize, crop in ((256, 224), (232, 224), (32, 32), (235, 224)):
        found = eval_windows(width, height, resize, crop)
        columns = (found.resized_width_N, found.resized_height_N, found.x_N, found.y_N)
        assert list(zip(*(c.tolist() for c in columns), strict=True)) == [
            torchvision_centre(w, h, resize, crop) for w, h in zip(width.tolist(), height.tolist(), strict=True)
        ]
