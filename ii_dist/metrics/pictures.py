"""Pictures of a run for TensorBoard, drawn in milliseconds: batches of images, and what a gate sees of some.

In: pixels and arrays. Out: PNG files as bytes. The large picture for people is that of `tools.show_inner_images`.
"""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

# Pixels: smallest and largest image, space, a line of text. TensorBoard shows a sheet at about half its size.
SIDE, LARGEST, GAP, LINE = 128, 160, 8, 24
TEXT, LETTER = 19, 10  # size of the letters, and how wide one is
COLUMNS = 4
FACTORS_WIDTH = 256
PAPER, INK, FAINT, DOT = (255, 255, 255), (34, 34, 34), (170, 170, 170), (31, 95, 168)
CLIPPED_PERCENT = 0.5  # at each end of a colour scale, so that one outlier does not flatten the rest
# Dark blue to yellow, evenly lighter: readable without colours too.
_COLOURS = np.array(
    [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]], np.float32
)


def batch_png(images_NHWC: U8, captions: Sequence[str]) -> bytes:
    """The images in rows of four, each with its caption below."""
    from PIL import Image, ImageDraw

    cells = [_resized(pixels_HWC) for pixels_HWC in images_NHWC]
    side_x, side_y = cells[0].size
    columns = min(COLUMNS, len(cells))
    pitch_x, pitch_y = side_x + GAP, side_y + LINE + GAP
    sheet = Image.new("RGB", (GAP + columns * pitch_x, GAP + -(-len(cells) // columns) * pitch_y), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (cell, caption) in enumerate(zip(cells, captions, strict=True)):
        left, top = GAP + number % columns * pitch_x, GAP + number // columns * pitch_y
        sheet.paste(cell, (left, top))
        _write(draw, left, top + side_y, _short(caption, side_x))
    return _png(sheet)


def gate_png(images_NHWC: U8, title: str, image_NHW: F32 | None, view_Nhw: F32 | None, scale_NC: F32) -> bytes:
    """A row an image: the image, the pseudo-image that the gate makes of its channels, the lens's view of that (both
    where there is a lens), and the factor of each channel (channels in the order of their mean over the images)."""
    from PIL import Image, ImageDraw

    columns: list[tuple[str, list[Image.Image]]] = [("image", [_resized(pixels_HWC) for pixels_HWC in images_NHWC])]
    side_y = columns[0][1][0].size[1]
    for name, values in (("inner image", image_NHW), ("lens", view_Nhw)):
        if values is not None:
            rows, across = values.shape[1:]
            columns.append((f"{name} {rows}x{across}", _heat_maps(values, side_y)))
    low, high = float(scale_NC.min()), float(scale_NC.max())
    columns.append((f"{scale_NC.shape[1]} factors {low:.2f}-{high:.2f}", _factors(scale_NC, side_y)))
    width = GAP + sum(GAP + max(cells[0].size[0], LETTER * len(name)) for name, cells in columns)
    sheet = Image.new("RGB", (width, 3 * GAP + 2 * LINE + len(images_NHWC) * (side_y + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, GAP, GAP, title)
    left = GAP
    for name, cells in columns:
        _write(draw, left, GAP + LINE + GAP // 2, name)
        for row, cell in enumerate(cells):
            sheet.paste(cell, (left, 2 * GAP + 2 * LINE + row * (side_y + GAP)))
        left += GAP + max(cells[0].size[0], LETTER * len(name))
    return _png(sheet)


def _resized(pixels_HWC: U8) -> "Image":
    """Small images enlarged by a whole number, with the pixels to be seen; large ones made smaller."""
    from PIL import Image

    image = Image.fromarray(pixels_HWC)
    longest = max(image.size)
    if longest > LARGEST:
        width, height = (max(1, round(side * LARGEST / longest)) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)
    times = max(1, -(-SIDE // longest)) if longest < SIDE else 1
    return image.resize((times * image.size[0], times * image.size[1]), Image.Resampling.NEAREST)


def _heat_maps(values_NHW: F32, height: int) -> list["Image"]:
    """Colours mean the same in all of them; as wide as high, tall ones half as wide."""
    from PIL import Image

    low, high = np.percentile(values_NHW, [CLIPPED_PERCENT, 100 - CLIPPED_PERCENT])
    places = np.clip((values_NHW - low) / max(high - low, 1e-12), 0, 1) * (len(_COLOURS) - 1)
    before = np.minimum(places.astype(int), len(_COLOURS) - 2)
    share = (places - before)[..., None]
    colours = (_COLOURS[before] * (1 - share) + _COLOURS[before + 1] * share).round().astype(np.uint8)
    width = height if values_NHW.shape[1] <= 4 * values_NHW.shape[2] else height // 2
    # Box: several rows to a pixel are averaged, none is left out.
    return [Image.fromarray(colour_HWC).resize((width, height), Image.Resampling.BOX) for colour_HWC in colours]


def _factors(scale_NC: F32, height: int) -> list["Image"]:
    """A dot a channel, higher for a larger factor; the line is one half."""
    from PIL import Image, ImageDraw

    order = np.argsort(scale_NC.mean(0))
    low, high = float(scale_NC.min()), float(scale_NC.max())
    room = max(high - low, 0.02) * 1.1
    middle = (low + high) / 2
    x = np.linspace(2, FACTORS_WIDTH - 3, scale_NC.shape[1])
    dot = 1.5 if scale_NC.shape[1] <= 256 else 0.5
    cells = []
    for scale_C in scale_NC:
        cell = Image.new("RGB", (FACTORS_WIDTH, height), PAPER)
        draw = ImageDraw.Draw(cell)
        draw.rectangle((0, 0, FACTORS_WIDTH - 1, height - 1), outline=FAINT)
        y = (0.5 - (np.append(scale_C[order], 0.5) - middle) / room) * (height - 1)
        draw.line((0, float(y[-1]), FACTORS_WIDTH, float(y[-1])), FAINT)
        for across, down in zip(x.tolist(), y[:-1].tolist(), strict=True):
            draw.rectangle((across - dot, down - dot, across + dot, down + dot), DOT)
        cells.append(cell)
    return cells


def _write(draw: Any, left: int, top: int, text: str) -> None:
    from PIL import ImageFont

    draw.text((left, top), text, INK, font=ImageFont.load_default(TEXT))


def _short(caption: str, width: int) -> str:
    fits = width // LETTER
    return caption if len(caption) <= fits else caption[: fits - 2] + ".."


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
