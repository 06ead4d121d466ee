"""Each operation gives torchvision's pixels (PIL's where torchvision has none), for one image as for many."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from ii_dist.data.image_ops import SERIAL_VALUES, apply, pieces
from ii_dist.data.policies import GEOMETRIC, Op, Operations, operands
from ii_dist.models.compat import ensure_torchvision
from tests.images import picture

ensure_torchvision()
from timm.data.auto_augment import solarize_add  # noqa: E402
from torchvision.transforms import InterpolationMode  # noqa: E402
from torchvision.transforms import functional as tv  # noqa: E402

SIDES = (1, 2, 7, 64, 129)
LINEAR = InterpolationMode.BILINEAR
Oracle = Callable[[torch.Tensor, float], torch.Tensor]


def images(side: int) -> torch.Tensor:
    """A smooth picture, noise, one value, dark, and grey with one bright pixel: N x 3 x side x side."""
    rng = np.random.Generator(np.random.PCG64(side))
    noise = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    spot = np.full_like(noise, 100)
    spot[side // 2, side // 3] = (255, 0, 200)
    smooth = np.asarray(picture(side, side, side))
    return torch.from_numpy(np.stack([smooth, noise, np.full_like(noise, 37), noise // 5, spot])).permute(0, 3, 1, 2)


def operand(op: Op, values: list[float], side: int) -> torch.Tensor:
    drawn = Operations(np.full((1, len(values)), op, np.int8), np.array([values], dtype=np.float64))
    return torch.from_numpy(operands(drawn, side)[0].astype(np.float32))


def ours(op: Op, images_NCHW: torch.Tensor, value: float, fill: tuple[float, ...] = (0, 0, 0)) -> torch.Tensor:
    """One image after the other, as on the CPU."""
    one = operand(op, [value], images_NCHW.shape[-1])
    return torch.cat([apply(op, image[None].contiguous(), one, torch.tensor(fill).float()) for image in images_NCHW])


def affine(images_NCHW: torch.Tensor, shift: tuple[int, int], shear: tuple[float, float]) -> torch.Tensor:
    degrees = [math.degrees(math.atan(tangent)) for tangent in shear]
    center = [0, 0] if any(shear) else None
    return tv.affine(images_NCHW, 0.0, list(shift), 1.0, degrees, LINEAR, center=center)


def by_pil(change: Callable[[Image.Image], Image.Image]) -> Callable[[torch.Tensor], torch.Tensor]:
    def changed(images_NCHW: torch.Tensor) -> torch.Tensor:
        pixels_NHWC = images_NCHW.permute(0, 2, 3, 1).numpy()
        return torch.from_numpy(
            np.stack([np.asarray(change(Image.fromarray(image_HWC))) for image_HWC in pixels_NHWC])
        ).permute(0, 3, 1, 2)

    return changed


# Operation, values, oracle, and how many levels of 255 a pixel may be aside.
FACTORS = (0.0, 0.1, 0.5, 0.73, 1.0, 1.4, 1.9)
CASES: list[tuple[Op, tuple[float, ...], Oracle, int]] = [
    (Op.IDENTITY, (0,), lambda x, v: x, 0),
    (Op.BRIGHTNESS, FACTORS, tv.adjust_brightness, 0),
    (Op.COLOUR, FACTORS, tv.adjust_saturation, 1),
    (Op.CONTRAST, FACTORS, tv.adjust_contrast, 1),
    (Op.HUE, (-0.5, -0.13, 0.0, 0.1, 0.5), tv.adjust_hue, 1),
    (Op.POSTERIZE, (0, 1, 4, 7, 8), lambda x, v: tv.posterize(x, int(v)), 0),
    (Op.SOLARIZE, (0, 99.6, 100, 255), tv.solarize, 0),
    (Op.SOLARIZE_ADD, (0, 11, 110, 128), lambda x, v: by_pil(lambda im: solarize_add(im, int(v)))(x), 0),
    (Op.AUTOCONTRAST, (0,), lambda x, v: tv.autocontrast(x), 1),
    (Op.EQUALIZE, (0,), lambda x, v: tv.equalize(x), 0),
    (Op.INVERT, (0,), lambda x, v: tv.invert(x), 0),
    (Op.SHEAR_X, (-0.3, 0.0, 0.11, 0.99), lambda x, v: affine(x, (0, 0), (v, 0)), 1),
    (Op.SHEAR_Y, (-0.3, 0.0, 0.11, 0.99), lambda x, v: affine(x, (0, 0), (0, v)), 1),
    (Op.TRANSLATE_X, (-7, 0, 12), lambda x, v: affine(x, (int(v), 0), (0, 0)), 0),
    (Op.TRANSLATE_Y, (-7, 0, 12), lambda x, v: affine(x, (0, int(v)), (0, 0)), 0),
    (Op.ROTATE, (-135, -30, 0, 3, 90), lambda x, v: tv.rotate(x, v, LINEAR), 1),
]


def gaps(found: torch.Tensor, expected: torch.Tensor) -> tuple[int, float]:
    """The largest gap of a pixel, and the share of the values that have any."""
    gap = (found.int() - expected.int()).abs()
    return int(gap.max()), float((gap > 0).float().mean())


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("op", "values", "oracle", "levels"), CASES, ids=[case[0].name for case in CASES])
def test_pixels_are_torchvisions(op: Op, values: tuple[float, ...], oracle: Oracle, levels: int, side: int) -> None:
    batch = images(side)
    for value in values:
        before = batch.clone()
        found = ours(op, batch, value)
        assert torch.equal(batch, before)
        assert found.dtype == torch.uint8
        largest, share = gaps(found, oracle(batch, value))
        assert largest <= levels, value
        assert share < 0.08


def test_every_operation_is_tested() -> None:
    assert {case[0] for case in CASES} | {Op.SHARPNESS} == set(Op)


@pytest.mark.parametrize("side", [3, 7, 64, 129])
def test_sharpness_is_pils_to_the_last_bit(side: int) -> None:
    """torchvision's is one level darker where its convolution gives 99.99999 for 100; PIL's rim is another matter."""
    batch = images(side)
    for factor in FACTORS:
        found = ours(Op.SHARPNESS, batch, factor)
        by_hand = by_pil(lambda image, factor=factor: ImageEnhance.Sharpness(image).enhance(factor))(batch)  # type: ignore[misc]
        assert gaps(found, by_hand)[1] < 1e-3
        assert gaps(found, by_hand)[0] <= 1
        assert gaps(found, tv.adjust_sharpness(batch, factor))[0] <= 1


@pytest.mark.parametrize("op", GEOMETRIC)
def test_the_fill_moves_in_from_outside(op: Op) -> None:
    """Outside the fill, on the rim its mixture: the fill taken off, torchvision with black, the fill put back."""
    batch, fill, value = images(64), (124.0, 116.0, 104.0), 20.0 if op.name.startswith(("T", "R")) else 0.3
    oracle = next(case[2] for case in CASES if case[0] == op)
    fill_C11 = torch.tensor(fill)[:, None, None]
    expected = (oracle(batch.float() - fill_C11, value) + fill_C11).round()
    found = ours(op, batch, value, fill)
    assert gaps(found, expected)[0] <= 1
    corner = {Op.SHEAR_X: (-1, -1), Op.SHEAR_Y: (-1, -1), Op.TRANSLATE_X: (0, 0), Op.TRANSLATE_Y: (0, 0)}.get(
        op, (0, 0)
    )
    assert found[0, :, corner[0], corner[1]].tolist() == list(fill)


@pytest.mark.parametrize("case", CASES, ids=[case[0].name for case in CASES])
def test_a_batch_with_many_values_equals_the_images_alone(case: tuple[Op, tuple[float, ...], Oracle, int]) -> None:
    """To the last bit: the code that a GPU runs over a batch is the code that the CPU runs over an image."""
    op, values, _, _ = case
    side, fill = 129, (3.0, 100.0, 250.0)
    chosen = [values[i % len(values)] for i in range(5)]
    batch = images(side)
    alone = torch.cat([ours(op, batch[i : i + 1], value, fill) for i, value in enumerate(chosen)])
    together = apply(op, batch.contiguous(), operand(op, chosen, side), torch.tensor(fill))
    assert torch.equal(together, alone)
    strided = apply(op, batch, operand(op, chosen, side), torch.tensor(fill))  # channels-last memory
    assert torch.equal(strided, alone)


@pytest.mark.parametrize("shape", [(1, 3, 224, 224), (3, 1, 1), (1, 3, 700, 3), (3, 40_000, 1), (1, 3, 2, 50_000)])
def test_pieces_make_the_whole_and_are_small(shape: tuple[int, ...]) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    parts = pieces(whole)
    assert torch.equal(torch.cat(parts, -2), whole)
    assert all(part.numel() <= SERIAL_VALUES or part.shape[-2] == 1 for part in parts)
    assert all(part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for part in parts)


_PROGRAM = """
import os, threading, numpy as np, torch
from ii_dist.data.augment import EraseWindows
from ii_dist.data.image_ops import apply
from ii_dist.data.policies import Op, Operations
from ii_dist.data.retouch import Touches

