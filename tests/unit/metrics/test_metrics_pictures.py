"""The pictures for TensorBoard, taken apart again with PIL."""

import io

import numpy as np
import pytest
from PIL import Image

from ii_dist.metrics.pictures import COLUMNS, GAP, LINE, SIDE, batch_png, gate_png

F32 = np.float32


def read(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))


def test_a_batch_is_a_grid_of_its_images_with_captions() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (6, 3), dtype=np.uint8)
    images_NHWC = np.broadcast_to(colours[:, None, None], (6, 32, 32, 3)).copy()
    images_NHWC[3, 0, 0] = (255, 0, 0)
    sheet = read(batch_png(images_NHWC, [f"class {n}" for n in range(6)]))
    assert sheet.shape == (GAP + 2 * (SIDE + LINE + GAP), GAP + COLUMNS * (SIDE + GAP), 3)
    for number, colour in enumerate(colours):
        left, top = GAP + number % COLUMNS * (SIDE + GAP), GAP + number // COLUMNS * (SIDE + LINE + GAP)
        assert (sheet[top + SIDE - 1, left + SIDE - 1] == colour).all()
        below = sheet[top + SIDE : top + SIDE + LINE, left : left + SIDE]
        assert below.min() < 60, number  # something is written there
    corner = sheet[GAP : GAP + 4, GAP + 3 * (SIDE + GAP) :][:, :4]
    assert (corner == (255, 0, 0)).all()  # a pixel of 32 is a square of 4: nothing is blurred


def test_images_that_are_large_or_not_square_fit() -> None:
    sheet = read(batch_png(np.full((1, 320, 160, 3), 9, np.uint8), ["a caption that is far too long for the image"]))
    assert sheet.shape == (GAP + 160 + LINE + GAP, GAP + 80 + GAP, 3)


@pytest.mark.parametrize("shape", [(4, 8), (256, 16), (10, 2)])
def test_what_a_gate_sees_is_bright_where_it_is_large(shape: tuple[int, int]) -> None:
    image_NHW = np.zeros((2, *shape), F32)
    image_NHW[1, 0, 0] = 1.0  # in the second image the first value of the pseudo-image is the largest
    scale_NC = np.linspace(0, 1, 32, dtype=F32)[None].repeat(2, 0)
    images_NHWC = np.zeros((2, 32, 32, 3), np.uint8)
    with_lens = read(gate_png(images_NHWC, "title", image_NHW, image_NHW[:, 1:-1, :1], scale_NC))
    without = read(gate_png(images_NHWC, "title", None, None, scale_NC))
    assert with_lens.shape[0] == without.shape[0]
    assert with_lens.shape[1] > without.shape[1]
    left = GAP + SIDE + GAP
    tops = [2 * GAP + 2 * LINE + row * (SIDE + GAP) for row in range(2)]
    first, second = (with_lens[top, left].astype(int) for top in tops)
    assert first.tolist() == [68, 1, 84]
    # Of so many values that are alike the one that is not is cut off at the end of the scale, and still differs.
    assert second.sum() > first.sum()
    right = with_lens[tops[0] :, -GAP - 40 : -GAP]
    assert (right == (31, 95, 168)).all(-1).any()  # dots
