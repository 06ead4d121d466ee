"""Resize, normalize, mirror: PIL's pixels, torchvision's values, one thread."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from ii_dist.data.resample import Normalizer, resize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDES = (1, 2, 7, 48, 105, 224)


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """The worst case of a resize: every pixel another."""
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (height, width, 3), dtype=np.uint8)


def by_pil(pixels_HWC: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(pixels_HWC).resize((width, height), Image.Resampling.BILINEAR))


@pytest.mark.parametrize(
    "size", [(375, 500), (31, 77), (224, 224), (1, 1), (1, 300), (300, 1), (2, 3), (225, 223), (900, 40)]
)
@pytest.mark.parametrize("wanted", [(224, 224), (256, 341), (17, 60), (1, 1), (7, 301)])
def test_a_resized_image_is_pils(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    pixels_HWC = noise(*size)
    found = resize(torch.from_numpy(pixels_HWC), *wanted)
    assert found.dtype == torch.uint8
    gap = found.numpy().astype(int) - by_pil(pixels_HWC, *wanted)
    assert np.abs(gap).max() <= 1
    assert abs(gap.mean()) < 0.05  # rounded otherwise here and there, never towards one side


def test_a_window_of_a_larger_image_is_resized_alike() -> None:
    whole = noise(120, 160)
    window = whole[11:91, 30:133]
    alone = resize(torch.from_numpy(window.copy()), 48, 48)
    assert torch.equal(resize(torch.from_numpy(whole)[11:91, 30:133], 48, 48), alone)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("mirrored", [False, True])
def test_normalized_values_are_those_of_the_formula(side: int, mirrored: bool) -> None:
    whole_HWC = torch.from_numpy(noise(side + 3, side + 5))
    image_HWC = whole_HWC[2 : 2 + side, 1 : 1 + side]  # a window, as evaluation cuts it
    seen = image_HWC.numpy()[:, ::-1] if mirrored else image_HWC.numpy()
    expected = (seen.astype(np.float64) / 255 - np.array(MEAN)) / np.array(STD)
    last, planar = torch.full((3, side, side, 3), 9.0), torch.full((3, 3, side, side), 9.0)
    Normalizer(MEAN, STD, side, channels_last=True).write(image_HWC, mirrored, last[1])
    Normalizer(MEAN, STD, side, channels_last=False).write(image_HWC, mirrored, planar[1])
    assert np.abs(last[1].numpy() - expected).max() < 2e-6
    assert torch.equal(last[1].permute(2, 0, 1), planar[1])  # to the last bit
    assert all(bool((batch[i] == 9).all()) for batch in (last, planar) for i in (0, 2))  # neighbours are left alone


_PROGRAM = """
import os, threading, torch
from ii_dist.data.resample import Normalizer, resize

torch.set_num_threads(4)
image = torch.arange(375 * 500 * 3).remainder(251).to(torch.uint8).view(375, 500, 3)

def work():  # in one thread: the kernel may list a thread that has ended a little longer
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for channels_last, shape in ((True, (224, 224, 3)), (False, (3, 224, 224))):
        Normalizer(mean, std, 224, channels_last).write(resize(image, 224, 224), True, torch.empty(shape))
        resize(image, 256, 341)
        tasks.append(len(os.listdir("/proc/self/task")))

tasks, before = [], len(os.listdir("/proc/self/task"))
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert tasks == [before + 1] * 2, (before, tasks)
"""


def test_torch_starts_no_threads_of_its_own_in_ours() -> None:
    """N threads of ours with N threads of torch's each would be N times as many as there are cores."""
    subprocess.run([sys.executable, "-c", _PROGRAM], check=True, cwd=Path(__file__).parents[3])