torch.set_num_threads(4)
image_HWC = (torch.arange(320 * 320 * 3).view(320, 320, 3) % 251).to(torch.uint8)
image_1CHW, normalized = image_HWC.permute(2, 0, 1)[None].contiguous(), torch.ones(3, 320, 320)
operand, fill, zeros = torch.full((1, 6), 1.5), torch.zeros(3), torch.zeros(600_000)

def work():
    for op in Op:
        apply(op, image_1CHW, operand, fill)
        found[op.name] = len(os.listdir("/proc/self/task"))
    rectangle = EraseWindows(*(np.array([n]) for n in (3, 5, 300, 310, 9)))
    for noise in (None, zeros):
        touches = Touches(Operations(np.array([[Op.INVERT]]), np.zeros((1, 1))), rectangle, fill, noise)
        touches.erase(0, normalized)
        touches.changed(0, image_HWC, True)
        found[f"erase {noise is None}"] = len(os.listdir("/proc/self/task"))

found, before = {}, len(os.listdir("/proc/self/task"))
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert len(found) == len(Op) + 2
assert set(found.values()) == {before + 1}, (before, found)
"""


def test_torch_starts_no_threads_of_its_own_in_ours() -> None:
    subprocess.run([sys.executable, "-c", _PROGRAM], check=True, cwd=Path(__file__).parents[3])
